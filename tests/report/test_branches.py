"""Branches are compared over the same text; the largest budget without loss is read off with the spread of seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipe.report.branches import Branch, Budget, compare, largest_without_loss, smoothed_loss, table, verdict


def budget(tokens: int, difference: float, sd: float | None = 0.001) -> Budget:
    losses = [4.0, 4.0] if sd is not None else [4.0]
    return Budget(tokens / 1000, tokens, 8, 1e-3, losses, [], difference, sd)


def test_the_loss_is_smoothed_over_windows_of_the_largest_budget() -> None:
    """Losses 1 to 6 in updates of 10 tokens behind 100, windows of 20: means 1.5, 3.5, 5.5, each half and half with before."""
    lines = [{"tokens": 100 + 10 * n, "loss": float(n)} for n in range(1, 7)]
    assert smoothed_loss(lines, 100, 20) == (0.5 * (0.5 * 1.5 + 0.5 * 3.5) + 0.5 * 5.5)
    assert smoothed_loss(lines, 100, 10) == (((((1 + 2) / 2 + 3) / 2 + 4) / 2 + 5) / 2 + 6) / 2
    del lines[3]  # skipped: its window has the other one
    assert smoothed_loss(lines, 100, 20) == 0.5 * (0.5 * 1.5 + 0.5 * 3.0) + 0.5 * 5.5


def write_branch(directory: Path, size: int, seed: int, loss: float, validation: float) -> Branch:
    """A ledger of 80 tokens behind 100, of one loss throughout, and a line before that, which is the run's."""
    place = directory / f"{size}-{seed}"
    place.mkdir()
    lines = [{"update": 10, "tokens": 100, "loss": 99.0, "learning_rate": 1.0, "validation/held_out/loss": None}]
    for n in range(1, 80 // size + 1):
        end = validation if n == 80 // size else None
        lines.append(
            {**lines[0], "update": 10 + n, "tokens": 100 + n * size, "loss": loss, "validation/held_out/loss": end}
        )
    (place / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Branch(size / 20, size, seed, place, 10 + 80 // size)


def test_differences_are_to_the_best_smaller_budget_seed_by_seed(tmp_path: Path) -> None:
    """Seeds differ by 1 nat, since their text does; budgets of one seed by little."""
    given = [(40, 4.030, 5.03), (10, 4.010, 5.01), (20, 4.000, 5.0)]
    branches = [
        write_branch(tmp_path, size, seed, loss + seed + (0.002 if (size, seed) == (40, 2) else 0), end)
        for size, loss, end in given
        for seed in (1, 2)
    ]
    small, middle, large = compare(branches, 100)
    assert [small.tokens_per_update, middle.tokens_per_update, large.tokens_per_update] == [10, 20, 40]
    assert (small.updates, middle.updates, large.updates) == (8, 4, 2)
    assert (small.difference, middle.difference) == (0, 0), "each is the best so far"
    assert large.difference == pytest.approx(0.031)
    assert large.difference_sd == pytest.approx(0.002 / 2**0.5)
    assert large.validation_difference == pytest.approx(0.03)
    assert "40" in table([small, middle, large]).splitlines()[3]


def test_the_largest_budget_is_the_last_before_one_that_loses() -> None:
    budgets = [budget(1000, 0), budget(2000, 0.004), budget(4000, 0.03), budget(8000, 0.005)]
    assert largest_without_loss(budgets, 0.01) is budgets[1]
    assert verdict(budgets, 0.01) == "largest budget that loses at most 0.01 nats: 2,000 tokens per update"
    assert "at least 2,000" in verdict(budgets[:2], 0.01)
    assert "within two standard deviations of the tolerance: 2,000;" in verdict(
        [budgets[0], budget(2000, 0.004, 0.0031)], 0.01
    )
    assert "one seed does not say" in verdict([budget(1000, 0, None)], 0.01)
