"""Branches of one checkpoint, compared at equal tokens: the loss of each budget, and the largest one that loses nothing.

The method is that of Merrill et al., 2025 (https://arxiv.org/abs/2505.23971): a run goes on with several budgets, and their
smoothed losses are compared. Imports no torch.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config.settings import HELD_OUT
from recipe.errors import RecipeError
from recipe.format import aligned
from recipe.run.ledger import LEDGER, read_lines

SMOOTHING = 0.5  # weight of the newest value, as Merrill et al. have it


@dataclass(frozen=True)
class Branch:
    """One budget on one stretch of the data."""

    multiple: float  # of the budget of the run that it leaves
    tokens_per_update: int
    seed: int  # which stretch, from 1
    directory: Path
    last_update: int


@dataclass(frozen=True)
class Budget:
    """The branches of one budget. Differences are to the best budget up to this one, seed by seed: both have read the same."""

    multiple: float
    tokens_per_update: int
    updates: int
    learning_rate: float  # of the last update
    losses: list[float]  # smoothed, of each seed, in nats per token
    validation_losses: list[float]  # at the end; none without validation
    difference: float = 0.0  # of the smoothed losses, the mean over seeds
    difference_sd: float | None = None  # over seeds; None for one seed
    validation_difference: float | None = None


def smoothed_loss(lines: Sequence[dict[str, Any]], start: int, window: int) -> float:
    """The training loss behind `start` tokens: means over windows of so many tokens, each smoothed with those before it.

    Over windows of the largest budget, so that each mean is over the same text in all branches.

    Raises:
        RecipeError: every update of a window was skipped.
    """
    smoothed = None
    for _, group in itertools.groupby(lines, key=lambda line: (line["tokens"] - start - 1) // window):
        mean = statistics.fmean(line["loss"] for line in group)
        smoothed = mean if smoothed is None else SMOOTHING * mean + (1 - SMOOTHING) * smoothed
    if smoothed is None:
        raise RecipeError("a branch has no update in its ledger: all were skipped")
    return smoothed


def compare(branches: Sequence[Branch], start: int) -> list[Budget]:
    """The budgets, the smallest first, of complete branches that begin at `start` tokens.

    Raises:
        RecipeError: a ledger that cannot be read.
    """
    window = max(branch.tokens_per_update for branch in branches)
    budgets: list[Budget] = []
    best = None
    for _, group in itertools.groupby(sorted(branches, key=_order), key=lambda branch: branch.tokens_per_update):
        of_budget = list(group)
        ledgers = [[line for line in read_lines(b.directory / LEDGER) if line["tokens"] > start] for b in of_budget]
        ends = [ledger[-1].get(f"validation/{HELD_OUT}/loss") for ledger in ledgers]
        budget = Budget(
            multiple=of_budget[0].multiple,
            tokens_per_update=of_budget[0].tokens_per_update,
            updates=len(ledgers[0]),
            learning_rate=ledgers[0][-1]["learning_rate"],
            losses=[smoothed_loss(ledger, start, window) for ledger in ledgers],
            validation_losses=[end for end in ends if end is not None],
        )
        if best is None or statistics.fmean(budget.losses) < statistics.fmean(best.losses):
            best = budget
        budgets.append(_with_differences(budget, best))
    return budgets


def _order(branch: Branch) -> tuple[int, int]:
    return branch.tokens_per_update, branch.seed


def _with_differences(budget: Budget, best: Budget) -> Budget:
    apart = [loss - other for loss, other in zip(budget.losses, best.losses, strict=True)]
    validation = zip(budget.validation_losses, best.validation_losses, strict=True)
    of_validation = [loss - other for loss, other in validation]
    return Budget(
        **{
            **vars(budget),
            "difference": statistics.fmean(apart),
            "difference_sd": statistics.stdev(apart) if len(apart) > 1 else None,
            "validation_difference": statistics.fmean(of_validation) if of_validation else None,
        }
    )


def largest_without_loss(budgets: Sequence[Budget], tolerance: float) -> Budget:
    """The largest budget that loses no more than `tolerance`, as none below it does. The smallest loses nothing."""
    return list(itertools.takewhile(lambda budget: budget.difference <= tolerance, budgets))[-1]


def verdict(budgets: Sequence[Budget], tolerance: float) -> str:
    """What the comparison says, and whether it has settled it."""
    found = largest_without_loss(budgets, tolerance)
    at_least = "at least " if found is budgets[-1] else ""
    lines = [
        f"largest budget that loses at most {tolerance:g} nats: {at_least}{found.tokens_per_update:,} tokens per update"
    ]
    near = [b for b in budgets if b.difference_sd and abs(b.difference - tolerance) < 2 * b.difference_sd]
    if len(found.losses) == 1:
        lines.append("one seed does not say how far chance alone would take them apart: give --seeds 2 or more")
    elif near:
        sizes = ", ".join(f"{budget.tokens_per_update:,}" for budget in near)
        lines.append(f"within two standard deviations of the tolerance: {sizes}; give more --seeds, or more --tokens")
    return "\n".join(lines)


def table(budgets: Sequence[Budget]) -> str:
    """A row for each budget."""
    rows = [
        ("multiple", "tokens per update", "updates", "rate", "loss", "difference", "sd", "validation", "difference")
    ]
    for budget in budgets:
        validation, apart = budget.validation_losses, budget.validation_difference
        rows.append(
            (
                f"{budget.multiple:g}",
                f"{budget.tokens_per_update:,}",
                f"{budget.updates:,}",
                f"{budget.learning_rate:.3g}",
                f"{statistics.fmean(budget.losses):.4f}",
                f"{budget.difference:+.4f}",
                "" if budget.difference_sd is None else f"{budget.difference_sd:.4f}",
                f"{statistics.fmean(validation):.4f}" if validation else "",
                "" if apart is None else f"{apart:+.4f}",
            )
        )
    return aligned(rows)
