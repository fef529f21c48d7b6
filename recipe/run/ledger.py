"""The ledger: one JSON line per update, and the same values to the trackers."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe.config.settings import Config, flat_settings
from recipe.data.blocks import UpdateBlocks, combine_hashes
from recipe.errors import DIVERGED_EXIT_CODE, RecipeError
from recipe.plan.budget import UpdatePlan
from recipe.plan.devices import bf16_peak_flops
from recipe.step.update import UpdateResult

TRACKER_PROJECT = "token-budget-recipe"  # also TensorBoard's folder in the run directory


@dataclass(frozen=True)
class LedgerEntry:
    """One update. The names are a public interface.

    Args:
        update: updates done, from 1.
        tokens: target tokens seen so far.
        loss: mean over the update's targets on all ranks, nats per token.
        grad_norm: 2-norm of the whole gradient before clipping.
        learning_rate: of this update.
        target_tokens: unmasked targets of this update, over all ranks.
        world_size: ranks.
        micro_batch_size: blocks in one forward and backward, at most.
        gradient_accumulation_steps: micro-batches per rank.
        blocks_sha256: sha256 of the sorted sha256 of the update's blocks: the same however they were shared out.
        update_seconds: wall time of the update, waiting for data included, evaluation not.
        data_wait_seconds: the part of it spent waiting for data; the longest wait of any rank.
        tokens_per_second: target_tokens / update_seconds.
        mfu: model FLOPs utilisation, (6 N + 12 L d T) x tokens_per_second / (peak of all devices); null where unknown.
        peak_memory_bytes: allocator peak of a GPU, or resident set of the process; the largest of any rank.
        validation_loss: nats per token after this update; only in entries of evaluated updates.
        bits_per_byte: the same in bits per UTF-8 byte; only in entries of evaluated updates.
        validation: {name: {loss, bits_per_byte}} of each of evaluation.sets; only in entries of evaluated updates.
        checkpoint_stall_seconds: time training stood still to copy its state; only where a checkpoint was taken.
    """

    update: int
    tokens: int
    loss: float
    grad_norm: float
    learning_rate: float
    target_tokens: int
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    blocks_sha256: str
    update_seconds: float
    data_wait_seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_bytes: int
    validation_loss: float | None = None
    bits_per_byte: float | None = None
    validation: dict[str, dict[str, float]] | None = None
    checkpoint_stall_seconds: float | None = None

    @property
    def is_finite(self) -> bool:
        """False where the update was skipped."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def as_dictionary(self) -> dict[str, Any]:
        """What is written: every field, those with a default only where they have a value."""
        return {k: v for k, v in asdict(self).items() if v is not None or k == "mfu"}


