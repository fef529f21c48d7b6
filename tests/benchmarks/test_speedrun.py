"""The quickstart's ingredients: which runs there are, and what the table says of their losses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speedrun import INGREDIENTS, PLAIN, SEEDS, TOKENS, report, trials
from recipe.config.command_line import load_config
from recipe.config.settings import flat_settings
from tests.support.quick_benchmark import quick_benchmark


def test_each_run_has_one_ingredient_more_than_another() -> None:
    made = trials()
    last = f"together {len(INGREDIENTS)}"
    assert [len(of) for of in made.values()] == [len(SEEDS) if kind in ("plain", last) else 1 for kind in made]
    plain = made["plain"][0].settings
    assert {name: plain[name] for name in PLAIN} == PLAIN
    for number, more in enumerate(INGREDIENTS.values(), start=1):
        alone = made[f"alone {number}"][0].settings
        assert {name: alone[name] for name in alone if alone[name] != plain[name]} == changes(alone, more)
    whole = made[last][0].settings
    assert all(whole[name] == value for more in INGREDIENTS.values() for name, value in more.items())
    assert whole["optimizer.learning_rate"] == 7e-3


def test_the_quickstart_is_all_of_them() -> None:
    quickstart = flat_settings(load_config(["--config", "configs/quickstart.yaml"]))
    whole = trials()[f"together {len(INGREDIENTS)}"][0].settings
    names = {*PLAIN, "optimizer.learning_rate", *(name for more in INGREDIENTS.values() for name in more)}
    assert {name: quickstart[name] for name in names} == {name: whole[name] for name in names}
    assert quickstart["schedule.total_tokens"] == TOKENS


def changes(settings: Mapping[str, Any], ingredient: dict[str, Any]) -> dict[str, Any]:
    """Of a plain run with one ingredient: its own, and a rate if it has another optimizer or size of an update."""
    is_plain = {"optimizer.name", "batch.tokens_per_update"}.isdisjoint(ingredient)
    return ingredient if is_plain else {**ingredient, "optimizer.learning_rate": settings["optimizer.learning_rate"]}


def test_the_table_has_what_each_gives_alone_and_adds_together() -> None:
    made = trials()
    losses = {"plain": 4.0} | {f"alone {n}": 4.0 - n / 10 for n in range(1, 10)}
    losses |= {f"together {n}": 3.9 - n / 4 for n in range(1, 10)}
    done = {
        kind: [
            {"validation_loss": losses[kind] + 0.01 * seed, "train_seconds": 50.0 + 10 * (kind != "plain")}
            for seed in range(len(of))
        ]
        for kind, of in made.items()
    }
    text = report(done)
    rows = [
        line.split(" | ")
        for line in text.splitlines()
        if line.startswith(("| plain", *(f"| {name}" for name in INGREDIENTS)))
    ]
    first, *ingredients = [[cell.strip(" |") for cell in row] for row in rows if len(row) == 5]
    assert first[1] == first[3] == "4.000"
    before = 4.0
    for number, (_, alone, gives, together, adds) in enumerate(ingredients, start=1):
        of = losses[f"together {number}"] if number > 1 else losses["alone 1"]
        assert (alone, gives) == (f"{losses[f'alone {number}']:.3f}", f"{-number / 10:+.3f}")
        assert (together, adds) == (f"{of:.3f}", f"{of - before:+.3f}")
        before = of
    assert "4.000, 4.010, 4.020 | 0.010" in text
    assert "1.20 times as long" in text


@pytest.mark.slow
def test_it_runs_and_writes_its_table(tmp_path: Path) -> None:
    printed, page, outcomes = quick_benchmark("speedrun", tmp_path)
    count = sum(len(of) for of in trials(is_quick=True).values())
    assert len(re.findall(r"^speedrun \d+/\d+: ", printed, re.MULTILINE)) == count == len(outcomes)
    assert "| plain |" in page
