"""A source prepared by datatrove's executors: the same bytes from any number of tasks, and a task that dies is one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from recipe.commands import prepare as command
from recipe.data.engine import SILENT_SECONDS
from recipe.data.prepare import Wanted, prepare
from recipe.data.prepare_file import UNFINISHED, Preparation
from recipe.data.prepare_task import PrepareFiles, directory_of_tasks
from recipe.data.tokenizer import train_tokenizer
from recipe.errors import RecipeError
from recipe.run.files import sha256_of
from tests.helpers import TINY, run, start, write_texts
from tests.support.lanes import config_for
from tests.support.slurm import Slurm, slurm

INSTALL = "pip install --editable '.[engine]'"
LANES = 8  # as TINY has them
SBATCH = ("partition=main", "time=5", "mem-per-cpu=0")  # its nodes do not say how much memory they have


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, its tokenizer, and what is prepared from it without an engine."""
    directory = tmp_path_factory.mktemp("corpus")
    texts = write_texts(directory / "texts", count=60)
    train_tokenizer(texts, 400).save_pretrained(directory / "tokenizer")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (directory / "little.jsonl").write_text("".join(lines), encoding="utf-8")
    (directory / "much.jsonl").write_text("".join(lines * 24), encoding="utf-8")
    for name in ("little", "much"):
        prepare(wanted(directory, name, directory / f"prepared-{name}"), 2, lambda line: None)
    return directory


def wanted(corpus: Path, name: str, out: Path) -> Wanted:
    settings = {"tokenizer": str(corpus / "tokenizer"), "validation_one_in": 5}
    return Wanted(config_for(out.parent, str(corpus / f"{name}.jsonl"), lanes=LANES, **settings), out, "parquet")


def prepare_command(corpus: Path, out: Path, *more: str, text: str = "much.jsonl") -> list[str]:
    flags = [*TINY, "--data.text_files", f"{corpus}/{text}", "--data.tokenizer", f"{corpus}/tokenizer"]
    flags += ["--data.validation_one_in", "5", "--output", str(out)]
    return [sys.executable, "-m", "recipe", "prepare", *flags, *more]


def assert_same(corpus: Path, out: Path, name: str = "much") -> None:
    """The manifest, and with it the bytes of all files; nothing of the engine is left."""
    whole = corpus / f"prepared-{name}"
    assert sha256_of(out / "manifest.json") == sha256_of(whole / "manifest.json")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for file, about in json.loads((out / "manifest.json").read_text("utf-8"))["files"].items():
        assert sha256_of(out / file) == about["sha256"]


