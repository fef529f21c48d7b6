"""A real run, killed, stopped and damaged at random moments and started again until it is done; nothing may be lost.

`python -m tests.chaos --runs 30 --seed 1` prints what happened and compares the result with a run that nothing happened to:
weights and optimizer state bit for bit, and the ledger except times. A night's work: `--runs 1000 --only SIGKILL`.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from subprocess import STDOUT

from recipe.checkpoint.verify import why_invalid
from recipe.run.directory import list_checkpoints
from recipe.run.ledger import read_lines
from tests.helpers import FAULTY, SCRIPT, TINY, assert_same_run, start, start_ranks, write_texts

RANKS = 2
UPDATES_BETWEEN = 20  # interruptions, at most
UPDATES_PER_INTERRUPTION = 25  # at least; so that the run is not over before the last of them
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
    """Wait for all ranks, also those that a launcher leaves behind; one that is left alone by a killed one ends by itself."""
    for process in processes:
        process.communicate(timeout=timeout)
    return [process.returncode for process in processes]


# What is done to ranks that the test has started itself, and to the first process of ./run.sh.
HOWS = (
    *["SIGKILL to all"] * 3,
    *("SIGKILL to rank 1", "SIGTERM to all", "SIGTERM to rank 0", "SIGKILL to all, disk full"),
    *("SIGTERM to all, nobody reads", "SIGKILL to all, tracker's disk full"),
    *("SIGTERM to run.sh", "SIGHUP to run.sh", "SIGUSR1 to run.sh", "SIGINT to run.sh", "SIGKILL to run.sh"),
)


def begin(how: str, given: list[str]) -> list[subprocess.Popen[str]]:
    """Start or resume the run, as what will happen to it needs it."""
    if "run.sh" in how:
        preset, *more = given[given.index("--config") + 1 :]
        return [start(["bash", "run.sh", preset, *more], stderr=STDOUT, TOPOLOGY="cpu_2", PYTHONUNBUFFERED="1")]
    if "tracker" in how:
        given = [*given, "--log.trackers", "tensorboard"]
    fault = "full_disk_under_tensorboard" if "tracker" in how else "slow_checkpoint_writer"
    return start_ranks(RANKS, [FAULTY, fault, *given], fork=False, PYTHONUNBUFFERED="1")


def interrupt(processes: list[subprocess.Popen[str]], how: str, ledger: Path, chance: random.Random) -> None:
    """Let the run do some updates, then do to it what `how` says."""
    lines = processes[0].stdout
    assert lines is not None
    for line in lines:
        if line.startswith("update"):
            break
    if "nobody reads" in how:
        for process in processes:
            assert process.stdout is not None
            process.stdout.close()
    if how.endswith(", disk full"):  # for files of more bytes than this, which the checkpoint's are
        resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (SMALL_DISK_BYTES, SMALL_DISK_BYTES))
    enough = ledger.read_bytes().count(b"\n") + chance.randrange(UPDATES_BETWEEN)
    while ledger.read_bytes().count(b"\n") < enough and processes[0].poll() is None:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.1))
    name, whom = how.split(",")[0].split(" to ")
    targets = {"rank 0": processes[:1], "rank 1": processes[1:]}.get(whom, processes)
    for process in targets:
        if process.poll() is None:
            process.send_signal(getattr(signal, name))


def move_checkpoints(directory: Path, elsewhere: Path, chance: random.Random) -> str:
    """Now and then put them on another disk, behind a link, or bring them back."""
    checkpoints = directory / "checkpoints"
    if chance.random() < 0.8 or not checkpoints.exists():
        return "checkpoints left in place"
    if checkpoints.is_symlink():
        checkpoints.unlink()
        shutil.move(elsewhere, checkpoints)
        return "checkpoints brought back"
    shutil.move(checkpoints, elsewhere)
    checkpoints.symlink_to(elsewhere)
    return "checkpoints moved behind a link"


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


def chaos(interruptions: int, seed: int, root: Path, elsewhere: Path, hows: Sequence[str] = HOWS) -> Counter[str]:
    """Interrupt a run that many times in one of these ways, then let it finish. Returns how often each thing happened.

    `elsewhere` is where its checkpoints move now and then, best on another disk.

    Raises:
        AssertionError: something was lost.
    """
    chance, happened = random.Random(seed), Counter[str]()
    updates = UPDATES_PER_INTERRUPTION * (interruptions + 1)
    write_texts(root / "texts", count=16, largest=1200)
    whole = start_ranks(RANKS, [SCRIPT, *arguments(root / "whole", updates)], fork=False)
    assert finish(whole, timeout=600) == [0] * RANKS
    ledger, given = root / "chaos/ledger.jsonl", arguments(root / "chaos", updates)
    for number in range(interruptions):
        how = chance.choice(hows)
        processes = begin(how, given)
        interrupt(processes, how, ledger, chance)
        codes = finish(processes)
        assert codes[0] != 0, "the run was over before all interruptions: raise UPDATES_PER_INTERRUPTION"
        half_written = len(list((root / "chaos/checkpoints").glob(".tmp-*")))
        happened.update([how, damage(root / "chaos", chance), move_checkpoints(root / "chaos", elsewhere, chance)])
        happened["killed while a checkpoint was being written"] += half_written > 0
        done = [line["update"] for line in read_lines(ledger)]
        print(f"{number + 1:>4} {how:<35} exit {codes}, {done[-1] if done else 0} of {updates} updates", flush=True)
    command = [FAULTY, "slow_checkpoint_writer", *given]
    last = start_ranks(RANKS, command, fork=False)
    assert finish(last, timeout=600) == [0] * RANKS
    assert_same_run(root / "whole", root / "chaos")
    return happened


def main() -> None:
    """The long version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="interruptions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="interruptions with these words alone, such as SIGKILL")
    options = parser.parse_args()
    other_disk = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=".") as directory, tempfile.TemporaryDirectory(dir=other_disk) as elsewhere:
        root, moved = Path(directory).resolve(), Path(elsewhere, "checkpoints")
        happened = chaos(options.runs, options.seed, root, moved, [how for how in HOWS if options.only in how])
    for what, count in sorted(happened.items()):
        print(f"{count:>4}  {what}")
    print("nothing was lost: weights, optimizer state and ledger are those of the uninterrupted run, bit for bit")


if __name__ == "__main__":
    main()
