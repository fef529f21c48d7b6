"""Updates that go wrong: a rank out of memory, and spikes of the loss."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from itertools import islice
from pathlib import Path

import pytest
import yaml

from recipe.checkpoint.resume import find_resume_point
from recipe.config.command_line import load_config
from recipe.config.settings import Config, StabilityConfig
from recipe.data.lanes import merge_ranges, number_of
from recipe.errors import RecipeError
from recipe.step.spikes import SpikeDetector, robust_score
from tests.helpers import (
    FAULTY,
    SCRIPT,
    TINY,
    assert_same_run,
    end_of,
    read_events,
    read_ledger,
    run_ranks,
    start_ranks,
    start_training,
    train,
    wait_for,
    write_texts,
)
from tests.support.design_document import Order
from tests.support.runs import make_run


def plain_arguments(directory: Path, *more: str) -> list[str]:
    return [
        *TINY,
        *["--run.directory", str(directory), "--data.text_files", f"{directory.parent}/texts/*.txt"],
        *["--data.cache_directory", str(directory.parent / "cache"), "--batch.micro_batch_size", "12"],
        *["--run.max_updates", "6", "--checkpoint.every_tokens", "1536", *more],
    ]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six updates in memory enough."""
    root = tmp_path_factory.mktemp("memory")
    write_texts(root / "texts", count=16, largest=1200)
    done = train(*plain_arguments(root / "healthy"))
    assert done.returncode == 0, done.stderr
    return root / "healthy"


def two_ranks(directory: Path, rows: int, where: str, first: int, *more: str) -> tuple[list[int], str]:
    """Exit codes and output of two ranks, the last of which has memory for `rows` blocks only, from update `first` on."""
    faults = {"FAULTY_ROWS": str(rows), "FAULTY_PASS": where, "FAULTY_FROM": str(first)}
    return end_of(start_ranks(2, [FAULTY, "small_memory", *plain_arguments(directory, *more)], **faults))[:2]


@pytest.mark.parametrize(
    ("where", "first"),
    [("backward", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("forward", 1), ("backward", 2)))],
)
def test_out_of_memory_on_one_rank_makes_the_micro_batch_smaller_on_all(healthy: Path, where: str, first: int) -> None:
    """One micro-batch of 12 blocks an update: so it fails in the one in which the ranks would add up their gradients."""
    directory = healthy.parent / f"{where}-{first}"
    codes, output = two_ranks(directory, 3, where, first)
    assert codes == [0, 0], output
    events = read_events(directory, "micro_batch")
    assert [(event["update"], event["old"], event["new"]) for event in events] == [
        (first - 1, 12, 6),
        (first - 1, 6, 3),
    ]
    assert "rank 1 ran out of memory" in events[0]["reason"]
    found, expected = read_ledger(directory), read_ledger(healthy)
    sizes = [(entry["micro_batch_size"], entry["gradient_accumulation_steps"]) for entry in found]
    assert sizes == [(12, 1)] * (first - 1) + [(3, 4)] * (7 - first)
    assert [entry["blocks_sha256"] for entry in found] == [entry["blocks_sha256"] for entry in expected]
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)
    assert [entry["grad_norm"] for entry in found] == pytest.approx([e["grad_norm"] for e in expected], rel=1e-4)


def test_out_of_memory_with_one_block_is_one_line_and_keeps_what_is_done(healthy: Path) -> None:
    directory = healthy.parent / "hopeless"
    codes, output = two_ranks(directory, 0, "forward", 4, "--batch.micro_batch_size", "5")
    assert codes == [2, 2]
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "rank 1 ran out of memory in update 4 with micro-batches of one block: set a shorter" in line
    assert "Traceback" not in output
    done = train(*plain_arguments(directory))  # on a machine with more memory
    assert done.returncode == 0, done.stderr
    assert "after 3 updates" in done.stdout
    expected = read_ledger(healthy)
    assert [entry["loss"] for entry in read_ledger(directory)] == pytest.approx([e["loss"] for e in expected], rel=1e-5)


def test_out_of_memory_in_the_last_micro_batch_of_a_proven_size_ends_all_ranks_with_one_line(healthy: Path) -> None:
    """The others are adding up gradients and cannot be told: the launcher, or the closed connection, ends them."""
    codes, output = two_ranks(healthy.parent / "late", 3, "backward", 4)
    assert codes[1] == 2
    assert codes[0] != 0
    assert "rank 1 ran out of memory while the ranks added up their gradients" in output
    assert "Traceback" not in output
    assert len(read_ledger(healthy.parent / "late")) == 3


