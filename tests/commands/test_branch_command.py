"""`python -m recipe branch`: budgets from a checkpoint on, each a run, compared; mistakes are answered before anything runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from recipe.commands.branch import BranchConfig, branch_configs
from recipe.config.command_line import load_config
from recipe.config.settings import flat_settings
from tests.helpers import TINY, assert_one_line, expect_error, read_events, read_ledger, run, train, write_texts
from tests.support.resuming import arguments

RECIPE = [sys.executable, "-m", "recipe", "branch"]


def state(*more: str) -> dict[str, Any]:
    """Of a run of 40 updates of 1,536 tokens in 8 lanes, blocks of 64 tokens, after 20."""
    config = load_config([*TINY, *more])
    return {"update": 20, "tokens": 30720, "config": flat_settings(config)}


def configs(*more: str, **settings: Any) -> Any:
    return branch_configs(BranchConfig(**{"tokens": 12_288, **settings}), Path("c"), state(*more), Path("out"))


def test_branches_differ_in_budget_and_text_and_end_at_equal_tokens() -> None:
    found = configs(multiples=(2.0, 1.0), tokens=10_000)
    assert [(b.multiple, b.tokens_per_update, b.seed, b.last_update) for b, _ in found] == [
        *((1, 1536, 1, 28), (2, 3072, 1, 24)),
        *((1, 1536, 2, 28), (2, 3072, 2, 24)),
    ]
    for branch, config in found:
        (change,) = config.batch.schedule
        assert (change.from_tokens, change.tokens_per_update) == (30720, branch.tokens_per_update)
        assert config.run.skip_tokens == (branch.seed - 1) * 12_288, "the next seed reads what follows"
        assert (config.run.branch, config.resume, config.hub.repo_id) == (True, "c", None)
    assert len({branch.directory for branch, _ in found}) == 4


@pytest.mark.parametrize(
    ("more", "settings", "words"),
    [
        ((), {"multiples": (0.5, 1.0)}, ["0.5 x 1,536", "give multiples of 0.333333 (512 tokens)"]),
        ((), {"multiples": (1.0,)}, ["two or more"]),
        ((), {"multiples": (-1.0, 1.0)}, ["-1 x 1,536"]),
        ((), {"tokens": None, "multiples": (1.0, 2.0)}, ["tokens is not given", "--tokens 24576"]),
        ((), {"tokens": 99_999, "multiples": (1.0, 2.0)}, ["99,999", "30,720 left", "at most 30,720"]),
        (
            (
                "--batch.schedule",
                "[{from_tokens: 9000, tokens_per_update: 3072}]",
                "--schedule.learning_rate_rule",
                "none",
            ),
            {"multiples": (1.0, 2.0)},
            ["learning_rate_rule = sqrt", "by the rule none"],
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(more: tuple[str, ...], settings: dict[str, Any], words: list[str]) -> None:
    expect_error(words, lambda: configs(*more, **settings))


@pytest.mark.slow
def test_budgets_are_compared_by_real_runs_that_are_not_run_twice(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=16, largest=1200)
    done = train(*arguments(tmp_path / "parent", "--run.max_updates", "4"))
    assert done.returncode == 0, done.stderr
    checkpoint = str(tmp_path / "parent/checkpoints/step-000004")
    command = [*RECIPE, checkpoint, "--multiples", "1", "2", "--tokens", "6000", "--json"]
    first = run(command)
    assert first.returncode == 0, first.stderr
    results = json.loads(first.stdout)
    assert [(b["multiple"], b["tokens_per_update"], b["updates"]) for b in results["budgets"]] == [
        (1, 1536, 4),
        (2, 3072, 2),
    ]
    assert results["budgets"][1]["learning_rate"] > 1.2 * results["budgets"][0]["learning_rate"]
    assert first.stderr.count("updates of") == 4
    again = run(command)
    assert (again.stdout, again.stderr.count("updates of")) == (first.stdout, 0)
    root = tmp_path / "parent/branches/step-000004/6144-tokens"
    for seed in (1, 2):
        (one, two) = (read_ledger(root / f"x{multiple}-seed{seed}") for multiple in (1, 2))
        assert one[-1]["tokens"] == two[-1]["tokens"] == 6144 + 6144
        (event,) = read_events(root / f"x2-seed{seed}", "branch")
        assert event["changes"].get("run.skip_tokens") == (None if seed == 1 else [0, 6144])
    assert_one_line(run([*RECIPE, str(tmp_path), "--tokens", "6000"]), ["is no checkpoint with a training state"])
