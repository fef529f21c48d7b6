"""`recipe/train.py` with one planted fault: `python tests/support/faulty_train.py FAULT [arguments of train.py]`.

Each fault is one that people make with this stack. tests/test_planted_faults.py shows that the proofs notice it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import recipe.checkpoint.files
import recipe.data.lanes
import recipe.plan.schedule
import recipe.step.update
from recipe.data.blocks import UpdateBlocks, UpdateReader, hash_blocks, to_tensors
from recipe.data.lanes import Lane
from recipe.step.update import MicroBatch

Backward = Callable[[Tensor], None]


def change_backward(change: Callable[[Backward, nn.Module, int], Backward]) -> None:
    """In each update let `change(accelerator.backward, model, steps)` stand for `accelerator.backward`."""
    original = recipe.step.update._accumulate_path

    def path(
        model: nn.Module, micro_batches: Sequence[MicroBatch], accelerator: Any, targets: Tensor, stop: Any
    ) -> Any:
        backward = accelerator.backward
        accelerator.backward = change(backward, model, len(micro_batches))
        try:
            return original(model, micro_batches, accelerator, targets, stop)
        finally:
            accelerator.backward = backward

    recipe.step.update._accumulate_path = path


def divide_the_loss_twice() -> None:
    """`loss / steps`, then `accelerator.backward`, which divides again."""
    change_backward(lambda backward, model, steps: lambda loss: backward(loss / steps))


def mean_of_means() -> None:
    """Each micro-batch's mean, averaged over the steps and ranks: right only where all hold equally many targets."""

    def path(
        model: nn.Module, micro_batches: Sequence[MicroBatch], accelerator: Any, targets: Tensor, stop: Any
    ) -> Any:
        accelerator.gradient_accumulation_steps = len(micro_batches)
        accelerator.step = 0
        means = []
        for inputs, labels in micro_batches:
            with accelerator.accumulate(model):
                mean = model(inputs, labels) / (labels != -100).sum().clamp(min=1)
                accelerator.backward(mean)
                means.append(mean.detach().double())
        return torch.stack(means).mean() * targets / accelerator.num_processes

    recipe.step.update._accumulate_path = path


def tick_the_schedule_per_rank() -> None:
    """A prepared scheduler ticks once per rank at every update."""
    import os

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    original = recipe.plan.schedule.learning_rate
    recipe.plan.schedule.learning_rate = lambda tokens, *rest: original(tokens * ranks, *rest)


def clip_each_micro_batch() -> None:
    """`clip_grad_norm_` inside the accumulation loop: it is no no-op there."""

    def clipping(backward: Backward, model: nn.Module, steps: int) -> Backward:
        def backward_and_clip(loss: Tensor) -> None:
            backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)

        return backward_and_clip

    change_backward(clipping)


def drop_the_tail_of_a_packing_batch() -> None:
    """Pack what one read gives and forget the remainder, as a batched map does."""
    original = Lane._read_documents

    def read(self: Lane, start: Any) -> Iterator[Any]:
        held = 0
        for number, (position, tokens) in enumerate(original(self, start), start=1):
            held += len(tokens)
            if number % 4 == 0:
                tokens = tokens[: max(len(tokens) - held % self.sequence_length, 0)]
                held = 0
            yield position, tokens

    Lane._read_documents = read  # type: ignore[method-assign]


def prepare_the_data_loader() -> None:
    """Pass blocks that are this rank's share already through `accelerator.prepare`, which shares them out again."""

    class Blocks(torch.utils.data.IterableDataset):
        def __init__(self, read: Callable[[], UpdateBlocks | None]) -> None:
            self.read = read

        def __iter__(self) -> Iterator[Tensor]:
            while (update := self.read()) is not None:
                yield from torch.from_numpy(update.blocks.copy())

    start, original = UpdateReader.__init__, UpdateReader.next_update

    def init(self: Any, lanes: Any, blocks_per_lane: int, updates: int, device: Any, **more: Any) -> None:
        self.share = len(lanes) * blocks_per_lane
        start(self, lanes, blocks_per_lane, updates * 8, device, **more)

    def next_update(self: Any) -> UpdateBlocks | None:
        if not hasattr(self, "batches"):
            from accelerate import Accelerator

            loader = torch.utils.data.DataLoader(Blocks(lambda: original(self)), batch_size=self.share)
            self.batches = iter(Accelerator(cpu=True).prepare(loader))
        blocks = next(self.batches).numpy().astype(np.int32)
        return UpdateBlocks(blocks, to_tensors(blocks, torch.device("cpu")), hash_blocks(blocks), [], 0.0)

    setattr(UpdateReader, "__init__", init)  # noqa: B010
    setattr(UpdateReader, "next_update", next_update)  # noqa: B010


