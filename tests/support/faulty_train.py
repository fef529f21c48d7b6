"""`recipe/train.py` with one planted fault: `python tests/support/faulty_train.py FAULT [arguments of train.py]`.

Each fault is one that people make with this stack. tests/test_planted_faults.py shows that the proofs notice it.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recipe.checkpoint.files
import recipe.checkpoint.resume
import recipe.checkpoint.saver
import recipe.data.lanes
import recipe.evaluation.in_run
import recipe.hub.client
import recipe.model.gpt2
import recipe.model.optimizer
import recipe.run.ledger
import recipe.run.run
import recipe.run.watch
import recipe.step.micro_batches
import recipe.step.parity
import recipe.step.update
from recipe.data.blocks import IGNORED_TARGET, MicroBatch, UpdateBlocks, UpdateReader, hash_blocks, to_tensors
from recipe.data.lanes import Lane
from recipe.run.directory import list_checkpoints
from recipe.run.run import Run

Backward = Callable[[Tensor], None]


def plant_gradient(accumulate: Callable[..., Any]) -> None:
    """Let `accumulate` stand for `accumulate_gradient`, in updates and in the parity check."""
    setattr(recipe.step.update, "accumulate_gradient", accumulate)  # noqa: B010
    setattr(recipe.step.parity, "accumulate_gradient", accumulate)  # noqa: B010


def change_backward(change: Callable[[Backward, nn.Module, int], Backward]) -> None:
    """In each update let `change(accelerator.backward, model, steps)` stand for `accelerator.backward`."""
    original = recipe.step.update.accumulate_gradient

    def accumulate(run: Run, model: nn.Module, micro_batches: Sequence[MicroBatch], *rest: Any) -> Any:
        backward = run.accelerator.backward
        run.accelerator.backward = change(backward, model, len(micro_batches))
        try:
            return original(run, model, micro_batches, *rest)
        finally:
            run.accelerator.backward = backward

    plant_gradient(accumulate)


def divide_the_loss_twice() -> None:
    """`loss / steps`, then `accelerator.backward`, which divides again."""
    change_backward(lambda backward, model, steps: lambda loss: backward(loss / steps))


def mean_of_means() -> None:
    """Each micro-batch's mean, averaged over the steps and ranks: right only where all hold equally many targets."""

    def accumulate(run: Run, model: nn.Module, micro_batches: Sequence[MicroBatch], *rest: Any) -> Any:
        accelerator = run.accelerator
        accelerator.gradient_accumulation_steps = len(micro_batches)
        accelerator.step = 0
        means, counts = [], []
        for inputs, labels in micro_batches:
            counts.append((labels != IGNORED_TARGET).sum())
            with accelerator.accumulate(model):
                mean = model(inputs, labels) / counts[-1].clamp(min=1)
                accelerator.backward(mean)
                means.append(mean.detach().double())
        return accelerator.reduce(torch.stack(means).mean(), "mean"), accelerator.reduce(torch.stack(counts).sum())

    plant_gradient(accumulate)


def tick_the_schedule_per_rank() -> None:
    """A prepared scheduler ticks once per rank at every update."""
    import os

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    original = recipe.model.optimizer.learning_rate
    recipe.model.optimizer.learning_rate = lambda tokens, *rest: original(tokens * ranks, *rest)


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
        for number, document in enumerate(original(self, start), start=1):
            tokens = document.tokens
            held += len(tokens)
            if number % 4 == 0:
                tokens = tokens[: max(len(tokens) - held % self.sequence_length, 0)]
                held = 0
            yield document._replace(tokens=tokens, size=len(tokens) + 1)

    Lane._read_documents = read  # type: ignore[method-assign]


def draw_by_documents() -> None:
    """Take the weights of a mixture as chances of the next document, as `interleave_datasets` does."""

    def read(self: Lane, start: Any) -> Iterator[Any]:
        documents = [stream.read(position) for stream, position in zip(self.streams, start.streams, strict=True)]
        numbers, draw = range(len(documents)), random.Random(0)
        while True:
            (source,) = draw.choices(numbers, [stream.source.weight for stream in self.streams])
            tokens = next(documents[source])[1]
            yield recipe.data.lanes._Document(start.streams, start.source_tokens, source, tokens, len(tokens) + 1)

    Lane._read_documents = read  # type: ignore[method-assign]


