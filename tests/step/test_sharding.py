"""FSDP2: the same update as one big batch, runs that move between DDP, FSDP2 and one rank, and no rank that waits for ever."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoint.verify import why_invalid
from recipe.config.command_line import load_config
from recipe.run.directory import list_checkpoints
from tests.helpers import (
    FAULTY,
    SCRIPT,
    assert_same_updates,
    end_of,
    expect_error,
    read_events,
    read_ledger,
    run_ranks,
    start_ranks,
    tiny_run,
    train,
    wait_for,
    write_texts,
)

FULL, HYBRID = ["--performance.sharding", "full"], ["--performance.sharding", "hybrid"]
BOUND = {"torch.float64": 1e-12, "torch.float32": 1e-6}
TWO_HOSTS = {"LOCAL_WORLD_SIZE": "2"}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "sharding"), [(2, "full"), (3, "full"), (4, "full"), (4, "hybrid")])
def test_gradient_equals_one_big_batch(world_size: int, sharding: str, tmp_path: Path) -> None:
    result = tmp_path / "differences.json"
    hosts = TWO_HOSTS if sharding == "hybrid" else {}
    run_ranks(world_size, ["-m", "tests.support.gradients", str(result), sharding], **hosts)
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found.pop("world_size") == world_size
    for case, by_way in found.items():
        assert len(by_way) == 48
        for way, difference in by_way.items():
            assert difference < BOUND[case.split(",")[0]], f"{case}, {way}: {difference}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    write_texts(directory / "texts")
    return directory


def arguments(directory: Path, *more: str) -> list[str]:
    return tiny_run(directory, "--run.max_updates", "20", "--batch.micro_batch_size", "3", *more)


def held_out_losses(ledger: Sequence[dict[str, Any]]) -> dict[int, float]:
    """By update, where there is one."""
    found = {line["update"]: line["validation/held_out/loss"] for line in ledger}
    return {update: loss for update, loss in found.items() if loss is not None}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_moves_between_fsdp_ddp_and_one_rank(texts: Path, optimizer: str) -> None:
    whole, moved = texts / f"whole-{optimizer}", texts / f"moved-{optimizer}"
    same = ["--optimizer.name", optimizer, "--data.validation_one_in", "12", "--evaluation.every_tokens", "3072"]
    done = train(*arguments(whole, *same))
    assert done.returncode == 0, done.stderr
    legs: list[tuple[int, int, Sequence[str]]] = [
        (4, 5, HYBRID),
        (4, 10, FULL),
        (2, 14, []),
        (1, 17, []),
        (3, 20, [*FULL, "--batch.micro_batch_size", "2", "--performance.activation_checkpointing", "1"]),
    ]
    for ranks, updates, more in legs:
        hosts = TWO_HOSTS if more is HYBRID else {}
        run_ranks(ranks, [SCRIPT, *arguments(moved, *same, "--run.max_updates", str(updates), *more)], **hosts)
    found, expected = read_ledger(moved), read_ledger(whole)
    assert [line["world_size"] for line in found] == [4] * 10 + [2] * 4 + [1] * 3 + [3] * 3
    assert_same_updates(moved, whole, 1e-5)
    of_moved, of_whole = held_out_losses(found), held_out_losses(expected)
    assert len(of_whole) == 10
    assert [of_moved[update] for update in of_whole] == pytest.approx([*of_whole.values()], rel=1e-5)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(texts: Path, rank: int) -> None:
    directory = texts / f"signal-{rank}"
    processes = start_ranks(
        2, [SCRIPT, *arguments(directory, *FULL, "--run.max_updates", "100000")], PYTHONUNBUFFERED="1"
    )
    wait_for(processes[0], "update      3/")
    processes[rank].send_signal(signal.SIGTERM)
    codes, output, _ = end_of(processes, timeout=60)
    assert codes == [143, 143], output
    done = len(read_ledger(directory))
    run_ranks(2, [SCRIPT, *arguments(directory, *FULL, "--run.max_updates", str(done + 2))])
    plain = texts / f"plain-{rank}"
    run_ranks(1, [SCRIPT, *arguments(plain, "--run.max_updates", str(done + 2))])
    assert_same_updates(directory, plain, 1e-4)


@pytest.mark.parametrize(("setting", "value"), [("optimizer.name", "muon"), ("optimizer.state", "bf16")])
def test_what_needs_whole_matrices_is_refused(setting: str, value: str) -> None:
    given = [*FULL, f"--{setting}", value, "--precision", "bf16", "--data.dataset", "python-standard-library"]
    expect_error([value, "whole matrices", "performance.sharding = full"], lambda: load_config(given))


@pytest.mark.slow
def test_a_micro_batch_that_the_plan_chooses_is_taken_without_a_trial(texts: Path) -> None:
    few = ["--run.max_updates", "3"]
    run_ranks(2, [SCRIPT, *arguments(texts / "auto", *FULL, "--batch.micro_batch_size", "auto", *few)])
    run_ranks(1, [SCRIPT, *arguments(texts / "auto-plain", *few)])
    assert_same_updates(texts / "auto", texts / "auto-plain", 1e-5)
    assert read_ledger(texts / "auto")[0]["gradient_accumulation_steps"] == 1, "all of a rank's twelve blocks fit"


@pytest.mark.slow
def test_a_signal_in_an_evaluation_on_one_rank_leaves_none_waiting(texts: Path) -> None:
    directory = texts / "evaluation"
    more = [*FULL, "--data.validation_one_in", "12", "--evaluation.every_tokens", "4608"]
    command = [FAULTY, "signal_in_an_evaluation", *arguments(directory, *more)]
    codes, output, _ = end_of(start_ranks(2, command, FAULTY_EVALUATION="3"), timeout=60)
    assert codes == [143, 143], output


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_ends_the_ranks_and_the_next_start_takes_smaller_micro_batches(texts: Path, where: str) -> None:
    directory = texts / f"memory-{where}"
    command = arguments(directory, *FULL, "--checkpoint.every_tokens", "7680")
    small = {"FAULTY_ROWS": "2", "FAULTY_PASS": where, "FAULTY_FROM": "8"}
    codes, output, _ = end_of(start_ranks(2, [FAULTY, "small_memory", *command], **small), timeout=60)
    assert codes[1] == 5, output
    assert codes[0] != 0
    (line,) = [line for line in output.splitlines() if "ran out of memory" in line]
    assert line.startswith("error (rank 1): ")
    assert "micro-batches of 3 blocks" in line
    assert "goes on from the last checkpoint with 1" in line
    assert "Traceback" not in output
    output = run_ranks(2, [FAULTY, "small_memory", *command], **small)
    assert "micro-batches of 1 blocks: an earlier start ran out of memory with larger ones" in output
    plain = texts / f"memory-plain-{where}"
    run_ranks(1, [SCRIPT, *arguments(plain)])
    assert [line["micro_batch_size"] for line in read_ledger(directory)] == [3] * 5 + [1] * 15
    assert_same_updates(directory, plain, 1e-4)


@pytest.mark.slow
def test_a_full_disk_under_one_rank_costs_a_checkpoint_and_not_the_run(texts: Path) -> None:
    directory = texts / "full"
    command = arguments(directory, *FULL, "--checkpoint.every_tokens", "7680")
    processes = start_ranks(2, [SCRIPT, *command], stderr=subprocess.PIPE)
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    codes, output, errors = end_of(processes, timeout=60)
    assert len(read_ledger(directory)) == 20, output + errors
    assert codes == [2, 0], output + errors
    assert "could not be written" in errors
    assert "rank 1: " in errors
    assert "File too large" in errors
    assert list((directory / "checkpoints").iterdir()) == []
    assert {event["update"] for event in read_events(directory, "checkpoint_failed")} == {5, 10, 15, 20}
    assert "the last checkpoint" not in run_ranks(2, [SCRIPT, *command])
    assert len(list_checkpoints(directory / "checkpoints")) > 1


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_whole_checkpoints_and_no_rank_behind(texts: Path) -> None:
    directory = texts / "killed"
    command = arguments(directory, *FULL, "--checkpoint.every_tokens", "1536")
    processes = start_ranks(2, [FAULTY, "slow_checkpoint_writer", *command], PYTHONUNBUFFERED="1")
    wait_for(processes[0], "update      9/")
    processes[1].kill()
    codes, output, _ = end_of(processes, timeout=60)
    assert codes[0] == 1, output
    assert "another rank has ended" in output
    assert all(why_invalid(path) is None for path in list_checkpoints(directory / "checkpoints"))
    run_ranks(3, [SCRIPT, *command])
    plain = texts / "killed-plain"
    run_ranks(1, [SCRIPT, *arguments(plain)])
    assert_same_updates(directory, plain, 1e-4)
