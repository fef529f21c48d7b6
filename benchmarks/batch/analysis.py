"""What is read from the runs, and by which rule: arithmetic on outcomes. The rule was written before the runs were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.batch.study import Study, best_factor, best_rates, factors_of, rate_name, seed_name
from benchmarks.trials import NOISE, Outcome, final_loss

READING_RULE = (
    "A difference counts if it is more than two standard deviations of seeds: those of the runs with each size's best rate "
    "and three seeds, pooled over the sizes. Otherwise the runs count as equal. A run with one seed is held to the same."
)
DEVIATIONS = 2
SMOOTH_SHARE = 1 / 24  # of the run: losses are averaged over so many tokens, the same for all sizes
LAST_UPDATES = 5  # over which a loss after few updates is averaged


@dataclass(frozen=True)
class Curve:
    """The training loss of a run."""

    updates: list[int]
    tokens: list[int]
    losses: list[float]


def curve(outcome: Outcome) -> Curve:
    """Its finite losses."""
    rows = [
        (update, tokens, loss)
        for update, (tokens, loss) in enumerate(zip(outcome["tokens"], outcome["losses"], strict=True), start=1)
        if loss is not None
    ]
    return Curve([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def best_runs(study: Study, outcomes: Mapping[str, Outcome]) -> dict[int, list[Outcome]]:
    """The runs of each size with its best rate, one for each seed that is done."""
    found = {}
    for budget in best_rates(study, outcomes):
        factor = best_factor(budget, factors_of(study, budget, outcomes), outcomes)
        names = [rate_name(budget, factor), *(seed_name(budget, seed) for seed in study.seeds[1:])]
        found[budget] = [outcomes[name] for name in names if name in outcomes]
    return found


def finals(runs: Sequence[Outcome]) -> list[float]:
    """Their validation losses."""
    return [final_loss(run) for run in runs]


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups, over all that have two finite values; None if none has."""
    used = [[value for value in group if math.isfinite(value)] for group in groups]
    used = [group for group in used if len(group) > 1]
    if not used:
        return None
    squares = sum((len(group) - 1) * stdev(group) ** 2 for group in used)
    return math.sqrt(squares / sum(len(group) - 1 for group in used))


def compare(one: Sequence[float], other: Sequence[float], deviation: float | None) -> int | None:
    """-1 if `one` is lower by the rule, 1 if it is higher, 0 if they count as equal; None if no seeds say what counts."""
    if deviation is None:
        return None
    difference = mean(one) - mean(other) if all(map(math.isfinite, other)) else -math.inf
    return 0 if abs(difference) <= DEVIATIONS * deviation else int(math.copysign(1, difference))


def smoothed(of: Curve, window_tokens: float) -> list[float]:
    """The mean over the updates that end in the last `window_tokens`, at least one."""
    values, first = [], 0
    for last, tokens in enumerate(of.tokens):
        while first < last and of.tokens[first] <= tokens - window_tokens:
            first += 1
        values.append(sum(of.losses[first : last + 1]) / (last + 1 - first))
    return values


def loss_after(of: Curve, updates: int) -> float | None:
    """The mean loss of the `LAST_UPDATES` updates up to this one; None if the run is shorter."""
    values = [
        loss for update, loss in zip(of.updates, of.losses, strict=True) if updates - LAST_UPDATES < update <= updates
    ]
    return mean(values) if values and of.updates[-1] >= updates else None


