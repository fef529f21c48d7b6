"""What several test modules need: real text, tiny settings, and real processes."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.data.sources import standard_library_files

ROOT = Path(__file__).resolve().parent.parent

# A model that trains in seconds; everything else is the quickstart's.
TINY = [
    *["--config", str(ROOT / "configs/quickstart.yaml"), "--run.parity_check", "false", "--precision", "fp32"],
    *["--model.n_layer", "2", "--model.n_embd", "32", "--model.n_head", "2", "--model.vocab_size", "384"],
    *["--data.sequence_length", "64", "--batch.tokens_per_update", "1536", "--batch.lanes", "8"],
    *["--schedule.total_tokens", "61440", "--schedule.warmup_tokens", "7680"],
    *["--data.validation_one_in", "null", "--evaluation.sample_tokens", "8"],
]


def write_texts(directory: Path, count: int = 24, largest: int = 6000) -> list[str]:
    """Real text: `count` of the standard library's files as .txt. Returns the documents."""
    directory.mkdir(parents=True, exist_ok=True)
    root, files = standard_library_files()
    chosen = [f for f in files if 500 < (root / f).stat().st_size < largest][:count]
    assert len(chosen) == count
    texts = [(root / f).read_text(encoding="utf-8", errors="replace") for f in chosen]
    for number, text in enumerate(texts):
        (directory / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return texts


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's variables, one thread for each process, no network."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_", "TORCHELASTIC_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


def run(
    command: Sequence[str], *, timeout: float = 240, cwd: Path = ROOT, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output as text."""
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=timeout, check=False
    )


def run_and_time(command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """`run`, and the seconds of processor time that it took: the machine may be busy with something else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(
    *arguments: str, script: Sequence[str] = ("recipe/train.py",), **more: str
) -> subprocess.CompletedProcess[str]:
    """`python recipe/train.py ...` in one process."""
    return run([sys.executable, *script, *arguments], timeout=240, cwd=ROOT, **more)


def start_ranks(
    world_size: int,
    command: Sequence[str],
    stderr: int = subprocess.STDOUT,
    stdout: int = subprocess.PIPE,
    /,
    **more: str,
) -> list[subprocess.Popen[str]]:
    """Start `python command` in `world_size` processes that form a gloo group; rank 0 first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(world_size):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(**(group if world_size > 1 else {}), **more),
                stdout=stdout,
                stderr=stderr,
                text=True,
            )
        )
    return processes


def run_ranks(world_size: int, command: Sequence[str], timeout: float = 240) -> None:
    """Run `python command` in `world_size` processes to their end; all of them have to succeed."""
    processes = start_ranks(world_size, command)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {world_size} ended with {process.returncode}:\n{output}"


def read_ledger(run_directory: Path) -> list[dict[str, Any]]:
    """The entries of a run's ledger, one for each update; events are left out."""
    return [line for line in read_ledger_lines(run_directory) if "event" not in line]


def read_ledger_lines(run_directory: Path) -> list[dict[str, Any]]:
    """Every line of a run's ledger."""
    return [json.loads(line) for line in (run_directory / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
