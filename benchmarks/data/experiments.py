"""What reading costs beside tokens per second: a training's Python thread, a resume, hashes, and the machine's limits."""

from __future__ import annotations

import os
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data.readers import Job, settings_of
from benchmarks.reading import open_lanes, peak_memory_bytes, start
from benchmarks.results import timed
from recipe.data.blocks import UpdateReader, hash_blocks, next_update, to_tensors

OPERATIONS = 2000  # small ones of torch, of a training's step; a GPT-2 of 24 layers launches about as many
GPU_TOKENS_PER_SECOND = 60_000  # of the 1.3B preset one H100 takes 55,000 to 59,000 (docs/results/2026-11-27-gpu.md)
_LONG, _FLAT_OUT = 10**9, float("inf")


def training_thread(job: Job, source: str, seconds: float, switch_interval: float = 0.005) -> dict[str, Any]:
    """Steps per second of a thread that launches small operations while a reader's threads do nothing, keep up, or hurry.

    The thread has a core of its own, and so have the reader's threads together, so that it loses nothing but the
    interpreter's lock. Of three phases that follow each other, as many steps as fit into `seconds` each.
    """
    sys.setswitchinterval(switch_interval)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)  # threads are born with it
    settings = settings_of(job, source) | {"schedule.total_tokens": job.blocks * job.length * _LONG}
    run = start(settings)
    reader = UpdateReader(run, open_lanes(run))
    reader.next_update()
    os.sched_setaffinity(0, cores[:1])
    x = torch.ones(8)
    phases: dict[str, dict[str, float]] = {}
    for name, tokens_per_second in (("no reading", 0.0), ("one H100", GPU_TOKENS_PER_SECOND), ("flat out", _FLAT_OUT)):
        if not tokens_per_second:
            while not reader._ready.full():
                time.sleep(0.1)
            time.sleep(0.3)
        steps, tokens, spent, waited, began, ran = 0, 0, 0.0, 0.0, time.perf_counter(), _ran_seconds()
        while (now := time.perf_counter()) - began < seconds:
            if tokens < tokens_per_second * (now - began) and (tokens_per_second < _FLAT_OUT or reader._ready.qsize()):
                tokens += reader.next_update().batch[0].numel()
                waited += time.perf_counter() - now
            started = time.perf_counter()
            for _ in range(OPERATIONS):
                x.add_(1.0)
            spent += time.perf_counter() - started
            steps += 1
        asleep, wall = time.perf_counter() - began - waited - (_ran_seconds() - ran), time.perf_counter() - began
        phases[name] = {
            "step_seconds": spent / steps,
            "asleep_share": asleep / wall,
            "tokens_per_second": tokens / wall,
        }
    reader.close()
    os.sched_setaffinity(0, cores)
    return phases


def _ran_seconds() -> float:
    """Of this thread: on a core, or ready for one that another process has. The rest it has waited for the lock."""
    ran, queued, _ = Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()
    return (int(ran) + int(queued)) / 1e9


def resume(job: Job, source: str) -> dict[str, Any]:
    """Seconds to the first update of lanes that go on in the middle of a window of full size."""
    run = start(settings_of(job, source))
    lanes = open_lanes(run)
    full = run.config.data.shuffle_blocks
    window = next(number for number in range(100) if lanes[0].window_blocks(number) == full)
    in_window, began = {"window": window, "block": full // 2}, time.perf_counter()
    for lane in lanes:
        lane.load_state_dict(lane.state_dict() | in_window)
    next_update(lanes, run.plan.update.blocks_per_lane, run.device)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": full * len(lanes) * job.length, "peak_bytes": peak_memory_bytes()}


def limits(job: Job) -> dict[str, Any]:
    """What the machine does: a copy, SHA-256, the hashes of an update's blocks and its tensors, as seconds a token."""
    source, target = np.ones(1 << 24, dtype=np.int64), np.empty(1 << 24, dtype=np.int64)
    data = source.tobytes()
    blocks = np.ones((job.blocks, job.length + 1), dtype=np.int32)
    ids, tokens = blocks.astype(np.uint16), job.blocks * job.length

    def fastest(action: Any) -> float:
        return min(timed(action) for _ in range(5))

    device = torch.device("cpu")
    return {
        "copied_bytes_per_second": source.nbytes / fastest(lambda: np.copyto(target, source)),
        "sha256_bytes_per_second": len(data) / fastest(lambda: sha256(data).digest()),
        "hash_seconds_per_token": fastest(lambda: hash_blocks(blocks)) / tokens,
        "tensor_seconds_per_token": fastest(lambda: to_tensors(blocks, device)) / tokens,
        "cast_seconds_per_token": fastest(lambda: ids.astype(np.int32)) / tokens,
    }