def roughness(of: Curve) -> float | None:
    """Standard deviation of the loss around its trend in the second half of the run, from second differences.

    A straight trend has none, and independent noise of deviation s has sqrt(6) s. None if there are fewer than 4 of them.
    """
    losses = of.losses[len(of.losses) // 2 :]
    second = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    return math.sqrt(mean(value**2 for value in second) / 6) if len(second) > 3 else None


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the straight line through the logarithms; None of fewer than two."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    x_mean, y_mean = mean(x for x, _ in logs), mean(y for _, y in logs)
    return sum((x - x_mean) * (y - y_mean) for x, y in logs) / sum((x - x_mean) ** 2 for x, _ in logs)


def cost_of_a_loss(study: Study, runs: Mapping[int, Sequence[Outcome]]) -> dict[str, Any]:
    """Updates and tokens that each size needs to the lowest smoothed training loss that all reach, and their hyperbola.

    (S / S_min - 1)(E / E_min - 1) = 1 is S_min / S + E_min / E = 1, so a straight line in 1/S and 1/E.
    """
    window = SMOOTH_SHARE * study.total_tokens
    curves = {budget: [curve(run) for run in of if curve(run).losses] for budget, of in runs.items()}
    smooth = {budget: [(of, smoothed(of, window)) for of in found] for budget, found in curves.items() if found}
    if not smooth:
        return {"loss": None, "points": [], "hyperbola": None}
    target = max(mean(min(values) for _, values in found) for found in smooth.values())
    points = []
    for budget, found in smooth.items():
        reached = [
            next(((u, t) for u, t, value in zip(of.updates, of.tokens, values, strict=True) if value <= target), None)
            for of, values in found
        ]
        there = [point for point in reached if point]
        if there:
            updates, tokens = mean(u for u, _ in there), mean(t for _, t in there)
            points.append({"budget": budget, "updates": updates, "tokens": tokens, "runs": len(there)})
    return {"loss": target, "points": points, "hyperbola": fit_hyperbola([(p["updates"], p["tokens"]) for p in points])}


def fit_hyperbola(points: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """S_min, E_min and their ratio by least squares of 1 = S_min / S + E_min / E; None if there is none with both above 0.

    `misfit` is by how much the right side leaves 1 at most.
    """
    rows = [(1 / updates, 1 / tokens) for updates, tokens in points]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b, determinant = sum(row[0] for row in rows), sum(row[1] for row in rows), aa * bb - ab * ab
    if len(rows) < 3 or determinant <= 1e-12 * aa * bb:
        return None
    updates, tokens = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if updates <= 0 or tokens <= 0:
        return None
    misfit = max(abs(1 - updates * by_updates - tokens * by_tokens) for by_updates, by_tokens in rows)
    critical = tokens / updates
    return {"least_updates": updates, "least_tokens": tokens, "critical_tokens": critical, "misfit": misfit}


def usable_rates(
    study: Study, outcomes: Mapping[str, Outcome], deviation: float | None
) -> dict[int, tuple[float, bool]]:
    """Of each size the largest rate that loses nothing against its best, and whether no larger one was tried."""
    found = {}
    for budget in study.budgets:
        factors = factors_of(study, budget, outcomes)
        tried = {study.rate_of(budget, factor): outcomes.get(rate_name(budget, factor)) for factor in factors}
        hot = outcomes.get(f"hot-{budget}")
        if hot:
            tried[hot["settings"]["optimizer.learning_rate"]] = hot
        losses = {rate: final_loss(outcome) for rate, outcome in tried.items() if outcome}
        if deviation is None or len(losses) < len(study.factors):
            continue
        limit = min(losses.values()) + DEVIATIONS * deviation
        largest = max(rate for rate, loss in losses.items() if loss <= limit)
        found[budget] = (largest, largest == max(losses))
    return found


def noise_scale(outcomes: Sequence[Outcome]) -> dict[str, float] | None:
    """The measured scale at the end of these runs: the mean of its logarithms, and the widest band; None if none has it."""
    measured = [run["noise"] for run in outcomes if run["noise"].get(NOISE)]
    if not measured:
        return None
    highs = [noise.get(f"{NOISE}_high") for noise in measured]
    return {
        "tokens": math.exp(mean(math.log(noise[NOISE]) for noise in measured)),
        "low": min(noise.get(f"{NOISE}_low") or 0.0 for noise in measured),
        "high": max(high or math.inf for high in highs),
    }


def summary(study: Study, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Every number of the page and the pictures."""
    runs = best_runs(study, outcomes)
    deviation = pooled_deviation([finals(of) for of in runs.values()])
    updates = study.total_tokens // max(study.budgets)
    early: dict[int, list[float]] = {}
    for budget, of in runs.items():
        found = [loss_after(curve(run), updates) for run in of]
        early[budget] = [loss for loss in found if loss is not None]
    rough: dict[int, float] = {}
    for budget, of in runs.items():
        values = [value for run in of if (value := roughness(curve(run)))]
        if values:
            rough[budget] = mean(values)
    return {
        "deviation": deviation,
        "best_rates": best_rates(study, outcomes),
        "usable_rates": usable_rates(study, outcomes, deviation),
        "finals": {budget: finals(of) for budget, of in runs.items()},
        "updates": updates,
        "after_updates": early,
        "deviation_after_updates": pooled_deviation(list(early.values())),
        "roughness": rough,
        "roughness_slope": slope(list(rough.items())),
        "cost": cost_of_a_loss(study, runs),
        "noise": {budget: noise_scale(of) for budget, of in runs.items()},
    }