def done_files(out: Path) -> dict[str, int]:
    """inode of each file that is done."""
    notes = [path.stem for path in (out / UNFINISHED).glob("0*.json")]
    return {note: (out / UNFINISHED / f"training-{note}.parquet").stat().st_ino for note in notes}


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What it gives, once that is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def processes_with(*words: str, **variables: str) -> list[psutil.Process]:
    """Those with these words in their command line, and these variables."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line, has = " ".join(process.cmdline()), process.environ()
            if all(word in line for word in words) and variables.items() <= has.items():
                found.append(process)
    return found


# ---- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--executor", "slurm"], ["partition and time", "--sbatch partition=cpu time=4:00:00"]),
        (["--executor", "slurm", "--sbatch", "partition=cpu", "--time=4"], ["time is not a setting"]),
        (["--executor", "slurm", "--sbatch", "partition=cpu", "exclusive"], ["'exclusive' is not NAME=VALUE"]),
        (["--executor", "slurm", "--sbatch", "array=0-3"], ["'array=0-3'", "set already"]),
        (["--executor", "slurm", "--sbatch", "partition=cpu", "time=4:00:00"], ["this machine has no sbatch"]),
        (["--executor", "ray"], ["needs datatrove and ray: pip install --editable '.[engine]'"]),
        (["--executor", "dask"], ["executor", "dask"]),
    ],
)
def test_an_engine_that_cannot_be_used_is_one_line_before_anything_is_read(
    more: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    output = ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["prepare", *TINY, "--data.text_files", f"{tmp_path}/a.txt", *output, *more])
    monkeypatch.setattr("recipe.run.stop.StopRequest.listen", lambda stop: None)  # for signals of this process
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("datatrove", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError) as error:
        command.main()
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_of_an_engine_is_imported_without_one(corpus: Path, tmp_path: Path) -> None:
    for name in ("datatrove", "ray"):
        pytest.importorskip(name, reason=INSTALL)
    script = (
        "import sys; from recipe.commands.prepare import main; main(); print({'datatrove', 'ray'} & {*sys.modules})"
    )
    flags = prepare_command(corpus, tmp_path / "out", "--processes", "2", text="little.jsonl")[4:]
    done = run([sys.executable, "-c", script, *flags])
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr
    assert_same(corpus, tmp_path / "out", "little")


# ---- datatrove ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_tasks_of_a_datatrove_pipeline_write_the_same_files(tasks: int, corpus: Path, tmp_path: Path) -> None:
    local = pytest.importorskip("datatrove.executor", reason=INSTALL).LocalPipelineExecutor

    def in_datatrove(
        preparation: Preparation, numbers: Sequence[int], report: Callable[..., None]
    ) -> Iterator[tuple[int, Any]]:
        directory_of_tasks(preparation).mkdir()
        step = PrepareFiles(preparation, numbers)
        local([step], tasks, logging_dir=str(tmp_path / "logs")).run()
        done = done_files(preparation.directory)
        step(None, 0, tasks)  # as when Slurm begins a task again
        assert done_files(preparation.directory) == done
        return ((number, preparation.result(number)) for number in numbers)

    prepare(wanted(corpus, "little", tmp_path / "out"), 1, lambda line: None, in_datatrove)
    assert_same(corpus, tmp_path / "out", "little")


# ---- Ray ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_variables() -> Iterator[dict[str, str]]:
    """For a Ray whose files are in a directory of this test, and which is gone behind it."""
    for name in ("datatrove", "ray"):
        pytest.importorskip(name, reason=INSTALL)
    with TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # a short path: a socket's has 107 bytes at most
        try:
            yield {"RAY_TMPDIR": directory, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
            wait_until(lambda: not processes_with("ray", RAY_TMPDIR=directory), 60)
        finally:
            for process in processes_with("ray", RAY_TMPDIR=directory):
                process.kill()


@pytest.fixture
def ray_cluster(ray_variables: dict[str, str]) -> Iterator[dict[str, str]]:
    """`ray_variables` of a cluster that is there, and stays."""
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "3"]
    more = ["--port", "0", "--include-dashboard", "false"]
    process = start([*head, *more], fork=False, stderr=subprocess.STDOUT, **ray_variables)
    assert process.stdout is not None
    try:
        address = next(line for line in process.stdout if "--address=" in line).partition("--address=")[2].strip(" '\n")
        yield {**ray_variables, "RAY_ADDRESS": address}
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_files(corpus: Path, tmp_path: Path, ray_cluster: dict[str, str]) -> None:
    for tasks in (1, 2, 3):
        flags = ["--executor", "ray", "--processes", str(tasks)]
        done = run(prepare_command(corpus, tmp_path / f"out{tasks}", *flags, text="little.jsonl"), **ray_cluster)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"tasks on ray: {tasks}, " in done.stdout
        assert_same(corpus, tmp_path / f"out{tasks}", "little")


@pytest.mark.slow
def test_tasks_of_a_ray_cluster_end_with_the_command(corpus: Path, tmp_path: Path, ray_cluster: dict[str, str]) -> None:
    out = tmp_path / "out"
    words = prepare_command(corpus, out, "--executor", "ray", "--processes", "2")
    process = start(words, fork=False, **ray_cluster)
    wait_until(lambda: done_files(out))
    process.kill()
    process.communicate()
    wait_until(lambda: not processes_with("ray::RankWorker", RAY_TMPDIR=ray_cluster["RAY_TMPDIR"]), 30)
    assert_goes_on(corpus, out, lambda: run(words, **ray_cluster))


@pytest.mark.slow
def test_a_task_of_ray_that_is_killed_is_noticed(corpus: Path, tmp_path: Path, ray_variables: dict[str, str]) -> None:
    """Its actor waits for it for ever. Of a cluster that the command has started nothing is left."""
    out = tmp_path / "out"
    flags = prepare_command(corpus, out, "--executor", "ray", "--processes", "2")
    process = start(flags, fork=False, **ray_variables)
    wait_until(lambda: done_files(out))
    task_on_ray(ray_variables).kill()
    killed_at = time.monotonic()
    output, errors = process.communicate(timeout=SILENT_SECONDS + 60)
    assert time.monotonic() - killed_at > SILENT_SECONDS / 2, "it was not the driver that noticed"
    assert process.returncode == 1, output
    (line,) = errors.splitlines()
    assert line.startswith("error: task ")
    assert "was killed, or has ended before its files were done" in line
    assert_goes_on(corpus, out, lambda: run(flags, fork=False, **ray_variables))


@pytest.mark.slow
def test_another_actor_of_ray_takes_the_files_of_one_that_is_killed(
    corpus: Path, tmp_path: Path, ray_variables: dict[str, str]
) -> None:
    out = tmp_path / "out"
    flags = prepare_command(corpus, out, "--executor", "ray", "--processes", "2")
    process = start(flags, fork=False, **ray_variables)
    wait_until(lambda: done_files(out))
    task = task_on_ray(ray_variables)
    task.parent().kill()
    # Ray ends it, which would write the same file as its successor. A zombie has no parent that asks for its exit code.
    wait_until(lambda: not task.is_running() or task.status() == psutil.STATUS_ZOMBIE, 3)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert_same(corpus, out)


def task_on_ray(ray_variables: dict[str, str]) -> Any:
    """The process of a task, whose parent is its actor."""
    actors = processes_with("ray::RankWorker", RAY_TMPDIR=ray_variables["RAY_TMPDIR"])
    return next(process for process in actors if process.parent() in actors)


def assert_goes_on(corpus: Path, out: Path, again: Callable[[], Any]) -> None:
    """The same command keeps what is done, and ends with the same files."""
    kept = done_files(out)
    assert 1 <= len(kept) < 8
    assert not (out / "manifest.json").exists()
    done = again()
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert f"{len(kept)} of 8 files are done already" in done.stdout
    final = {note: (out / f"train-{note}-of-00008.parquet").stat().st_ino for note in kept}
    assert final == kept
    assert_same(corpus, out)


# ---- Slurm -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    pytest.importorskip("datatrove", reason=INSTALL)
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(cluster: Slurm, words: Sequence[str], tasks: int = 2) -> subprocess.Popen[str]:
    """The command on the first node, which is a login node too."""
    flags = ["--executor", "slurm", "--processes", str(tasks), "--sbatch", *SBATCH]
    return cluster.hosts.start(0, [*words, *flags], SLURM_CONF=f"{cluster.root}/slurm.conf")


def end(process: subprocess.Popen[str], seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """What it has printed; both streams are one."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess([], process.returncode, output, "")


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_slurm_cluster_writes_the_same_files(tasks: int, cluster: Slurm, corpus: Path, tmp_path: Path) -> None:
    done = end(submit(cluster, prepare_command(corpus, tmp_path / "out", text="little.jsonl"), tasks))
    assert done.returncode == 0, done.stdout
    assert f"tasks on slurm: {tasks}, " in done.stdout
    assert f"{tasks} running" in done.stdout
    assert "rror" not in done.stdout
    assert_same(corpus, tmp_path / "out", "little")


