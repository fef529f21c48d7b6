"""Lanes read updates in a process of its own, whose memory is watched: both ends.

The process is `python -m benchmarks.reading READING`, as JSON; it answers with one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipe.errors import run_command


@dataclass(frozen=True)
class Reading:
    """What to read.

    Args:
        settings: that differ from the defaults, `{"data.text_files": [...]}`.
        updates: how many.
        lanes: that are read, of those in the settings. None: all.
        counts_documents: each document is one token and an end-of-text token, so that reading alone takes time.
    """

    settings: Mapping[str, Any]
    updates: int
    lanes: int | None = None
    counts_documents: bool = False


@dataclass(frozen=True)
class Limits:
    """At which a process is killed."""

    resident_bytes: float = math.inf
    seconds: float = math.inf


def start(settings: Mapping[str, Any]) -> Any:
    """A run in fp32 with these settings, the others at their defaults."""
    from benchmarks.training import start_quietly, with_settings
    from recipe.config.settings import Config

    return start_quietly(with_settings(Config(), {**settings, "precision": "fp32"}))


def open_lanes(run: Any, counts_documents: bool = False) -> list[Any]:
    """The lanes of a run, with the text open; `counts_documents` as in `Reading`."""
    from benchmarks.training import any_tokenizer
    from recipe.data.blocks import make_lanes
    from recipe.data.sources import open_source
    from recipe.data.tokenizer import load_tokenizer

    sources = [open_source(run.config)]
    return make_lanes(run, sources, any_tokenizer(2) if counts_documents else load_tokenizer(run.config, sources))


def read_updates(reading: Reading) -> dict[str, Any]:
    """Open, tokenize and pack `reading` in this process: time and resident set after each update, what is in the cache."""
    from recipe.data.blocks import next_update

    run = start(reading.settings)
    base, began, processor = resident_bytes(), time.perf_counter(), time.process_time()
    seconds, resident, digest = [], [], hashlib.sha256()
    lanes = open_lanes(run, reading.counts_documents)[: reading.lanes]
    for _ in range(reading.updates):
        blocks = next_update(lanes, run.plan.update.blocks_per_lane, run.device).blocks
        seconds.append(time.perf_counter() - began)
        resident.append(resident_bytes())
        digest.update(blocks.astype("<i4").tobytes())
    files = [path for path in run.config.cache_directory.rglob("*") if path.is_file()]
    return {
        "tokens_of_an_update": blocks.shape[0] * (blocks.shape[1] - 1),
        "seconds": seconds,  # from before the text was opened
        "processor_seconds": time.process_time() - processor,
        "base_bytes": base,
        "resident_bytes": resident,
        "peak_bytes": peak_memory_bytes(),
        "blocks_sha256": digest.hexdigest(),  # of all blocks, in their order
        "cache_bytes": sum(path.stat().st_size for path in files),
    }


def read_in_a_process(reading: Reading, limits: Limits, **environment: str) -> dict[str, Any]:
    """`read_updates` in a new process. What is refused or killed has `refused` instead, and the peak until then."""
    variables = {**os.environ, **environment}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "benchmarks.reading", json.dumps(asdict(reading))]
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=errors, text=True)
        (peak_bytes,), killed = watch([process], limits)
        output.seek(0)
        errors.seek(0)
        lines, reasons = output.read().splitlines(), errors.read().strip().splitlines()
    if process.returncode or killed:
        return {"refused": killed or (reasons or ["no word"])[-1], "peak_bytes": peak_bytes}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def watch(
    processes: Sequence[subprocess.Popen[str]], limits: Limits, is_enough: Callable[[], bool] = lambda: False
) -> tuple[list[int], str]:
    """Wait until processes have ended, or it is enough, or one fails or is over a limit: then all are killed.

    Returns:
        The peak of the resident set of each, and over which limit one was, or an empty text.
    """
    peaks, began, killed = [0] * len(processes), time.monotonic(), ""
    try:
        while None in (codes := [process.poll() for process in processes]) and not killed:
            now = [peak_memory_bytes(process.pid) for process in processes]
            peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
            if max(peaks) > limits.resident_bytes:
                killed = f"killed above {limits.resident_bytes / 1e9:g} GB after {time.monotonic() - began:.0f} s"
            elif time.monotonic() - began > limits.seconds:
                killed = f"killed after {limits.seconds:.0f} s"
            elif any(codes) or is_enough():
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return peaks, killed


def resident_bytes(pid: int | str = "self", column: str = "VmRSS") -> int:
    """Resident set of a process of Linux; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(rf"^{column}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def peak_memory_bytes(pid: int | str = "self") -> int:
    """Peak of a process's resident set. `ru_maxrss` would count the parent too, from which it was forked."""
    if os.path.exists("/proc/self/status"):
        return resident_bytes(pid, "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    answer = read_updates(Reading(**json.loads(sys.argv[1])))
    print(json.dumps(answer), flush=True)
    os._exit(0)  # a thread may still wait for a network


if __name__ == "__main__":
    run_command(main)
