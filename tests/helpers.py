"""What tests share: real text, tiny settings, real processes, and what a run has written."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import pytest

from recipe.data.standard_library import standard_library_files
from recipe.errors import RecipeError
from recipe.run.ledger import EVENTS, LEDGER
from tests.support.fork_server import ForkedProcess, ForkServer

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
SCRIPT = "recipe/train.py"
FAULTY = "tests/support/faulty_train.py"

AT_START = dict(os.environ)  # importing datasets or inductor adds to it

# A model that trains in seconds; everything else is as in benchmarks/plain.yaml.
TINY = [
    *["--config", str(ROOT / "benchmarks/plain.yaml"), "--run.parity_check", "false", "--precision", "fp32"],
    *["--model.n_layer", "2", "--model.n_embd", "32", "--model.n_head", "2", "--model.vocab_size", "384"],
    *["--data.sequence_length", "64", "--batch.tokens_per_update", "1536", "--batch.lanes", "8"],
    *["--schedule.total_tokens", "61440", "--schedule.warmup_tokens", "7680"],
    *["--data.validation_one_in", "null", "--evaluation.sample_tokens", "8"],
]
# Columns of the ledger that are not the same twice.
TIMES = ("update_seconds", "data_wait_seconds", "tokens_per_second", "peak_memory_bytes", "checkpoint_stall_seconds")


may_start_processes = True  # pytest --quick: False


# ---- Text --------------------------------------------------------------------------------------------------------------


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


# ---- Processes ---------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """This process's environment when it began, without a launcher's variables; one thread for each process, no network."""
    dropped = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_",
        "TORCHELASTIC_",
        "PYTEST_",
    )
    kept = {k: v for k, v in AT_START.items() if not k.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


@cache
def fork_server(**more: str) -> ForkServer:
    """The one of this process and its tests for these variables of the environment."""
    skip_if_quick()
    return ForkServer(environment(**more))


def skip_if_quick() -> None:
    """Skip the test if none may start a process."""
    if not may_start_processes:
        pytest.skip("it starts a process")


# Options before `**more`, which are variables of the environment, are Any: mypy takes a dictionary of strings for all of them.


def start(
    command: Sequence[str], *, cwd: Any = ROOT, fork: Any = True, stdout: Any = PIPE, stderr: Any = PIPE, **more: str
) -> subprocess.Popen[str]:
    """Start a command; its output can be read line by line. `fork`: by this fork server, or by that of all tests, if it can."""
    skip_if_quick()
    options = {"cwd": cwd, "env": environment(**more), "stdout": stdout, "stderr": stderr}
    if fork and (server := fork_server() if fork is True else fork).can_run(command, options["env"]):
        return ForkedProcess(server, command, **options)
    return subprocess.Popen(command, text=True, **options)


def run(
    command: Sequence[str], *, timeout: Any = 240, cwd: Any = ROOT, fork: Any = True, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output as text."""
    with start(command, cwd=cwd, fork=fork, **more) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_and_time(command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """A new process, and the seconds of processor time that it took: the machine may be busy with something else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(command, fork=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(*arguments: str, script: Any = (SCRIPT,), fork: Any = True, **more: str) -> subprocess.CompletedProcess[str]:
    """`python recipe/train.py ...` in one process."""
    return run([sys.executable, *script, *arguments], fork=fork, **more)


def start_training(*arguments: str, script: Any = (SCRIPT,), fork: Any = True, **more: str) -> subprocess.Popen[str]:
    """`train` in the background."""
    return start([sys.executable, *script, *arguments], fork=fork, PYTHONUNBUFFERED="1", **more)


def start_ranks(
    world_size: int, command: Sequence[str], *, fork: Any = True, stdout: Any = PIPE, stderr: Any = STDOUT, **more: str
) -> list[subprocess.Popen[str]]:
    """Start `python command` in `world_size` processes that form a gloo group; rank 0 first.

    LOCAL_WORLD_SIZE of them are on what they take for a host.
    """
    port, processes, of_host = str(free_port()), [], int(more.get("LOCAL_WORLD_SIZE", world_size))
    for rank in range(world_size):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank % of_host), "WORLD_SIZE": str(world_size)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**(group if world_size > 1 else {}), **more}
        processes.append(start([sys.executable, *command], fork=fork, stdout=stdout, stderr=stderr, **variables))
    return processes


def end_of(processes: Sequence[subprocess.Popen[str]], timeout: float = 240) -> tuple[list[int], str, str]:
    """(exit codes, all on stdout, all on stderr) of processes that end by themselves."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    output, errors = ("".join(texts) for texts in zip(*[(out, err or "") for out, err in outputs], strict=True))
    return [process.returncode for process in processes], output, errors


def run_ranks(world_size: int, command: Sequence[str], *, fork: Any = True, **more: str) -> str:
    """Run `python command` in `world_size` processes to their end; all of them have to succeed. Returns their output."""
    codes, output, _ = end_of(start_ranks(world_size, command, fork=fork, **more))
    assert codes == [0] * world_size, output
    return output


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read its output up to a line with these words."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"{words!r} was never printed: {process.communicate()}")


def launch_file_for_a_cpu(name: str, directory: Path) -> Path:
    """One of accelerate_configs for several GPUs, with two ranks on a CPU for the eight GPUs of a machine."""
    file = (ROOT / f"accelerate_configs/{name}.yaml").read_text("utf-8")
    changes = {
        "use_cpu: false\ngpu_ids: all": "use_cpu: true",
        "processes: 8": "processes: 2",
        "processes: 16": "processes: 4",
        "shard_size: 8": "shard_size: 2",
    }
    for old, new in changes.items():
        file = file.replace(old, new)
    path = directory / f"{name}.yaml"
    path.write_text(file, encoding="utf-8")
    return path


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def assert_one_line(done: subprocess.CompletedProcess[str], words: Sequence[str]) -> None:
    """A user's mistake: exit code 2, one line with these words, and no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in done.stderr + done.stdout


# ---- What a run has written --------------------------------------------------------------------------------------------


def read_ledger(run_directory: Path) -> list[dict[str, Any]]:
    """The updates of a run, from 1 on."""
    return [line for line in _lines_of(run_directory / LEDGER) if line["update"] > 0]


def read_events(run_directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of a run, or those of one kind."""
    return [line for line in _lines_of(run_directory / EVENTS) if kind in (None, line["event"])]


def _lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensors_of(run_directory: Path) -> dict[str, Any]:
    """Weights and optimizer state of a run's last checkpoint."""
    from safetensors.torch import load_file

    from recipe.run.directory import list_checkpoints

    checkpoint = list_checkpoints(run_directory / "checkpoints")[0]
    files = [checkpoint / "model.safetensors", *(checkpoint / "training").glob("*.safetensors")]
    assert len(files) == 2
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def tiny_run(directory: Path, *more: str) -> list[str]:
    """Arguments of a tiny run in `directory`, of the texts beside it (`write_texts`)."""
    texts = ["--data.text_files", f"{directory.parent}/texts/*.txt"]
    cache = ["--data.cache_directory", str(directory.parent / "cache")]
    return [*TINY, "--run.directory", str(directory), *texts, *cache, *more]


def assert_same_updates(found: Path, expected: Path, losses_within: float) -> None:
    """The ledgers of two runs have the same blocks, and losses within a relative difference."""
    of_found, of_expected = read_ledger(found), read_ledger(expected)
    assert [line["blocks_sha256"] for line in of_found] == [line["blocks_sha256"] for line in of_expected]
    losses = [line["loss"] for line in of_expected]
    assert [line["loss"] for line in of_found] == pytest.approx(losses, rel=losses_within)


def assert_same_run(whole: Path, other: Path) -> None:
    """Bit for bit: the ledger except times, weights, optimizer state, the finished model, and what the summary says of it."""

    def timeless(directory: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k not in TIMES} for line in _lines_of(directory / LEDGER)]

    assert timeless(other) == timeless(whole)
    tensors, others = tensors_of(whole), tensors_of(other)
    assert set(others) == set(tensors)
    assert len(tensors) > 60
    for name, tensor in tensors.items():
        assert others[name].equal(tensor), name
    assert (other / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    summary, expected = (json.loads((directory / "summary.json").read_text("utf-8")) for directory in (other, whole))
    for name in ("validation", "parity_check"):
        assert summary[name] == expected[name]


def expect_error(words: Sequence[str], action: Callable[[], object]) -> None:
    with pytest.raises(RecipeError) as caught:
        action()
    for word in words:
        assert word in str(caught.value)
