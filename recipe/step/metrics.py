"""What is measured of an update, for the ledger."""

import sys
import time

import numpy as np
import torch

from recipe.data.blocks import UpdateBlocks, combine_hashes
from recipe.run.environment import peak_flops
from recipe.run.ledger import LedgerEntry, source_columns
from recipe.run.noise_scale import GroupSums
from recipe.run.run import Run
from recipe.step.update import UpdateResult


def measure_update(
    run: Run, result: UpdateResult, blocks: UpdateBlocks, learning_rate: float, started: float
) -> LedgerEntry:
    """The entry of an update: waits for its result, and gathers on rank 0 what only the other ranks know. Collective.

    On the others the entry has no `blocks_sha256`, and of what is gathered their own.

    `started` is `time.perf_counter()` before the update waited for its data.
    """
    plan, device = run.plan.update_at(blocks.update), run.device
    of_sources = (*blocks.source_passes, *blocks.source_tokens) if run.config.data.sources else ()
    rank_values = [blocks.wait_seconds, peak_memory_bytes(device), blocks.bad_rows, *of_sources]
    measured = torch.tensor(rank_values, dtype=result.loss.dtype, device=device)  # float64, if the device has it
    of_ranks = run.gather_on_main(measured)
    wait_seconds, peak_bytes, _, *largest = of_ranks.max(dim=0).values.tolist()
    _, _, bad_rows, *sums = map(int, of_ranks.sum(dim=0).tolist())
    run.ledger.count_bad_rows(blocks.update, bad_rows)
    count = len(run.config.data.sources)
    sources = dict(zip(source_columns(run.config), [*map(int, largest[:count]), *sums[count:]], strict=True))
    run.ledger.count_passes(blocks.update, sources)
    loss, grad_norm, target_tokens = result.loss.item(), result.grad_norm.item(), int(result.target_tokens.item())
    groups = GroupSums(*result.noise.tolist()) if result.noise is not None else None
    noise = groups.columns(grad_norm, target_tokens, plan.world_size) if groups else {}
    update_seconds = time.perf_counter() - started
    tokens_per_second = target_tokens / update_seconds
    peak = peak_flops(device, run.precision)
    return LedgerEntry(
        update=blocks.update,
        tokens=run.plan.tokens_after(blocks.update),
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        target_tokens=target_tokens,
        world_size=plan.world_size,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        blocks_sha256=gather_hash(run, blocks),
        update_seconds=update_seconds,
        data_wait_seconds=wait_seconds,
        tokens_per_second=tokens_per_second,
        mfu=run.plan.flops_per_token * tokens_per_second / (peak * plan.world_size) if peak else None,
        peak_memory_bytes=int(peak_bytes),
        **noise,
        sources={**sources},
    )


def gather_hash(run: Run, blocks: UpdateBlocks) -> str | None:
    """The `blocks_sha256` of an update, of which each rank knows its own blocks: on rank 0. Collective."""
    plan = run.plan.update_at(blocks.update)
    padded = np.zeros((plan.largest_share, 32), dtype=np.uint8)  # ranks may hold unequal shares
    padded[: len(blocks.sha256)] = blocks.sha256
    by_rank = run.gather_on_main(torch.from_numpy(padded).to(run.device)).cpu().numpy()
    if not run.is_main:
        return None
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
