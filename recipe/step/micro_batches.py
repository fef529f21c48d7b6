"""A rank's micro-batches: as many blocks as fit into memory, and fewer on all ranks alike when one of them runs out."""

from typing import Any

import numpy as np
import torch

from recipe.data.blocks import PADDING, MicroBatch, UpdateBlocks, split_into_micro_batches, to_tensors
from recipe.errors import RecipeError
from recipe.model.kernels import eager
from recipe.model.optimizer import seed_dropout
from recipe.plan.budget import UpdatePlan
from recipe.run.memory_limit import known_limit
from recipe.run.run import Run
from recipe.run.stop import DoesNotFit
from recipe.step.noise import GradientNoise
from recipe.step.update import UpdateResult, is_out_of_memory, run_update

# The first update has no optimizer state in memory yet, the second has; those after it need no more.
UPDATES_ON_TRIAL = 2


class MicroBatches:
    """Splits updates into micro-batches whose size halves when memory does not suffice.

    A rank that fails while the others wait for its share of the gradient cannot tell them. So while a size is on trial, ranks
    add up the gradients with one fully masked row after all micro-batches, which adds 0 to them.

    Starting one warms DDP up, and tries what `batch.micro_batch_size: auto` came to. Collective.

    Raises:
        RecipeError: not even one block fits.
    """

    def __init__(self, run: Run, model: Any) -> None:
        self.run, self.model = run, model
        self._on_trial = UPDATES_ON_TRIAL
        if every := run.config.log.noise_scale_every:
            run.noise = GradientNoise(model, every)
        if run.is_sharded:  # every forward is a collective, so nothing is tried
            if limit := run.on_main(lambda: known_limit(run)):
                run.console.say(f"micro-batches of {limit} blocks: an earlier start ran out of memory with larger ones")
                run.plan = run.plan.with_micro_batch_size(limit)
            return
        warm_up_ddp(run, model)
        if run.config.batch.micro_batch_size == "auto":
            probe_micro_batch(run, model)

    def run_update(self, optimizer: Any, blocks: UpdateBlocks) -> UpdateResult:
        """Run the update of these blocks, again in smaller micro-batches if a rank runs out of memory.

        Raises:
            Stopped: the ranks have abandoned the update.
        """
        run = self.run
        if run.plan.phase_at(blocks.update).first_update == blocks.update:
            self._on_trial = UPDATES_ON_TRIAL  # another budget may bring larger micro-batches
        while True:
            seed_dropout(run.config.run.seed, blocks.update, run.rank)
            if run.noise:
                run.noise.update = blocks.update
            plan = run.plan.update_at(blocks.update)
            tokens = plan.tokens_per_update  # packed blocks have no masked target, so their number is known
            try:
                return run_update(run, self.model, optimizer, self.split(blocks.batch, plan), tokens)
            except DoesNotFit as error:
                rank = error.rank
            self._halve(blocks.update, rank)  # after `except`, whose error holds what is to be freed

    def split(self, batch: MicroBatch, plan: UpdatePlan) -> list[MicroBatch]:
        """Micro-batches of this rank's blocks of an update, [blocks, tokens]."""
        on_trial = self._on_trial > 0 and plan.world_size > 1 and not self.run.is_sharded
        self._on_trial -= 1
        return split_into_micro_batches(batch, plan, self.run.rank, masked_row_last=on_trial)

    def _halve(self, update: int, rank: int) -> None:
        from accelerate.utils.memory import clear_device_cache

        run, plan = self.run, self.run.plan.update_at(update)
        size = min(plan.micro_batch_size, plan.largest_share)
        if size == 1:
            error = RecipeError(
                f"rank {rank} ran out of memory in update {update} with micro-batches of one block: set a shorter "
                "--data.sequence_length or a smaller model, --precision bf16, or take a device with more memory"
            )
            run.stop.request_stop(error, run.rank, already_printed=run.rank != 0)
            run.stop.agree()  # all ranks are here
        run.plan = run.plan.with_micro_batch_size(size // 2)
        self._on_trial = UPDATES_ON_TRIAL
        clear_device_cache(garbage_collection=True)
        run.ledger.event("micro_batch", update - 1, reason=f"rank {rank} ran out of memory", old=size, new=size // 2)
        run.console.say(
            f"rank {rank} ran out of memory: update {update:,} again, the same blocks in micro-batches of {size // 2} instead "
            f"of {size}, {run.plan.update_at(update).gradient_accumulation_steps} accumulation steps"
        )


def warm_up_ddp(run: Run, model: Any) -> None:
    """Let DDP do now what it does once: in its second forward the ranks agree on the buckets of the gradient. Collective.

    Afterwards no forward waits for other ranks, so a rank that stops before one holds nobody up; and a resumed run reduces its
    first gradient in the same order as the run that was not stopped. A fully masked row adds nothing.
    """
    if run.accelerator.num_processes == 1:
        return
    batch = masked_rows(1, run, model)
    with eager(model):
        for _ in range(2):
            model(*batch).backward()
    model.zero_grad(set_to_none=True)


def masked_rows(rows: int, run: Run, model: Any) -> MicroBatch:
    """Rows without a target, in the shape of a run's blocks."""
    blocks = np.full((rows, run.config.data.sequence_length + 1), PADDING)
    return to_tensors(blocks, run.device, run.accelerator.unwrap_model(model).document_start)


def probe_micro_batch(run: Run, model: Any) -> None:
    """Run forward and backward with what the plan has chosen; if a rank runs out of memory, with half of it. Collective.

    Meanwhile memory is held for the optimizer's state, which the first step makes. The targets are masked, so the gradient is
    0; it is cleared afterwards.

    Raises:
        RecipeError: not even one block fits.
    """
    size = max(phase.update.largest_micro_batch for phase in run.plan.phases)
    while not _fits(size, run, model):
        if size == 1:
            raise RecipeError(
                "batch.micro_batch_size = auto: a rank ran out of memory with one block; set a shorter --data.sequence_length, "
                "--performance.activation_checkpointing 1, a smaller model, or take a device with more memory"
            )
        run.console.say(f"micro-batches of {size} blocks do not fit after all; trying {size // 2}")
        size //= 2
    run.console.say(f"micro-batches of {size} blocks fit: tried")
    run.plan = run.plan.with_micro_batch_size(size)


def _fits(size: int, run: Run, model: Any) -> bool:
    from accelerate.utils.memory import clear_device_cache

    batch, is_out = masked_rows(size, run, model), False
    try:
        moments = torch.empty(run.plan.state_bytes[2], dtype=torch.uint8, device=run.device)
        for _ in range(2):  # the second finds gradients there
            with run.accelerator.no_sync(model), eager(model):
                model(*batch).backward()
        del moments
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        is_out = True
    model.zero_grad(set_to_none=True)
    clear_device_cache(garbage_collection=True)
    outcome = torch.tensor([int(is_out)], device=run.device)
    return not int(run.accelerator.gather(outcome).max())