class Ledger:
    """Appends entries to `ledger.jsonl` on rank 0, and gives the values to accelerate's trackers.

    Args:
        path: the file; appended to.
        accelerator: knows the rank and the trackers.
        max_skipped_updates: updates in a row that may be skipped because they were not finite.
    """

    def __init__(self, path: Path, accelerator: Any, max_skipped_updates: int) -> None:
        self.path = path
        self.accelerator = accelerator
        self.max_skipped_updates = max_skipped_updates
        self._skipped_in_a_row = 0
        self._file = path.open("a", encoding="utf-8") if accelerator.is_main_process else None

    def write(self, entry: LedgerEntry) -> None:
        """Write one line and flush it; give its numbers to the trackers. An update that was skipped becomes an event.

        Raises:
            RecipeError: it cannot be written, or too many updates in a row were skipped.
        """
        if not entry.is_finite:
            return self._skipped(entry)
        self._skipped_in_a_row = 0
        values = entry.as_dictionary()
        self._append(values)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for name, of_set in (entry.validation or {}).items():
            numbers |= {f"validation/{name}/{k}": v for k, v in of_set.items()}
        self.accelerator.log(numbers, step=entry.update)

    def _skipped(self, entry: LedgerEntry) -> None:
        self._skipped_in_a_row += 1
        self.event(
            "skipped_update",
            entry.update,
            loss=str(entry.loss),
            grad_norm=str(entry.grad_norm),
            learning_rate=entry.learning_rate,
            blocks_sha256=entry.blocks_sha256,
        )
        if self._skipped_in_a_row >= self.max_skipped_updates:
            raise RecipeError(
                f"updates {entry.update - self._skipped_in_a_row + 1} to {entry.update} were not finite (loss {entry.loss}, "
                f"gradient norm {entry.grad_norm}) and were skipped; parameters and checkpoints are those before them. Lower "
                f"--optimizer.learning_rate ({entry.learning_rate:.2e} in this update), lengthen the warm-up, or look at the "
                "blocks in the ledger",
                exit_code=DIVERGED_EXIT_CODE,
            )

    def event(self, event: str, update: int, **values: Any) -> None:
        """Write a line for something else that happened after `update` updates: a resume, a skipped update, ..."""
        self._append({"event": event, "update": update, **values})

    def cut(self, update: int) -> None:
        """Go back to where it was after `update` updates."""
        if self._file is not None:
            self._file.close()
            truncate_ledger(self.path, update)
            self._file = self.path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Force what was written to the disk, before a checkpoint that follows it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _append(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RecipeError(f"cannot write {self.path}: {error.strerror}", on_this_rank_only=True) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def start_trackers(config: Config, accelerator: Any, update: int) -> None:
    """Start `log.trackers` for a run that goes on after `update` updates; 0 for a new one.

    TensorBoard and trackio go on with the run's curves, and W&B begins another run of the same name.
    """
    name = Path(config.run.directory).resolve().name
    options = {
        "trackio": {"name": name, "resume": "allow" if update else "never"},
        "wandb": {"name": name},
    }
    with redirect_stdout(io.StringIO()):  # trackio's words, in colours also where they go to a pipe
        plain = {k: v if isinstance(v, str | int | float) else str(v) for k, v in flat_settings(config).items()}
        accelerator.init_trackers(TRACKER_PROJECT, config=plain, init_kwargs=options)


def read_events(path: Path, event: str, update: int) -> list[dict[str, Any]]:
    """The events of one kind after at most `update` updates; none where there is no ledger."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    parsed = [json.loads(line) for line in lines if b'"event"' in line and _update_of(line) is not None]
    return [values for values in parsed if values.get("event") == event and values["update"] <= update]


def truncate_ledger(path: Path, update: int) -> int:
    """Keep the lines of updates up to `update`, whole; returns how many were cut off. Atomic."""
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")
    kept = [line for line in lines if (number := _update_of(line)) is not None and number <= update]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return sum(1 for line in lines if line) - len(kept)


def _update_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return None  # empty, or half written when the power went


def entry_of(
    update: int,
    result: UpdateResult,
    blocks: UpdateBlocks,
    *,
    accelerator: Any,
    cut: UpdatePlan,
    flops_per_token: int,
    learning_rate: float,
    started: float,
    peak: float | None,
) -> LedgerEntry:
    """The entry of an update: reads its result, so waits for the device, and gathers what only the other ranks know.

    Args:
        update: updates done with this one.
        result: of `run_update`.
        blocks: this rank's blocks of the update.
        accelerator: gathers over the ranks.
        cut: the division of this update.
        flops_per_token: of the model.
        learning_rate: of this update.
        started: `time.perf_counter()` before the update waited for its data.
        peak: peak FLOP/s of one device, None where unknown.
    """
    device = accelerator.device
    measured = torch.tensor(
        [[blocks.wait_seconds, peak_memory_bytes(device)]], dtype=result.loss.dtype, device=device
    )  # float64, where the device has it
    wait_seconds, peak_bytes = accelerator.gather(measured).max(dim=0).values.tolist()
    loss, target_tokens = result.loss.item(), int(result.target_tokens.item())
    update_seconds = time.perf_counter() - started
    tokens_per_second = target_tokens / update_seconds
    return LedgerEntry(
        update=update,
        tokens=update * cut.tokens_per_update,
        loss=loss,
        grad_norm=result.grad_norm.item(),
        learning_rate=learning_rate,
        target_tokens=target_tokens,
        world_size=cut.world_size,
        micro_batch_size=cut.micro_batch_size,
        gradient_accumulation_steps=cut.gradient_accumulation_steps,
        blocks_sha256=gather_hash(accelerator, cut, blocks),
        update_seconds=update_seconds,
        data_wait_seconds=wait_seconds,
        tokens_per_second=tokens_per_second,
        mfu=flops_per_token * tokens_per_second / (peak * cut.world_size) if peak else None,
        peak_memory_bytes=int(peak_bytes),
    )


def gather_hash(accelerator: Any, plan: UpdatePlan, blocks: UpdateBlocks) -> str:
    """The `blocks_sha256` of an update, of which each rank knows its own blocks. Collective."""
    padded = np.zeros((plan.largest_share, 32), dtype=np.uint8)  # ranks may hold unequal shares
    padded[: len(blocks.sha256)] = blocks.sha256
    hashes = accelerator.gather(torch.from_numpy(padded).to(accelerator.device)).cpu().numpy()
    by_rank = hashes.reshape(plan.world_size, -1, 32)
    return combine_hashes(np.concatenate([rows[: len(plan.blocks_of_rank(i))] for i, rows in enumerate(by_rank)]))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the CUDA allocator, or of the process's resident set, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one device in `precision`; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return bf16_peak_flops(torch.cuda.get_device_name(device))
