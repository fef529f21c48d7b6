"""The ledger: one JSON line per update, and the same values to the trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe.data import UpdateBlocks, combine_hashes
from recipe.errors import RecipeError
from recipe.plan import RunPlan
from recipe.update import UpdateResult


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
        step_seconds: wall time of the update, waiting for data included, evaluation not.
        data_wait_seconds: the part of it spent waiting for data; the longest wait of any rank.
        tokens_per_second: target_tokens / step_seconds.
        mfu: model FLOPs utilisation, (6 N + 12 L d T) x tokens_per_second / (peak of all devices); null where unknown.
        peak_memory_bytes: allocator peak of a GPU, or resident set of the process; the largest of any rank.
        validation_loss: nats per token after this update; only in entries of evaluated updates.
        bits_per_byte: the same in bits per UTF-8 byte; only in entries of evaluated updates.
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
    step_seconds: float
    data_wait_seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_memory_bytes: int
    validation_loss: float | None = None
    bits_per_byte: float | None = None

    def as_dictionary(self) -> dict[str, Any]:
        """What is written: every field, the last two only where evaluated."""
        values = asdict(self)
        return {k: v for k, v in values.items() if v is not None or k not in ("validation_loss", "bits_per_byte")}


class Ledger:
    """Appends entries to `ledger.jsonl` on rank 0, and gives the values to accelerate's trackers.

    Args:
        path: the file; has to be new.
        accelerator: knows the rank and the trackers.
    """

    def __init__(self, path: Path, accelerator: Any) -> None:
        self.path = path
        self.accelerator = accelerator
        self._file = path.open("x", encoding="utf-8") if accelerator.is_main_process else None

    def write(self, entry: LedgerEntry) -> None:
        """Write one line and flush it.

        Raises:
            RecipeError: the disk is full, or the loss is not a number.
        """
        if not (math.isfinite(entry.loss) and math.isfinite(entry.grad_norm)):
            raise RecipeError(
                f"update {entry.update}: loss {entry.loss}, gradient norm {entry.grad_norm}: the run has diverged; "
                f"lower --optimizer.learning_rate ({entry.learning_rate:.2e} in this update) or lengthen the warm-up"
            )
        values = entry.as_dictionary()
        if self._file is not None:
            try:
                self._file.write(json.dumps(values, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:
                raise RecipeError(f"cannot write {self.path}: {error.strerror}", on_this_rank_only=True) from None
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=entry.update)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def entry_of(
    update: int,
    result: UpdateResult,
    blocks: UpdateBlocks,
    *,
    accelerator: Any,
    plan: RunPlan,
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
        plan: of the run.
        learning_rate: of this update.
        started: `time.perf_counter()` before the update waited for its data.
        peak: peak FLOP/s of one device, None where unknown.
    """
    cut, device = plan.update, accelerator.device
    measured = torch.tensor([[blocks.wait_seconds, peak_memory_bytes(device)]], dtype=torch.float32, device=device)
    padded = np.zeros((cut.largest_share, 32), dtype=np.uint8)  # ranks may hold unequal shares
    padded[: len(blocks.sha256)] = blocks.sha256
    hashes = accelerator.gather(torch.from_numpy(padded).to(device)).cpu().numpy().reshape(cut.world_size, -1, 32)
    shares = [rows[: len(cut.blocks_of_rank(rank))] for rank, rows in enumerate(hashes)]
    wait_seconds, peak_bytes = accelerator.gather(measured).max(dim=0).values.tolist()
    loss, target_tokens = result.loss.item(), int(result.target_tokens.item())
    step_seconds = time.perf_counter() - started
    tokens_per_second = target_tokens / step_seconds
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
        blocks_sha256=combine_hashes(np.concatenate(shares)),
        step_seconds=step_seconds,
        data_wait_seconds=wait_seconds,
        tokens_per_second=tokens_per_second,
        mfu=plan.flops_per_token * tokens_per_second / (peak * cut.world_size) if peak else None,
        peak_memory_bytes=int(peak_bytes),
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the CUDA allocator, or of the process's resident set, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Dense bf16 peak in FLOP/s by part of the device name, the most specific first; vendors' data sheets, without sparsity.
_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one device in `precision`; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
