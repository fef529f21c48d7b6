"""Two hosts, which are network namespaces: the same run as on one rank, and nobody waits for a host that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import (
    FAULTY,
    SCRIPT,
    assert_same_updates,
    end_of,
    launch_file_for_a_cpu,
    read_events,
    read_ledger,
    run_ranks,
    start_ranks,
    tiny_run,
    train,
    wait_for,
    write_texts,
)
from tests.support.two_hosts import TwoHosts, two_hosts

pytestmark = pytest.mark.slow


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hosts")
    write_texts(directory / "texts")
    return directory


def arguments(directory: Path, *more: str) -> list[str]:
    return tiny_run(directory, "--run.max_updates", "20", *more)


@pytest.fixture(scope="module")
def one_rank(texts: Path) -> Path:
    done = train(*arguments(texts / "one"))
    assert done.returncode == 0, done.stderr
    return texts / "one"


@pytest.mark.parametrize("launch", ["none", "hybrid", "multi_node", "hsdp_2x8"])
def test_two_hosts_do_the_updates_of_one_rank(hosts: TwoHosts, texts: Path, one_rank: Path, launch: str) -> None:
    """By torchrun with this sharding, or by accelerate with this launch file."""
    directory = texts / f"two-{launch}"
    command = [SCRIPT, *arguments(directory, "--batch.micro_batch_size", "3")]
    if launch in ("none", "hybrid"):
        processes = [hosts.torchrun(host, *command, "--performance.sharding", launch) for host in (0, 1)]
    else:
        file = launch_file_for_a_cpu(launch, texts)
        processes = [hosts.accelerate(host, file, *command) for host in (0, 1)]
    codes, output, _ = end_of(processes)
    assert codes == [0, 0], output
    found, (start,) = read_ledger(directory), read_events(directory, "start")
    assert [(host["host"], host["ranks"]) for host in start["hosts"]] == [("host0", 2), ("host1", 2)]
    assert [line["world_size"] for line in found] == [4] * 20
    assert_same_updates(directory, one_rank, 1e-5)


def test_a_host_that_never_comes_is_missed(hosts: TwoHosts, texts: Path) -> None:
    codes, output, _ = end_of(
        hosts.ranks(0, SCRIPT, *arguments(texts / "alone", "--run.meet_seconds", "8")), timeout=60
    )
    assert codes == [1, 1], output
    assert "error: after 8 s 2 of 4 ranks are missing (2, 3): start the same command on every machine" in output
    assert "Traceback" not in output


def test_a_rank_that_never_comes_is_named(texts: Path) -> None:
    """The others have all been there."""
    command = [SCRIPT, *arguments(texts / "three", "--run.meet_seconds", "8")]
    processes = start_ranks(3, command, fork=False)
    processes[1].kill()
    codes, output, _ = end_of(processes, timeout=120)
    assert (codes[0], codes[2]) == (1, 1), output
    assert "error: after 8 s 1 of 3 ranks are missing (1): " in output
    assert "Traceback" not in output


def test_an_interface_that_is_not_there_ends_all_ranks(hosts: TwoHosts, texts: Path) -> None:
    command = [SCRIPT, *arguments(texts / "interface")]
    processes = hosts.ranks(0, *command) + hosts.ranks(1, *command, GLOO_SOCKET_IFNAME="nowhere0")
    codes, output, _ = end_of(processes, timeout=60)
    assert 0 not in codes, output
    assert "set GLOO_SOCKET_IFNAME to their network's interface" in output
    assert "another rank cannot start; its message says why" in output
    assert "Traceback" not in output


def test_a_pulled_cable_ends_both_hosts_and_the_run_goes_on_on_one(
    hosts: TwoHosts, texts: Path, one_rank: Path
) -> None:
    directory = texts / "cable"
    command = [FAULTY, "impatient_with_other_hosts", *arguments(directory, "--checkpoint.every_tokens", "7680")]
    many = ["--run.max_updates", "100000", "--schedule.total_tokens", "61440000"]
    slow = {"PYTHONUNBUFFERED": "1"}
    processes = hosts.ranks(0, *command, *many, **slow) + hosts.ranks(1, *command, *many, **slow)
    wait_for(processes[0], "step-000015")
    hosts.pull_the_cable()
    codes, output, _ = end_of(processes, timeout=120)
    assert 0 not in codes, output
    assert "no word from host host1 for 6 s; the same command goes on from the last checkpoint" in output
    assert "no word from rank 0's host for 6 s" in output
    run_ranks(1, [SCRIPT, *command[2:], *many, "--run.max_updates", "30"])
    found = read_ledger(directory)
    assert len(found) == 30
    before = read_ledger(one_rank)
    assert [line["blocks_sha256"] for line in found[:20]] == [line["blocks_sha256"] for line in before]
