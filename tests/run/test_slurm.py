"""slurm/train.sbatch on a Slurm of two nodes: a job that meets its time limit, loses a node, or is cancelled loses nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.checkpoint.verify import why_invalid
from recipe.run.directory import list_checkpoints
from tests.helpers import ROOT, SCRIPT, assert_same_run, read_events, read_ledger, run_ranks, tiny_run, write_texts
from tests.support.slurm import Slurm, slurm

pytestmark = pytest.mark.slow
UPDATES = 800


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    root = tmp_path_factory.mktemp("slurm")
    write_texts(root / "texts")
    with slurm(root) as running:
        yield running


@pytest.fixture(scope="module")
def whole(cluster: Slurm) -> Path:
    """A run of as many ranks that nothing happened to."""
    run_ranks(4, [SCRIPT, *arguments(cluster, "whole")], LOCAL_WORLD_SIZE="2")
    return cluster.root / "whole"


def arguments(cluster: Slurm, name: str, updates: int = UPDATES) -> list[str]:
    more = ["--checkpoint.every_tokens", str(1536 * 20), "--evaluation.sample_tokens", "null"]
    return tiny_run(cluster.root / name, "--schedule.total_tokens", str(1536 * updates), *more)


def submit(cluster: Slurm, name: str, *options: str, updates: int = UPDATES) -> str:
    """The script with two CPUs of each node in place of eight GPUs."""
    script = (ROOT / "slurm/train.sbatch").read_text("utf-8").replace("#SBATCH --gpus-per-node=8\n", "")
    copy = cluster.root / f"{name}.sbatch"
    copy.write_text(script, encoding="utf-8")
    small = ["--ntasks-per-node=2", "--cpus-per-task=1", f"--output={cluster.root}/{name}.log", f"--chdir={ROOT}"]
    variables = f"--export=ALL,PYTHON={sys.executable}"
    return cluster.submit(*small, variables, *options, str(copy), *arguments(cluster, name, updates))


def begin_now(cluster: Slurm, job: str) -> bool:
    """Whether the job is in the queue again, and if it is, without the two minutes that Slurm waits."""
    is_back = cluster.state_of(job).get("Restarts") == "1"
    if is_back:
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    return is_back


def ends(cluster: Slurm, job: str) -> bool:
    return cluster.state_of(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def test_a_job_that_meets_its_time_limit_is_the_uninterrupted_run(cluster: Slurm, whole: Path) -> None:
    job, directory = submit(cluster, "limit", "--time=60", "--signal=USR1@240"), cluster.root / "limit"
    cluster.wait((directory / "ledger.jsonl").exists)
    minutes_run = int(cluster.state_of(job)["RunTime"].split(":")[1])
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_run + 4}")  # less than 240 s from now
    log = cluster.root / "limit.log"
    cluster.wait(lambda: begin_now(cluster, job))
    assert "stopped by signal 10; the same command goes on from here" in log.read_text("utf-8")
    assert 0 < len(read_ledger(directory)) < UPDATES
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.wait(lambda: ends(cluster, job))
    assert cluster.state_of(job)["JobState"] == "COMPLETED", log.read_text("utf-8")
    starts = read_events(directory, "start")
    hosts = [{host["host"]: host["ranks"] for host in event["hosts"]} for event in starts]
    assert hosts == [{"host0": 2, "host1": 2}] * 2, "one start before the limit, one behind it"
    assert_same_run(whole, directory)


def test_scancel_saves_what_is_done(cluster: Slurm) -> None:
    job = submit(cluster, "cancelled", "--time=60", updates=50_000)
    directory = cluster.root / "cancelled"
    cluster.wait(lambda: (directory / "checkpoints").exists() and len(list_checkpoints(directory / "checkpoints")) > 0)
    cluster.run("scancel", job)
    cluster.wait(lambda: ends(cluster, job))
    assert cluster.state_of(job)["JobState"] == "CANCELLED"
    newest = list_checkpoints(directory / "checkpoints")[0]
    assert why_invalid(newest) is None
    assert newest.name == f"step-{read_ledger(directory)[-1]['update']:06d}", (
        "the last update, not only a multiple of 20"
    )


def test_a_job_that_loses_a_node_goes_on_from_its_last_checkpoint(cluster: Slurm, whole: Path) -> None:
    job = submit(cluster, "lost", "--time=60")
    directory = cluster.root / "lost"
    cluster.wait(lambda: (directory / "checkpoints").exists() and len(list_checkpoints(directory / "checkpoints")) > 1)
    cluster.kill_node(1)
    cluster.wait(lambda: cluster.state_of(job).get("Restarts") == "1")
    cluster.start_node(1)  # and Slurm waits two minutes, until what is left of the job on the other node has ended
    cluster.wait(lambda: ends(cluster, job))
    assert cluster.state_of(job)["JobState"] == "COMPLETED", (cluster.root / "lost.log").read_text("utf-8")
    assert_same_run(whole, directory)