def prepare_the_data_loader() -> None:
    """Pass blocks that are this rank's share already through `accelerator.prepare`, which shares them out again."""

    class Blocks(torch.utils.data.IterableDataset):
        def __init__(self, read: Callable[[], UpdateBlocks]) -> None:
            self.read = read

        def __iter__(self) -> Iterator[Tensor]:
            while True:
                yield from torch.from_numpy(self.read().blocks.copy())

    start, original = UpdateReader.__init__, UpdateReader.next_update

    def init(self: Any, run: Run, lanes: Sequence[Lane], *rest: Any) -> None:
        self.share, self.updates = len(lanes) * run.plan.update.blocks_per_lane, count(1)
        longer = replace(run.plan, planned_updates=8 * run.plan.planned_updates)
        start(self, replace(run, plan=longer), lanes, *rest)

    def next_update(self: Any) -> UpdateBlocks:
        if not hasattr(self, "batches"):
            loader = torch.utils.data.DataLoader(Blocks(lambda: original(self)), batch_size=self.share)
            self.batches = iter(self.run.accelerator.prepare(loader))
        blocks = next(self.batches).numpy().astype(np.int32)
        batch = to_tensors(blocks, torch.device("cpu"))
        return UpdateBlocks(blocks, batch, hash_blocks(blocks), [], next(self.updates))

    setattr(UpdateReader, "__init__", init)  # noqa: B010
    setattr(UpdateReader, "next_update", next_update)  # noqa: B010


def read_ahead_of_the_state() -> None:
    """The state of the lanes as it is when it is asked for, not as it was before the update that is trained on."""
    import time

    original = UpdateReader.next_update

    def next_update(self: UpdateReader) -> UpdateBlocks:
        update = original(self)
        time.sleep(0.05)  # the background thread goes on
        return replace(update, lane_states=[lane.state_dict() for lane in self.lanes])

    setattr(UpdateReader, "next_update", next_update)  # noqa: B010


def infinite_gradient_on_rank_1() -> None:
    """What a broken batch or a hardware fault does: in the updates of FAULTY_UPDATES, on the last rank alone."""
    import os

    faulty = {int(update) for update in os.environ["FAULTY_UPDATES"].split(",")}
    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    updates = count(1)

    def infinite(backward: Backward, model: nn.Module, steps: int) -> Backward:
        is_faulty = next(updates) in faulty and is_last_rank
        return lambda loss: backward(loss * float("inf") if is_faulty else loss)

    change_backward(infinite)


def small_memory() -> None:
    """The allocator of the last rank fails for more than FAULTY_ROWS blocks at once, in FAULTY_PASS forward or backward, from
    update FAULTY_FROM on: with the error that torch's own allocator gives for too large a request."""
    import os

    rows, where = int(os.environ["FAULTY_ROWS"]), os.environ["FAULTY_PASS"]
    first = int(os.environ.get("FAULTY_FROM", "1"))
    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    original, run_update = recipe.model.gpt2.CausalLanguageModel.forward, recipe.step.micro_batches.run_update
    update = [0]

    def exhaust(gradient: Tensor) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def forward(self: Any, *micro_batch: Tensor) -> Tensor:
        loss = original(self, *micro_batch)
        if is_last_rank and len(micro_batch[0]) > rows and torch.is_grad_enabled() and update[0] >= first:
            if where == "forward":
                exhaust(loss)
            loss.register_hook(exhaust)
        return loss

    def counting(*arguments: Any) -> Any:
        update[0] += 1
        return run_update(*arguments)

    recipe.model.gpt2.CausalLanguageModel.forward = forward  # type: ignore[method-assign, assignment]
    setattr(recipe.step.micro_batches, "run_update", counting)  # noqa: B010


def forget_to_restore_dropout() -> None:
    """Dropout goes on from wherever the process's random state is."""
    setattr(recipe.step.micro_batches, "seed_dropout", lambda seed, update, rank: None)  # noqa: B010


def forget_skipped_batches() -> None:
    """A rollback that only the process knows of."""
    setattr(recipe.checkpoint.resume, "read_events", lambda path, event, update: [])  # noqa: B010


def prune_before_writing() -> None:
    """Make room for a checkpoint before it is there, as accelerate's `total_limit` does."""
    original = recipe.checkpoint.saver.write_checkpoint

    def write(root: Path, *arguments: Any) -> Path:
        for path in list_checkpoints(root):
            shutil.rmtree(path)
        return original(root, *arguments)

    setattr(recipe.checkpoint.saver, "write_checkpoint", write)  # noqa: B010


def forget_the_manifests_sync() -> None:
    """The directory gets its name while the manifest may still be in memory only."""
    original = recipe.checkpoint.files.sync
    recipe.checkpoint.files.sync = lambda path: (
        None if path.name == recipe.checkpoint.files.MANIFEST else original(path)
    )