@pytest.mark.slow
def test_a_task_of_slurm_that_is_killed_is_noticed(cluster: Slurm, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = prepare_command(corpus, out)
    process = submit(cluster, words)
    wait_until(lambda: done_files(out))
    processes_with("launch_pickled_pipeline", str(out), "python")[-1].kill()
    done = end(process, SILENT_SECONDS + 60)
    assert done.returncode == 1, done.stdout
    line = done.stdout.splitlines()[-1]
    assert line.startswith("error: task ")
    assert "was killed, or has ended before its files were done" in line
    assert cluster.run("squeue", "--noheader") == "", "the other task has been cancelled"
    assert (out / UNFINISHED / "tasks").stat().st_mode & 0o777 == 0o700
    assert_goes_on(corpus, out, lambda: end(submit(cluster, words)))


@pytest.mark.slow
def test_a_task_that_slurm_has_queued_again_is_waited_for(cluster: Slurm, corpus: Path, tmp_path: Path) -> None:
    """Longer than one that gives no sign."""
    out = tmp_path / "out"
    process = submit(cluster, prepare_command(corpus, out), 1)
    wait_until(lambda: done_files(out))
    job = cluster.run("squeue", "--noheader", "--format=%A").strip()
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: not processes_with("launch_pickled_pipeline", str(out)))
    time.sleep(SILENT_SECONDS + 5)
    assert process.poll() is None
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    done = end(process)
    assert done.returncode == 0, done.stdout
    assert "1 pending" in done.stdout
    assert_same(corpus, out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_slurms_jobs_end_with_the_command(number: signal.Signals, cluster: Slurm, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = prepare_command(corpus, out)
    process = submit(cluster, words)
    wait_until(lambda: done_files(out))
    (ours,) = [
        found
        for found in processes_with("recipe prepare", str(out))
        if "multiprocessing" not in " ".join(found.cmdline())
    ]
    ours.send_signal(number)
    done = end(process, 20)
    if number == signal.SIGINT:
        assert done.returncode == 128 + number
        assert done.stdout.splitlines()[-1] == (
            "stopped by signal 2 before all was prepared, and ends its tasks; the same command goes on from here"
        )
    cluster.wait(lambda: cluster.run("squeue", "--noheader") == "", 60)
    assert_goes_on(corpus, out, lambda: end(submit(cluster, words)))


@pytest.mark.slow
def test_what_a_task_cannot_read_is_the_line_that_it_is_without_an_engine(
    cluster: Slurm, corpus: Path, tmp_path: Path
) -> None:
    lines = (corpus / "little.jsonl").read_text("utf-8").splitlines(keepends=True)
    (corpus / "bad.jsonl").write_text("".join([*lines, '{"text": 5}\n']), encoding="utf-8")
    words = prepare_command(corpus, tmp_path / "out", text="bad.jsonl")
    here, there = run(words), end(submit(cluster, words))
    assert here.returncode == there.returncode == 2, there.stdout
    assert there.stdout.splitlines()[-1] == here.stderr.strip()


@pytest.mark.slow
def test_a_job_that_slurm_does_not_take_is_one_line(cluster: Slurm, corpus: Path, tmp_path: Path) -> None:
    words = prepare_command(corpus, tmp_path / "out", text="little.jsonl")
    flags = ["--executor", "slurm", "--sbatch", "partition=nowhere", "time=5"]
    done = end(cluster.hosts.start(0, [*words, *flags], SLURM_CONF=f"{cluster.root}/slurm.conf"))
    assert done.returncode == 1
    assert "error: Slurm takes no tasks: sbatch: error: invalid partition specified: nowhere" in done.stdout
