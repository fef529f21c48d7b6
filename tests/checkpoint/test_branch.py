"""A branch: what it may change, what it keeps, that it says where it is from, and that it goes on as itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.checkpoint.files import take_snapshot, write_checkpoint
from recipe.checkpoint.resume import find_resume_point
from recipe.config.settings import (
    BatchConfig,
    BudgetChange,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    flat_settings,
)
from recipe.data.lanes import Lane
from recipe.errors import RecipeError
from recipe.report.card import card_files
from recipe.report.page import report_page
from recipe.report.record import read_record
from tests.helpers import (
    SCRIPT,
    TIMES,
    TINY,
    assert_one_line,
    assert_same_run,
    read_events,
    read_ledger,
    run_ranks,
    tensors_of,
    train,
    write_texts,
)
from tests.support.checkpoints import state_of, trained
from tests.support.mixtures import Mixed, mixture_of
from tests.support.resuming import arguments

BATCH = BatchConfig(tokens_per_update=16 * 8, lanes=4)
PARENT = Config(batch=BATCH, data=DataConfig(dataset="user/a", sequence_length=8))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One of `PARENT`, after 100 updates of 128 tokens."""
    model, optimizer, tokenizer = trained()
    directory = tmp_path / "parent"
    config = replace(PARENT, run=RunConfig(directory=str(directory)))
    state = replace(state_of(100), tokens=12_800, config=flat_settings(config))
    gpt2: Any = model.gpt2
    return write_checkpoint(directory / "checkpoints", take_snapshot(model, optimizer), state, gpt2.config, tokenizer)