def signal_in_an_evaluation() -> None:
    """No fault, but SIGTERM comes to the last rank at the start of evaluation, or sample, FAULTY_EVALUATION, from 1."""
    import os
    import signal

    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    evaluations = count(1)

    def signalling(original: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*arguments: Any) -> Any:
            if next(evaluations) == int(os.environ["FAULTY_EVALUATION"]) and is_last_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        return evaluate

    for name in ("evaluate", "generate"):
        setattr(recipe.evaluation.in_run, name, signalling(getattr(recipe.evaluation.in_run, name)))


def attention_sees_the_future() -> None:
    """The causal mask is lost."""
    original = F.scaled_dot_product_attention

    def not_causal(*arguments: Any, **options: Any) -> Tensor:
        return original(*arguments, **{**options, "is_causal": False})

    F.scaled_dot_product_attention = not_causal


def slow_checkpoint_writer() -> None:
    """No fault, but it takes a while: so that a kill at random often hits a checkpoint that is being written."""
    import time

    original = recipe.checkpoint.files.sync

    def sync(path: Path) -> None:
        time.sleep(0.02)
        original(path)

    recipe.checkpoint.files.sync = sync


def full_disk_under_tensorboard() -> None:
    """No fault of the recipe, but TensorBoard cannot write; and checkpoints take a while."""
    import errno
    import os

    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    def write(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    LocalFileSystem._write = write
    slow_checkpoint_writer()


def miscounting_accelerator() -> None:
    """An Accelerator that counts other ranks than the launcher started: one more."""
    import accelerate

    class Miscounting(accelerate.Accelerator):
        @property
        def num_processes(self) -> int:
            return super().num_processes + 1

    setattr(accelerate, "Accelerator", Miscounting)  # noqa: B010


def full_disk() -> None:
    """No fault of the recipe: /dev/full takes nothing, so the run's first event cannot be written."""

    class Full(recipe.run.ledger.Ledger):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._files["events.jsonl"] = Path("/dev/full").open("w")  # noqa: SIM115

    setattr(recipe.run.run, "Ledger", Full)  # noqa: B010


def poor_file_system() -> None:
    """No fault of the recipe: in FAULTY_DIRECTORY, as on CIFS or a mounted bucket, directories are not synced or renamed, and
    there are no permissions and no locks."""
    import errno
    import fcntl
    import os

    def plant(module: Any, name: str, error: int, directories_only: bool) -> None:
        original = getattr(module, name)

        def call(what: Any, *arguments: Any, **options: Any) -> Any:
            what_file = what if isinstance(what, int) or not hasattr(what, "fileno") else what.fileno()
            path = Path(os.readlink(f"/proc/self/fd/{what_file}") if isinstance(what_file, int) else what_file)
            if path.is_relative_to(os.environ["FAULTY_DIRECTORY"]) and (path.is_dir() or not directories_only):
                raise OSError(error, os.strerror(error))
            return original(what, *arguments, **options)

        setattr(module, name, call)

    plant(os, "fsync", errno.EINVAL, directories_only=True)
    plant(os, "replace", errno.ENOSYS, directories_only=True)
    plant(os, "chmod", errno.ENOTSUP, directories_only=False)
    plant(fcntl, "flock", errno.ENOLCK, directories_only=False)


def impatient_with_the_hub() -> None:
    """No fault, but a Hub that does not answer is waited for one second only, before the run."""
    recipe.hub.client.CHECK_SECONDS = 1.0


def impatient_with_other_hosts() -> None:
    """No fault, but a host that is not heard of is given up after 6 s."""
    recipe.run.watch.BEAT_SECONDS, recipe.run.watch.LOST_SECONDS = 0.5, 6.0


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        divide_the_loss_twice,
        mean_of_means,
        tick_the_schedule_per_rank,
        clip_each_micro_batch,
        drop_the_tail_of_a_packing_batch,
        draw_by_documents,
        prepare_the_data_loader,
        read_ahead_of_the_state,
        infinite_gradient_on_rank_1,
        small_memory,
        forget_to_restore_dropout,
        forget_skipped_batches,
        prune_before_writing,
        forget_the_manifests_sync,
        signal_in_an_evaluation,
        attention_sees_the_future,
        slow_checkpoint_writer,
        full_disk_under_tensorboard,
        miscounting_accelerator,
        full_disk,
        poor_file_system,
        impatient_with_the_hub,
        impatient_with_other_hosts,
    )
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    import recipe.train
    from recipe.errors import run_command

    run_command(recipe.train.main)