def read_ahead_of_the_state() -> None:
    """The state of the lanes as it is when it is asked for, not as it was before the update that is trained on."""
    import time

    start, original = UpdateReader.__init__, UpdateReader.next_update

    def init(self: Any, lanes: Any, *rest: Any, **more: Any) -> None:
        self.lanes = lanes
        start(self, lanes, *rest, **more)

    def next_update(self: Any) -> UpdateBlocks | None:
        update = original(self)
        time.sleep(0.05)  # the background thread goes on
        return replace(update, lane_states=[lane.state_dict() for lane in self.lanes]) if update else None

    setattr(UpdateReader, "__init__", init)  # noqa: B010
    setattr(UpdateReader, "next_update", next_update)  # noqa: B010


def infinite_gradient_on_rank_1() -> None:
    """What a broken batch or a hardware fault does: in the updates of FAULTY_UPDATES, on the last rank alone."""
    import os

    faulty = {int(update) for update in os.environ["FAULTY_UPDATES"].split(",")}
    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    count = iter(range(1, 10**6))

    def infinite(backward: Backward, model: nn.Module, steps: int) -> Backward:
        is_faulty = next(count) in faulty and is_last_rank
        return lambda loss: backward(loss * float("inf") if is_faulty else loss)

    change_backward(infinite)


def small_memory() -> None:
    """The allocator of the last rank fails for more than FAULTY_ROWS blocks at once, in FAULTY_PASS forward or backward, from
    update FAULTY_FROM on: with the error that torch's own allocator gives for too large a request."""
    import os

    import recipe.model.gpt2

    rows, where = int(os.environ["FAULTY_ROWS"]), os.environ["FAULTY_PASS"]
    first = int(os.environ.get("FAULTY_FROM", "1"))
    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    original, run_update = recipe.model.gpt2.CausalLanguageModel.forward, recipe.step.update.run_update
    update = [0]

    def exhaust(gradient: Tensor) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def forward(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = original(self, inputs, targets)
        if is_last_rank and len(inputs) > rows and torch.is_grad_enabled() and update[0] >= first:
            if where == "forward":
                exhaust(loss)
            loss.register_hook(exhaust)
        return loss

    def count(*arguments: Any, **options: Any) -> Any:
        update[0] += 1
        return run_update(*arguments, **options)

    recipe.model.gpt2.CausalLanguageModel.forward = forward  # type: ignore[method-assign]
    recipe.step.update.run_update = count


def forget_to_restore_dropout() -> None:
    """Dropout goes on from wherever the process's random state is."""
    import recipe.model.seeds

    recipe.model.seeds.seed_dropout = lambda seed, update, rank: None


def forget_skipped_batches() -> None:
    """A rollback that only the process knows of."""
    import recipe.checkpoint.resume

    recipe.checkpoint.resume.read_events = lambda path, event, update: []


def prune_before_writing() -> None:
    """Make room for a checkpoint before it is there, as accelerate's `total_limit` does."""
    import recipe.checkpoint.saver

    original = recipe.checkpoint.saver.write_checkpoint

    def write(root: Path, *arguments: Any) -> Path:
        for path in recipe.checkpoint.files.list_checkpoints(root):
            shutil.rmtree(path)
        return original(root, *arguments)

    setattr(recipe.checkpoint.saver, "write_checkpoint", write)  # noqa: B010


def forget_the_manifests_sync() -> None:
    """The directory gets its name while the manifest may still be in memory only."""
    original = recipe.checkpoint.files._sync
    recipe.checkpoint.files._sync = lambda path: (
        None if path.name == recipe.checkpoint.files.MANIFEST else original(path)
    )


def attention_sees_the_future() -> None:
    """The causal mask is lost."""
    import recipe.model.gpt2

    original = recipe.model.gpt2.F.scaled_dot_product_attention

    def not_causal(*arguments: Any, **options: Any) -> Tensor:
        return original(*arguments, **{**options, "is_causal": False})

    recipe.model.gpt2.F.scaled_dot_product_attention = not_causal


def slow_checkpoint_writer() -> None:
    """No fault, but it takes a while: so that a kill at random often hits a checkpoint that is being written."""
    import time

    original = recipe.checkpoint.files._sync

    def sync(path: Path) -> None:
        time.sleep(0.02)
        original(path)

    recipe.checkpoint.files._sync = sync


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        divide_the_loss_twice,
        mean_of_means,
        tick_the_schedule_per_rank,
        clip_each_micro_batch,
        drop_the_tail_of_a_packing_batch,
        prepare_the_data_loader,
        read_ahead_of_the_state,
        infinite_gradient_on_rank_1,
        small_memory,
        forget_to_restore_dropout,
        forget_skipped_batches,
        prune_before_writing,
        forget_the_manifests_sync,
        attention_sees_the_future,
        slow_checkpoint_writer,
    )
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    import recipe.train
    from recipe.errors import run_command

    run_command(recipe.train.main)