def branch_of(checkpoint: Path, directory: str = "branch", skip: int = 0, **sections: Any) -> Config:
    run = RunConfig(directory=str(checkpoint.parents[2] / directory), branch=True, skip_tokens=skip)
    return replace(PARENT, run=run, resume=str(checkpoint), **sections)


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({}, {}),
        ({"optimizer": OptimizerConfig(learning_rate=1e-3)}, {"optimizer.learning_rate": [6e-4, 1e-3]}),
        ({"optimizer": OptimizerConfig(beta2_half_life_tokens=99)}, {"optimizer.beta2_half_life_tokens": [None, 99]}),
        ({"schedule": ScheduleConfig(total_tokens=20_000)}, {"schedule.total_tokens": [None, 20_000]}),
        (
            {"batch": replace(BATCH, schedule=(BudgetChange(12_800, 256),))},
            {"batch.schedule": [[], [{"from_tokens": 12_800, "tokens_per_update": 256}]]},
        ),
    ],
)
def test_a_branch_records_where_it_is_from_and_what_changed(
    sections: dict[str, Any], changed: dict[str, Any], checkpoint: Path
) -> None:
    point = find_resume_point(branch_of(checkpoint, **sections))
    assert point.state is not None
    assert point.state.branched_from is not None
    assert point.event == "branch"
    assert point.facts() == {"checkpoint": str(checkpoint), "tokens": 12_800, "changes": changed, "skipped": []}
    assert (point.state.branched_from["update"], point.state.branched_from["changes"]) == (100, changed)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": ModelConfig(n_layer=3)}, r"model\.n_layer was 12 and is 3; a branch has model, seed, lanes"),
        ({"batch": replace(BATCH, lanes=8)}, r"batch\.lanes was 4 and is 8; a branch has"),
        ({"optimizer": OptimizerConfig(name="muon")}, r"optimizer\.name was 'adamw' and is 'muon'; a branch has"),
        ({"data": replace(PARENT.data, dataset="user/b")}, r"data\.dataset was 'user/a' and is 'user/b'; a branch has"),
        ({"data": replace(PARENT.data, sequence_length=4)}, r"data\.sequence_length was 8 and is 4; a branch has"),
        (
            {"batch": replace(BATCH, tokens_per_update=256)},
            r"--batch\.schedule '\[\{from_tokens: 12800, tokens_per_update: 256\}\]'",
        ),
        (
            {"batch": replace(BATCH, schedule=(BudgetChange(12_799, 256),))},
            r"batch\.schedule before the 12,800 tokens .* has to be that of its run, \[\]: let changes begin at 12800 tokens",
        ),
        ({"skip": 33}, r"run\.skip_tokens = 33 is no whole number .* set it to 32 or 64"),
        ({"directory": "parent"}, r"give the branch a --run\.directory of its own"),
    ],
)
def test_what_a_branch_cannot_change_is_one_line(sections: dict[str, Any], words: str, checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        find_resume_point(branch_of(checkpoint, **sections))


def test_without_branch_the_same_change_is_refused_and_the_message_names_it(checkpoint: Path) -> None:
    config = replace(branch_of(checkpoint, optimizer=OptimizerConfig(learning_rate=1e-3)), run=RunConfig("elsewhere"))
    with pytest.raises(RecipeError, match=r"learning_rate was 0\.0006 and is 0\.001; use another .*--run\.branch true"):
        find_resume_point(config)
    with pytest.raises(RecipeError, match=r"n_layer was 12 and is 3; use another .* move it aside$"):
        find_resume_point(replace(config, optimizer=PARENT.optimizer, model=ModelConfig(n_layer=3)))
    with pytest.raises(RecipeError, match=r"run\.branch needs the checkpoint to branch from"):
        find_resume_point(replace(branch_of(checkpoint), resume="auto"))


def test_tokens_that_are_left_out_are_blocks_of_every_lane(checkpoint: Path) -> None:
    """12,800 tokens are 400 blocks of each of 4 lanes; 64 are two more."""
    assert find_resume_point(branch_of(checkpoint, skip=64)).skipped_blocks == ((400, 402),)


OLD_WEIGHTS = Mixed(range(3, 90), 1.0), Mixed([700, 300, 500], 3.0)
NEW_WEIGHTS = tuple(mixed._replace(weight=weight) for mixed, weight in zip(OLD_WEIGHTS, (3.0, 1.0), strict=True))


def branched_lane(directory: Path, state: dict[str, Any], shuffled: int) -> Lane:
    """A lane of a branch with other weights, where `state` of the run before it, or of itself, puts it."""
    (lane,) = mixture_of(directory / "branch", NEW_WEIGHTS, shuffled=shuffled)
    lane.load_state_dict(json.loads(json.dumps(state)))
    return lane


def test_other_weights_hold_from_the_next_window_on(tmp_path: Path) -> None:
    """Wherever its state is taken, in the window in which the branch begins or behind it, the lane goes on the same."""
    (lane,) = mixture_of(tmp_path / "whole", OLD_WEIGHTS, shuffled=16)
    lane.next_blocks(21)  # into the second window, of blocks 8 to 23
    state = {**lane.state_dict(), "weights": [1.0, 3.0]}
    proof = branched_lane(tmp_path, state, 16)
    proof.keeps_weights = True  # as while the last update of the run is read again
    (again,) = mixture_of(tmp_path / "whole", OLD_WEIGHTS, shuffled=16)
    again.load_state_dict(lane.state_dict())
    assert (proof.next_blocks(20) == again.next_blocks(20)).all(), "through the next window"
    branch = branched_lane(tmp_path, state, 16)
    assert (branch.next_blocks(3) == lane.next_blocks(3)).all(), "the rest of the window is that of the run"
    tokens = np.zeros(2)
    for _ in range(80):
        before = branch.state_dict()
        blocks = branch.next_blocks(5)
        tokens += branch.source_tokens
        assert (branched_lane(tmp_path, before, 16).next_blocks(5) == blocks).all()
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.02)