def spiky_arguments(directory: Path, *more: str) -> list[str]:
    return [
        *TINY,
        *["--run.directory", str(directory), "--data.text_files", f"{directory.parent}/spiky/*.jsonl"],
        *["--data.cache_directory", str(directory.parent / "cache"), "--data.shuffle_blocks", "1"],
        *["--batch.micro_batch_size", "8", "--stability.spike_window", "8", "--checkpoint.every_tokens", "7680"],
        *["--run.max_updates", "24", "--model.dropout", "0.1", *more],
    ]


@pytest.fixture(scope="module")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which every lane comes to noise at about the same time, and `continued`, a run that goes on regardless."""
    root = tmp_path_factory.mktemp("spiky")
    text = "\n".join(write_texts(root / "texts", count=60, largest=4000))
    noise = random.Random(1)
    (root / "spiky").mkdir()
    for lane in range(8):
        part = text[lane * 14_000 : (lane + 1) * 14_000]
        assert len(part) == 14_000, "each lane has a file"
        junk = "".join(chr(noise.randrange(0x4E00, 0x9FFF)) for _ in range(150))
        rows = [text[:4000], junk, part]  # the first is the same for all, so that the noise comes at the same time
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (root / "spiky" / f"{lane}.jsonl").write_text(lines, encoding="utf-8")
    done = train(*spiky_arguments(root / "continued"))
    assert done.returncode == 0, done.stderr
    return root


def test_a_spike_is_noted_and_training_goes_on(spiky: Path) -> None:
    spikes = read_events(spiky / "continued", "spike")
    assert spikes
    entries = {entry["update"]: entry for entry in read_ledger(spiky / "continued")}
    assert sorted(entries) == list(range(1, 25))
    for spike in spikes:
        assert spike["loss"] == entries[spike["update"]]["loss"]
        assert max(spike["loss_score"], spike["grad_norm_score"]) >= 7


def test_stop_leaves_the_checkpoint_before_the_spike_and_says_what_to_do(spiky: Path) -> None:
    directory = spiky / "stopped"
    done = train(*spiky_arguments(directory, "--stability.on_spike", "stop"))
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert "robust standard deviations above the median" in line
    assert "--stability.on_spike rollback" in line
    lower = commands_with_lower_rate(line)
    assert len(lower) == 2
    for more in lower:
        config = load_config(spiky_arguments(directory, *more))
        assert config.optimizer.learning_rate == 0.0025
        assert find_resume_point(config).checkpoint is None
    with pytest.raises(RecipeError, match=r"is of another run: optimizer\.learning_rate was 0\.005 and is 0\.0025"):
        find_resume_point(load_config(spiky_arguments(directory, *lower[0][:2])))
    first = read_events(spiky / "continued", "spike")[0]["update"]
    checkpoints = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert checkpoints == [f"step-{update:06d}" for update in range(5, first, 5)]


def commands_with_lower_rate(line: str) -> list[list[str]]:
    """What the error of a divergence adds to the command that led to it."""
    return [shlex.split(words) for words in re.findall(r"with (--optimizer\.learning_rate [^,]*), which", line)]


@pytest.mark.slow
def test_what_the_errors_of_a_divergence_say_works_when_it_is_run(spiky: Path) -> None:
    """Each as it is printed, behind the command that failed; a path with a space and a quote in it."""
    (spiky / "Bob's runs").mkdir()
    for name in ("spiky", "cache"):
        (spiky / "Bob's runs" / name).symlink_to(spiky / name)
    often = ["--checkpoint.every_tokens", "1536"]

    def fails(name: str, *more: str, faulty: bool = False) -> tuple[list[str], str]:
        command = spiky_arguments(spiky / "Bob's runs" / name, *more)
        script = [FAULTY, "infinite_gradient_on_rank_1"] if faulty else [SCRIPT]
        done = train(*command, script=script, FAULTY_UPDATES="5,6,7,8,9")
        assert done.returncode == 3, done.stderr
        return command, done.stderr

    def works(command: list[str], *more: str) -> None:
        done = train(*command, *more)
        assert done.returncode == 0, done.stderr

    command, line = fails("not finite", *often, faulty=True)
    assert "--stability.max_skipped_updates 10 goes on behind them" in line
    works(command, "--stability.max_skipped_updates", "10")
    fresh, elsewhere = commands_with_lower_rate(line)
    for more in (elsewhere, fresh):
        works(command, *more, "--run.max_updates", "1")
    assert len(read_ledger(spiky / "Bob's runs/not finite/previous/1")) > 12
    assert len(read_ledger(spiky / "Bob's runs/not finite-lower-rate")) == 1

    command, line = fails("stopped", "--stability.on_spike", "stop")
    shutil.copytree(spiky / "Bob's runs/stopped", spiky / "Bob's runs/copy")
    for way, directory in (("rollback", "stopped"), ("continue", "copy")):
        assert re.search(rf"with (--stability\.on_spike )?{way} ", line)
        works(command, "--stability.on_spike", way, "--run.directory", str(spiky / "Bob's runs" / directory))
    for more in commands_with_lower_rate(line):
        works(command, *more, "--run.max_updates", "1")

    rollback = ["--stability.on_spike", "rollback"]
    command, line = fails(
        "none yet", *rollback, "--checkpoint.every_tokens", "null", "--checkpoint.every_minutes", "null"
    )
    (ways,) = re.findall(r"(--checkpoint\.every_tokens \d+), or", line)
    works(command, *ways.split())
    more = ["--stability.rollback_updates", "1", "--stability.max_rollbacks", "1", "--stability.spike_score", "0.1"]
    command, line = fails("in vain", *rollback, *more)
    left_out = read_events(spiky / "Bob's runs/in vain", "rollback")
    (ways,) = re.findall(r"(--stability\.max_rollbacks \d+ --stability\.rollback_updates \d+) leaves out more", line)
    train(*command, *ways.split())  # with this score almost every update is a spike
    assert len(read_events(spiky / "Bob's runs/in vain", "rollback")) > len(left_out)
    works(command, "--stability.on_spike", "continue")


@pytest.mark.slow
def test_rollback_leaves_out_the_guilty_blocks_and_resumes_exactly(spiky: Path) -> None:
    """The run that rolled back, one that was stopped twice meanwhile, and one on two ranks: the same blocks, the same run."""
    rollback = ["--stability.on_spike", "rollback"]
    done = train(*spiky_arguments(spiky / "back", *rollback))
    assert done.returncode == 0, done.stderr
    (*_, event) = read_events(spiky / "back", "rollback")
    ranges = merge_ranges(
        stretch for event in read_events(spiky / "back", "rollback") for stretch in event["skipped_blocks"]
    )
    # An update takes three blocks of each lane, so what is left out is whole batches: those of an update each, counted from 1.
    assert not [place for stretch in ranges for place in stretch if place % 3]
    skipped = [block // 3 + 1 for start, stop in ranges for block in range(start, stop, 3)]
    assert event["spike_update"] in skipped or len(skipped) > 4
    every_batch = {e["update"]: e["blocks_sha256"] for e in read_ledger(spiky / "continued")}
    entries = read_ledger(spiky / "back")
    assert [entry["update"] for entry in entries] == list(range(1, 25))
    batches = [number_of(3 * (entry["update"] - 1), ranges) // 3 + 1 for entry in entries]
    assert not set(batches) & set(skipped)
    for entry, batch in zip(entries, batches, strict=True):
        assert entry["blocks_sha256"] == every_batch.get(batch, entry["blocks_sha256"]), batch
    noisy = {e["update"] for e in read_events(spiky / "continued", "spike")}
    assert noisy & set(skipped)

    killed = spiky / "killed"  # once after each rollback, before another checkpoint; checkpoints are elsewhere
    killed.mkdir()
    (spiky / "elsewhere").mkdir()
    (killed / "checkpoints").symlink_to(spiky / "elsewhere")
    for _ in read_events(spiky / "back", "rollback"):
        process = start_training(*spiky_arguments(killed, *rollback))
        wait_for(process, "robust standard deviations")
        wait_for(process, f"after {event['update']} updates")
        wait_for(process, "update ")
        process.kill()
        process.communicate()
    done = train(*spiky_arguments(killed, *rollback))
    assert done.returncode == 0, done.stderr
    assert "robust standard deviations" not in done.stdout, "it knows what to leave out"
    assert_same_run(spiky / "back", killed)

    run_ranks(2, [SCRIPT, *spiky_arguments(spiky / "two", *rollback)])
    assert [e["blocks_sha256"] for e in read_ledger(spiky / "two")] == [e["blocks_sha256"] for e in entries]


def over_a_change(directory: Path, *more: str) -> list[str]:
    """A third of the budget from update 10 on, and a checkpoint after update 8; what led to the spike is all behind that."""
    schedule = json.dumps([{"from_tokens": 13_000, "tokens_per_update": 512}])
    rollback = ["--stability.on_spike", "rollback", "--batch.schedule", schedule]
    return spiky_arguments(directory, *rollback, "--checkpoint.every_tokens", "12000", "--run.max_updates", "40", *more)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [60, 4])
def test_a_rollback_over_a_change_of_budget_leaves_out_the_blocks_that_were_trained_on(
    spiky: Path, updates: int
) -> None:
    """The blocks that are left are given to updates of other sizes, as docs/design.md has it."""
    over = spiky / f"over-{updates}"
    done = train(*over_a_change(over, "--stability.rollback_updates", str(updates)))
    assert done.returncode == 0, done.stderr
    rollbacks = read_events(over, "rollback")
    assert rollbacks[0]["update"] == 8
    # Three blocks of each lane in each of nine updates, then one: with 60, the ninth and all of the second budget.
    end = 27 + rollbacks[0]["spike_update"] - 9
    assert rollbacks[0]["skipped_blocks"] == [[24 if updates == 60 else end - updates, end]]
    entries = read_ledger(over)
    assert [entry["target_tokens"] for entry in entries] == [1536] * 9 + [512] * 31
    order = Order(yaml.safe_load((over / "config.yaml").read_text(encoding="utf-8")))
    left_out = [stretch for event in rollbacks for stretch in event["skipped_blocks"]]
    assert list(islice(order.hashes(left_out), 40)) == [entry["blocks_sha256"] for entry in entries]


@pytest.mark.slow
def test_a_run_that_is_killed_behind_a_rollback_over_a_change_resumes_exactly(spiky: Path) -> None:
    far = ["--stability.rollback_updates", "60"]
    plain = [*far, "--model.dropout", "0", "--batch.micro_batch_size"]
    for name, more in (("over-whole", far), ("over-one", [*plain, "5"])):
        done = train(*over_a_change(spiky / name, *more))
        assert done.returncode == 0, done.stderr
    killed = spiky / "over-killed"
    process = start_training(*over_a_change(killed, *far))
    wait_for(process, "robust standard deviations")
    wait_for(process, "after 8 updates")
    wait_for(process, "update ")
    process.kill()
    process.communicate()
    done = train(*over_a_change(killed, *far))
    assert done.returncode == 0, done.stderr
    assert_same_run(spiky / "over-whole", killed)
    run_ranks(2, [SCRIPT, *over_a_change(spiky / "over-ranks", *plain, "2")])
    one, two = (read_ledger(spiky / name) for name in ("over-one", "over-ranks"))
    assert [entry["blocks_sha256"] for entry in one] == [entry["blocks_sha256"] for entry in two]
    assert [entry["loss"] for entry in one] == pytest.approx([entry["loss"] for entry in two], rel=1e-4)


@pytest.mark.slow
def test_rollback_without_a_checkpoint_or_without_effect_stops(spiky: Path) -> None:
    rollback = ["--stability.on_spike", "rollback"]
    none = ["--checkpoint.every_tokens", "null", "--checkpoint.every_minutes", "null"]
    done = train(*spiky_arguments(spiky / "no-checkpoint", *rollback, *none))
    assert done.returncode == 3
    assert "no checkpoint of its own to return to yet" in done.stderr
    more = ["--stability.rollback_updates", "1", "--stability.max_rollbacks", "1", "--stability.spike_score", "0.1"]
    done = train(*spiky_arguments(spiky / "in-vain", *rollback, *more))
    assert done.returncode == 3
    assert "have not helped" in done.stderr


def test_the_score_is_that_of_the_median_and_its_absolute_deviation() -> None:
    window = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert robust_score(3.0 + 1.4826, window) == pytest.approx(1.0)
    assert robust_score(2.0, [1.0] * 9) == pytest.approx(1000.0), "a constant window: a thousandth of the median"


def test_a_spike_is_told_once_the_window_is_full_and_only_upwards() -> None:
    detector = SpikeDetector(make_run(Config(stability=StabilityConfig(spike_window=8))))
    values = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.1]
    assert not any(detector.find(value, 1.0) for value in (9.0, *values))
    assert detector.find(0.1, 1.0) is None
    assert detector.find(float("nan"), 1.0) is None
    assert detector.find(None, None) is None
    spike = detector.find(3.0, 1.0)
    assert spike is not None
    assert spike.loss_score > 7 > spike.grad_norm_score
    assert len(detector.recent) == 8


@pytest.mark.slow
def test_an_automatic_micro_batch_fits_and_gives_the_same_updates(healthy: Path) -> None:
    """By the plan all 24 blocks fit; on two ranks, of which one turns out to have memory for 3 blocks only, 3 do."""
    directory = healthy.parent / "auto"
    done = train(*plain_arguments(directory, "--batch.micro_batch_size", "auto"))
    assert done.returncode == 0, done.stderr
    assert "micro-batches of 24 blocks fit" in done.stdout
    codes, output = two_ranks(healthy.parent / "two", 3, "backward", 0, "--batch.micro_batch_size", "auto")
    assert codes == [0, 0], output
    assert "micro-batches of 12 blocks do not fit after all; trying 6" in output
    expected = read_ledger(healthy)
    for name, size in (("auto", 24), ("two", 3)):
        found = read_ledger(healthy.parent / name)
        assert {entry["micro_batch_size"] for entry in found} == {size}
        assert not read_events(healthy.parent / name, "micro_batch")
        assert [entry["blocks_sha256"] for entry in found] == [entry["blocks_sha256"] for entry in expected]
        assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in expected], rel=1e-5)
