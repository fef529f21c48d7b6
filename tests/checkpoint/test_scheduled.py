"""A run whose budget changes is stopped at, before and after the change, looked at, and rolled back over it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import yaml

from recipe.report.card import card_files
from recipe.report.curves import Curves
from recipe.report.record import read_record
from recipe.report.summary import rows_of
from recipe.run.directory import list_checkpoints
from tests.helpers import (
    SCRIPT,
    TINY,
    assert_same_run,
    read_events,
    read_ledger,
    run_ranks,
    train,
    write_texts,
)
from tests.support.design_document import Order

TOKENS = [1536] * 4 + [3072] * 3 + [1024] * 4  # of each update: of 3, 6 and 2 blocks of each lane
SCHEDULE = [{"from_tokens": 5000, "tokens_per_update": 3072}, {"from_tokens": 15_000, "tokens_per_update": 1024}]
EVERY = 3000


def arguments(directory: Path, *more: str) -> list[str]:
    """Eleven updates, windows of 5 blocks, dropout; an evaluation, and a checkpoint to keep, every 3,000 tokens."""
    return [
        *TINY,
        *["--run.directory", str(directory), "--data.text_files", f"{directory.parent}/texts/*.txt"],
        *["--data.cache_directory", f"{directory.parent}/cache", "--batch.schedule", json.dumps(SCHEDULE)],
        *["--schedule.total_tokens", "19000", "--data.shuffle_blocks", "5", "--model.dropout", "0.1"],
        *["--batch.micro_batch_size", "10", "--evaluation.sets.mine", f"{directory.parent}/texts/000.txt"],
        *["--evaluation.every_tokens", str(EVERY), "--evaluation.tokens", "64", "--evaluation.sample_tokens", "null"],
        *["--checkpoint.every_tokens", "null", "--checkpoint.keep", "1", "--checkpoint.keep_every_tokens", str(EVERY), *more],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and `whole`: the run that was not stopped."""
    root = tmp_path_factory.mktemp("scheduled")
    write_texts(root / "texts", count=16, largest=1200)
    done = train(*arguments(root / "whole"))
    assert done.returncode == 0, done.stderr
    assert "updates                      6,144 / 1,536 + 9,216 / 3,072 + 4,096 / 1,024 = 11" in done.stdout
    return root


def crossing(every: int) -> list[int]:
    """Updates in which a multiple of `every` tokens is passed, or the last."""
    ends = [sum(TOKENS[:n]) for n in range(len(TOKENS) + 1)]
    return [n for n in range(1, 12) if ends[n] // every > ends[n - 1] // every or n == 11]


def test_tokens_blocks_evaluations_and_checkpoints_are_where_a_count_puts_them(root: Path) -> None:
    ledger = read_ledger(root / "whole")
    assert [entry["target_tokens"] for entry in ledger] == TOKENS
    assert [entry["tokens"] for entry in ledger] == [sum(TOKENS[:n]) for n in range(1, 12)]
    order = Order(yaml.safe_load((root / "whole/config.yaml").read_text(encoding="utf-8")))
    assert list(islice(order.hashes(), 11)) == [entry["blocks_sha256"] for entry in ledger]
    evaluated = [entry["update"] for entry in ledger if entry["validation/mine/loss"] is not None]
    assert evaluated == crossing(EVERY) == [2, 4, 5, 6, 7, 10, 11]
    assert [path.name for path in reversed(list_checkpoints(root / "whole/checkpoints"))] == [
        f"step-{update:06d}" for update in evaluated
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_before_at_and_after_a_change_it_is_the_same_run_bit_for_bit(root: Path, ranks: int) -> None:
    """Update 5 is the first of the second budget, update 8 of the third."""
    whole, resumed = root / ("whole" if ranks == 1 else "whole-2"), root / f"resumed-{ranks}"
    if ranks > 1:
        run_ranks(ranks, [SCRIPT, *arguments(whole)])
    for stop_after in ("2", "4", "5", "7", None):
        run_ranks(ranks, [SCRIPT, *arguments(resumed, *(["--run.max_updates", stop_after] if stop_after else []))])
    assert [event["update"] for event in read_events(resumed, "resume")] == [2, 4, 5, 7]
    assert_same_run(whole, resumed)


@pytest.mark.slow
def test_it_moves_between_ranks_and_micro_batches_within_and_at_a_change(root: Path) -> None:
    plain = ["--model.dropout", "0"]
    done = train(*arguments(root / "one", *plain))
    assert done.returncode == 0, done.stderr
    for ranks, size, stop_after in ((2, 5, "4"), (3, 2, "6"), (2, "auto", "7"), (1, 48, "11")):
        more = [*plain, "--batch.micro_batch_size", str(size), "--run.max_updates", stop_after]
        run_ranks(ranks, [SCRIPT, *arguments(root / "moved", *more)])
    expected, found = read_ledger(root / "one"), read_ledger(root / "moved")
    assert [entry["world_size"] for entry in found] == [2] * 4 + [3] * 2 + [2] + [1] * 4
    assert [entry["blocks_sha256"] for entry in found] == [entry["blocks_sha256"] for entry in expected]
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)


def test_page_and_card_show_the_budgets(root: Path) -> None:
    record = read_record(root / "whole")
    rows = rows_of(record, ())
    budgets = "1,536, from 6,144 tokens on 3,072 (rate x 1.41), from 15,360 tokens on 1,024 (rate x 0.816)"
    assert dict(rows.summary)["tokens per update"] == dict(rows.hyperparameters)["tokens per update"] == budgets
    assert "betas 0.9 and 0.95, then 0.9025, then 0.966383" in dict(rows.hyperparameters)["optimizer"]
    assert [row[:5] for row in rows.parts] == [
        ("updates", "tokens each", "ranks", "micro-batch", "accumulation steps"),
        ("1 to 4", "1,536", "1", "10", "3"),
        ("5 to 7", "3,072", "1", "10", "5"),
        ("8 to 11", "1,024", "1", "10", "2"),
    ]
    assert rows.parts[2][5] == "ceil(48 blocks of the largest share / 10) = 5"
    record.events.append({"event": "resume", "update": 6, "changes": {}})
    assert Curves([record], ["run"]).datasets["events"][-1]["tokens"] == sum(TOKENS[:6])
    card = card_files(root / "whole")["README.md"].decode()
    assert "Tokens of each update: 1,536, from 6,144 tokens on 3,072" in card
    assert "Seen: 19,456 of 19,456 tokens." in card
