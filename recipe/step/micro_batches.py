"""Out of memory: the same update again, in smaller micro-batches, on all ranks alike."""

from __future__ import annotations

from dataclasses import replace

from recipe.data.blocks import split_into_micro_batches
from recipe.errors import RecipeError
from recipe.plan.budget import UpdatePlan
from recipe.run.console import Console
from recipe.run.ledger import Ledger
from recipe.run.stop import StopRequest
from recipe.step.update import MicroBatch

# The first update has no optimizer state in memory yet, the second has; those after it need no more.
UPDATES_ON_TRIAL = 2


class MicroBatches:
    """Cuts updates into micro-batches of a size that becomes smaller where memory does not suffice.

    A rank that fails while the others wait for its share of the gradient cannot tell them. So while a size is on trial, the
    gradients are added up with one fully masked row after all micro-batches, which adds 0 to them.

    Args:
        cut: the update's division; `self.cut` is the one in force.
        rank: whose micro-batches they are.
        stop: through which the ranks agree.
        ledger: receives an event for each change.
        console: receives a line.
    """

    def __init__(self, cut: UpdatePlan, rank: int, *, stop: StopRequest, ledger: Ledger, console: Console) -> None:
        self.cut, self.rank = cut, rank
        self.stop, self.ledger, self.console = stop, ledger, console
        self._on_trial = UPDATES_ON_TRIAL

    def split(self, batch: MicroBatch) -> list[MicroBatch]:
        """Micro-batches of this rank's blocks of an update, [blocks, tokens]."""
        on_trial = self._on_trial > 0 and self.cut.world_size > 1
        self._on_trial -= 1
        return split_into_micro_batches(batch, self.cut, self.rank, masked_row_last=on_trial)

    def shrink(self, update: int) -> bool:
        """Halve the micro-batch if the update was abandoned because a rank ran out of memory; whether to run it again."""
        from accelerate.utils.memory import clear_device_cache

        if not self.stop.rank_out_of_memory or self.stop.agreed_signal:
            return False
        rank, self.stop.rank_out_of_memory = self.stop.rank_out_of_memory - 1, 0
        size = min(self.cut.micro_batch_size, self.cut.largest_share)
        if size == 1:
            error = RecipeError(
                f"rank {rank} ran out of memory in update {update} with micro-batches of one block: set a shorter "
                "--data.sequence_length or a smaller model, --precision bf16, or take a device with more memory"
            )
            self.stop.request_stop(error, self.rank, already_printed=self.rank == 0)
            return False
        self.cut = replace(self.cut, micro_batch_size=size // 2)
        self._on_trial = UPDATES_ON_TRIAL
        clear_device_cache(garbage_collection=True)
        self.ledger.event("micro_batch", update - 1, reason=f"rank {rank} ran out of memory", old=size, new=size // 2)
        self.console.say(
            f"rank {rank} ran out of memory: update {update:,} again, the same blocks in micro-batches of {size // 2} instead "
            f"of {size}, {self.cut.gradient_accumulation_steps} accumulation steps"
        )
        return True
