"""A real two-rank run, killed at random moments, damaged and started again until it is done; nothing may be lost.

`python -m tests.chaos --runs 30 --seed 1` prints what happened and compares the result with a run that nothing happened to:
weights and optimizer state bit for bit, and the ledger except times.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from recipe.checkpoint.files import why_invalid
from recipe.run.directory import list_checkpoints
from recipe.run.ledger import read_lines
from tests.helpers import FAULTY, SCRIPT, TINY, assert_same_run, start_ranks, write_texts

RANKS = 2
UPDATES_BETWEEN = 20  # interruptions, at most
UPDATES_PER_INTERRUPTION = 2 * UPDATES_BETWEEN  # so that the run is not over before the last of them
SMALL_DISK_BYTES = 20_000


def arguments(directory: Path, updates: int) -> list[str]:
    """A tiny run of `updates` updates with a checkpoint every 5."""
    return [
        *TINY,
        *["--run.directory", str(directory), "--data.text_files", f"{directory.parent}/texts/*.txt"],
        *["--data.cache_directory", str(directory.parent / "cache"), "--model.dropout", "0.1"],
        *["--schedule.total_tokens", str(updates * 1536), "--checkpoint.every_tokens", str(5 * 1536)],
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 60) -> list[int]:
    """Wait for all ranks; one that is left alone by a killed one ends by itself."""
    for process in processes:
        process.communicate(timeout=timeout)
    return [process.returncode for process in processes]


def interrupt(processes: list[subprocess.Popen[str]], ledger: Path, chance: random.Random) -> str:
    """Let the run do some updates, then kill all ranks or one, ask it to stop, or fill the disk."""
    lines = processes[0].stdout
    assert lines is not None
    for line in lines:
        if line.startswith("update"):
            break
    how = chance.choice(
        [*["SIGKILL to all"] * 3, "SIGKILL to rank 1", "SIGTERM to all", "SIGTERM to rank 0", "disk full"]
    )
    if how == "disk full":  # for files of more bytes than this, which the checkpoint's are; ends in SIGKILL
        resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (SMALL_DISK_BYTES, SMALL_DISK_BYTES))
        how = "SIGKILL to all, disk full"
    enough = ledger.read_bytes().count(b"\n") + chance.randrange(UPDATES_BETWEEN)
    while ledger.read_bytes().count(b"\n") < enough and processes[0].poll() is None:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.1))
    number = signal.SIGKILL if "KILL" in how else signal.SIGTERM
    targets = {"all": processes, "rank 0": processes[:1], "rank 1": processes[1:]}[how.split(" to ")[1].split(",")[0]]
    for process in targets:
        if process.poll() is None:
            process.send_signal(number)
    return how


def damage(directory: Path, chance: random.Random) -> str:
    """Now and then spoil the newest checkpoint, if there is an older one that is whole."""
    whole = [path for path in list_checkpoints(directory / "checkpoints") if why_invalid(path) is None]
    if len(whole) < 2 or chance.random() < 0.6:
        return "nothing damaged"
    path = whole[0] / "model.safetensors"
    if chance.random() < 0.5:
        os.truncate(path, chance.randrange(path.stat().st_size))
        return "newest checkpoint truncated"
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return "a bit of the newest checkpoint flipped"


def chaos(interruptions: int, seed: int, root: Path) -> Counter[str]:
    """Interrupt a run that many times, then let it finish. Returns how often each thing happened.

    Raises:
        AssertionError: something was lost.
    """
    chance, happened = random.Random(seed), Counter[str]()
    updates = UPDATES_PER_INTERRUPTION * (interruptions + 1)
    write_texts(root / "texts", count=16, largest=1200)
    whole = start_ranks(RANKS, [SCRIPT, *arguments(root / "whole", updates)], fork=False)
    assert finish(whole, timeout=600) == [0] * RANKS
    ledger = root / "chaos/ledger.jsonl"
    command = [FAULTY, "slow_checkpoint_writer", *arguments(root / "chaos", updates)]
    for number in range(interruptions):
        processes = start_ranks(RANKS, command, fork=False, PYTHONUNBUFFERED="1")
        how = interrupt(processes, ledger, chance)
        codes = finish(processes)
        assert codes[0] != 0, "the run was over before all interruptions: raise UPDATES_PER_INTERRUPTION"
        half_written = len(list((root / "chaos/checkpoints").glob(".tmp-*")))
        happened.update([how, damage(root / "chaos", chance)])
        happened["killed while a checkpoint was being written"] += half_written > 0
        done = [line["update"] for line in read_lines(ledger)]
        print(f"{number + 1:>3} {how:<25} exit {codes}, {done[-1] if done else 0} of {updates} updates", flush=True)
    last = start_ranks(RANKS, command, fork=False)
    assert finish(last, timeout=600) == [0] * RANKS
    assert_same_run(root / "whole", root / "chaos")
    return happened


def main() -> None:
    """The long version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="interruptions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        happened = chaos(options.runs, options.seed, Path(directory).resolve())
    for what, count in sorted(happened.items()):
        print(f"{count:>4}  {what}")
    print("nothing was lost: weights, optimizer state and ledger are those of the uninterrupted run, bit for bit")


if __name__ == "__main__":
    main()