def test_a_document_that_is_open_where_weights_change_is_read_on(tmp_path: Path) -> None:
    """Though by the other weights it would be another source's turn. A window has one block here."""
    (lane,) = mixture_of(tmp_path / "whole", OLD_WEIGHTS, shuffled=1)
    lane.next_blocks(3)  # into the first document of 700 tokens
    branch = branched_lane(tmp_path, {**lane.state_dict(), "weights": [1.0, 3.0]}, 1)
    for _ in range(15):
        blocks = branch.next_blocks(1)
        assert (blocks == lane.next_blocks(1)).all()
        branch = branched_lane(tmp_path, branch.state_dict(), 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and `parent`: a run of 8 updates with dropout, with checkpoints after 4 and 8."""
    root = tmp_path_factory.mktemp("branch")
    write_texts(root / "texts", count=16, largest=1200)
    done = train(*arguments(root / "parent", "--run.max_updates", "8"))
    assert done.returncode == 0, done.stderr
    return root


def branch_arguments(root: Path, name: str, *more: str) -> list[str]:
    start = ["--resume", str(root / "parent/checkpoints/step-000004"), "--run.branch", "true"]
    return arguments(root / name, "--run.max_updates", "8", *start, *more)


def test_a_branch_without_a_change_is_the_run_that_it_leaves(root: Path) -> None:
    done = train(*branch_arguments(root, "same"))
    assert done.returncode == 0, done.stderr
    parent, same = (
        [{k: v for k, v in e.items() if k not in TIMES} for e in read_ledger(root / n)] for n in ("parent", "same")
    )
    assert same == parent[4:]
    tensors = tensors_of(root / "parent")
    assert all(tensor.equal(tensors[name]) for name, tensor in tensors_of(root / "same").items())


CHANGES = ["--batch.schedule", "[{from_tokens: 6144, tokens_per_update: 3072}]", "--optimizer.learning_rate", "1e-3"]


@pytest.mark.slow
def test_a_stopped_branch_goes_on_as_itself_by_the_same_command(root: Path) -> None:
    """On other ranks too; and once it is complete nothing is trained again."""
    for name in ("whole", "parts"):
        for stop_after in ("6", "8") if name == "parts" else ("8",):
            done = train(*branch_arguments(root, name, *CHANGES, "--run.max_updates", stop_after))
            assert done.returncode == 0, done.stderr
    assert_same_run(root / "whole", root / "parts")
    assert [entry["tokens"] for entry in read_ledger(root / "whole")] == [9216, 12288, 15360, 18432]
    (branch,) = read_events(root / "parts", "branch")
    assert (branch["update"], branch["tokens"], set(branch["changes"])) == (
        4,
        6144,
        {"batch.schedule", "optimizer.learning_rate"},
    )
    assert len(read_events(root / "parts", "resume")) == 1
    run_ranks(2, [SCRIPT, *branch_arguments(root, "ranks", *CHANGES, "--model.dropout", "0.1")])
    assert [e["blocks_sha256"] for e in read_ledger(root / "ranks")] == [
        e["blocks_sha256"] for e in read_ledger(root / "whole")
    ]
    for text in (
        report_page([read_record(root / "whole")], ["whole"]),
        card_files(root / "whole")["README.md"].decode(),
    ):
        assert "step-000004 of parent at 6,144 tokens, with batch.schedule" in text
    again = train(*branch_arguments(root, "whole", *CHANGES))
    assert "this run is complete" in again.stdout
    other = train(*branch_arguments(root, "whole", *CHANGES, "--resume", str(root / "parent/checkpoints/step-000008")))
    assert_one_line(other, ["has branched from", "step-000004", "not from"])
    assert_one_line(train(*branch_arguments(root, "whole")), ["optimizer.learning_rate was 0.001 and is 0.005"])


@pytest.mark.slow
def test_a_branch_that_leaves_text_out_reads_what_follows(root: Path) -> None:
    """Two updates' tokens: it begins with the blocks of update 7."""
    done = train(*branch_arguments(root, "later", "--run.skip_tokens", "3072", "--run.max_updates", "6"))
    assert done.returncode == 0, done.stderr
    later, parent = read_ledger(root / "later"), read_ledger(root / "parent")
    assert [e["blocks_sha256"] for e in later] == [e["blocks_sha256"] for e in parent[6:]]


def of_sources(root: Path, name: str, first_weight: int, *more: str) -> list[str]:
    sources = [{"text_files": [f"{root}/{part}.jsonl"], "name": part} for part in ("a", "b")]
    given = json.dumps([{**sources[0], "weight": first_weight}, {**sources[1], "weight": 1}])
    return [*TINY, "--run.directory", str(root / name), "--data.sources", given, "--data.shuffle_blocks", "5", *more]


@pytest.mark.slow
def test_weights_may_change_in_a_branch_whose_last_update_crosses_windows(tmp_path: Path) -> None:
    """Update 4 has blocks 9 to 11 of each lane, of two windows; the last of them ends the branch's first update."""
    text = "".join(write_texts(tmp_path / "texts"))
    for name, length in (("a", 150), ("b", 200)):  # characters of a document
        rows = [json.dumps({"text": text[place : place + length]}) for place in range(0, len(text), length)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    start = ["--run.branch", "true", "--resume", str(tmp_path / "parent/checkpoints/step-000004"), "--run.max_updates"]
    for name, weight, more in (
        ("parent", 1, ["--run.max_updates", "4"]),
        ("whole", 9, [*start, "16"]),
        ("parts", 9, [*start, "5"]),
        ("parts", 9, [*start, "6"]),
        ("parts", 9, [*start, "16"]),
    ):
        done = train(*of_sources(tmp_path, name, weight, *more))
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    tokens = [entry["source/a/tokens"] for entry in read_ledger(tmp_path / "whole")]
    assert sum(tokens[-8:]) / (8 * 1536) == pytest.approx(0.9, abs=0.03)
    (event,) = read_events(tmp_path / "whole", "branch")
    assert event["changes"] == {"data.sources[0].weight": [1.0, 9.0]}
