"""The runs of the study of update sizes: which there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.trials import Outcome, Trial, Trials, final_loss, nothing_but_training
from recipe.errors import RecipeError


@dataclass(frozen=True)
class Study:
    """What is varied. The rates tried for updates of B tokens are `factors` x `rate` (B / `rate_budget`)^`exponent`."""

    total_tokens: int = 983_040
    budgets: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768)
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    furthest: tuple[float, float] = (1 / 16, 16.0)  # factors that are tried at most
    rate: float = 5e-3
    rate_budget: int = 4096
    exponent: float = 0.35
    half_life_tokens: int = 55_351  # of the second moment: beta2 0.95 at 4,096 tokens per update
    fixed_beta2: float = 0.95
    seeds: tuple[int, ...] = (1, 2, 3)
    fixed_beta2_budgets: tuple[int, ...] = (1024, 2048, 16_384, 32_768)
    hot_budgets: tuple[int, ...] = (2048, 32_768)  # trained at 4 times their best rate
    schedules: Mapping[str, tuple[tuple[float, int], ...]] = field(  # (share of the run, tokens per update from there)
        default_factory=lambda: {
            "two steps": ((0, 2048), (1 / 3, 8192), (2 / 3, 32_768)),
            "late step": ((0, 4096), (0.75, 16_384)),
        }
    )
    settings: Mapping[str, Any] = field(default_factory=dict)  # of every run, over what `common` says

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every run: the same lanes, so that all read the same text in the same order, and AdamW as everybody
        has it, whatever the preset takes."""
        return {
            **nothing_but_training(self.total_tokens),
            "batch.lanes": 4,
            "schedule.warmup_tokens": self.total_tokens // 6,
            "schedule.shape": "cosine",
            "schedule.final_learning_rate_fraction": 0.1,
            "optimizer.name": "adamw",
            **self.settings,
        }

    def rate_of(self, budget: int, factor: float) -> float:
        """A rate of the grid."""
        return factor * self.rate * (budget / self.rate_budget) ** self.exponent


def _trial(study: Study, name: str, budget: int, rate: float, seed: int, **more: Any) -> Trial:
    own = {"batch.tokens_per_update": budget, "optimizer.learning_rate": float(f"{rate:.4g}"), "run.seed": seed}
    memory = {"optimizer.beta2_half_life_tokens": study.half_life_tokens}
    return Trial(name, {**study.common, **own, **memory, **more})


def rates(study: Study, outcomes: Mapping[str, Outcome]) -> Iterator[Trial]:
    """Every rate of every budget, and further ones where the best is the smallest or the largest."""
    for budget in study.budgets:
        for factor in factors_of(study, budget, outcomes):
            yield _trial(study, rate_name(budget, factor), budget, study.rate_of(budget, factor), study.seeds[0])


def seeds(study: Study, outcomes: Mapping[str, Outcome]) -> Iterator[Trial]:
    """The best rate of each budget again."""
    best = best_rates(study, outcomes)
    for budget in study.budgets:
        for seed in study.seeds[1:]:
            yield _trial(study, seed_name(budget, seed), budget, best[budget], seed)


def fixed_beta2(study: Study, outcomes: Mapping[str, Outcome]) -> Iterator[Trial]:
    """beta2 as it is, in place of its memory in tokens."""
    best = best_rates(study, outcomes)
    for budget in study.fixed_beta2_budgets:
        beta2 = {"optimizer.beta2": study.fixed_beta2, "optimizer.beta2_half_life_tokens": None}
        yield _trial(study, f"beta2-{budget}", budget, best[budget], study.seeds[0], **beta2)


def hot(study: Study, outcomes: Mapping[str, Outcome]) -> Iterator[Trial]:
    """Four times the best rate."""
    best = best_rates(study, outcomes)
    for budget in study.hot_budgets:
        yield _trial(study, f"hot-{budget}", budget, 4 * best[budget], study.seeds[0])


def schedules(study: Study, outcomes: Mapping[str, Outcome]) -> Iterator[Trial]:
    """Updates that grow, with the best rate of the first size, which grows with the root of the size."""
    best = best_rates(study, outcomes)
    for name, steps in study.schedules.items():
        (_, first), *_ = steps
        phases = [
            {"from_tokens": round(share * study.total_tokens), "tokens_per_update": size} for share, size in steps[1:]
        ]
        for seed in study.seeds:
            yield _trial(study, f"{name}-{seed}", first, best[first], seed, **{"batch.schedule": phases})


PARTS = {part.__name__: part for part in (rates, seeds, fixed_beta2, hot, schedules)}


def rate_name(budget: int, factor: float) -> str:
    """The trial of a rate."""
    return f"rate-{budget}-{factor:g}"


def seed_name(budget: int, seed: int) -> str:
    """The trial of a later seed."""
    return f"seed-{budget}-{seed}"


def best_rates(study: Study, outcomes: Mapping[str, Outcome]) -> dict[int, float]:
    """The rate of the lowest final validation loss, of each budget whose rates are all done."""
    best = {}
    for budget in study.budgets:
        factors = factors_of(study, budget, outcomes)
        if all(rate_name(budget, factor) in outcomes for factor in factors):
            best[budget] = study.rate_of(budget, best_factor(budget, factors, outcomes))
    return best


def best_factor(budget: int, factors: Sequence[float], outcomes: Mapping[str, Outcome]) -> float:
    """The one whose run has the lowest final validation loss."""
    return min(factors, key=lambda factor: final_loss(outcomes.get(rate_name(budget, factor))))


def factors_of(study: Study, budget: int, outcomes: Mapping[str, Outcome]) -> list[float]:
    """Those that are tried: `study.factors`, and beyond them until the best, as far as known, is neither first nor last."""
    factors = sorted(study.factors)
    while all(rate_name(budget, factor) in outcomes for factor in factors):
        best = best_factor(budget, factors, outcomes)
        if best == factors[0] and best > study.furthest[0]:
            factors.insert(0, best / 2)
        elif best == factors[-1] and best < study.furthest[1]:
            factors.append(2 * best)
        else:
            break
    return factors


class Results:
    """The outcomes of a study, in which some runs take the best rate of others."""

    def __init__(self, study: Study, trials: Trials) -> None:
        self.study, self.trials = study, trials

    def all(self) -> dict[str, Outcome]:
        """Everything that is done, by name; what needs a best rate that is not known yet is left out."""
        done: dict[str, Outcome] = {}
        for part in PARTS.values():
            with suppress(KeyError):  # a best rate
                while len(done) < len(done := done | self.trials.outcomes(part(self.study, done))):
                    pass  # what is found may ask for more
        return done

    def complete(self, parts: Sequence[str]) -> None:
        """Train what is missing of these parts, and say how it goes.

        Raises:
            RecipeError: the rates have to be tried first; or what `Trials.complete` raises.
        """
        for name in parts:
            while self.trials.complete(self._of(name), name):
                pass  # what is found may ask for more

    def _of(self, name: str) -> list[Trial]:
        try:
            return list(PARTS[name](self.study, self.all()))
        except KeyError as budget:
            raise RecipeError(
                f"{name} takes the best rate of {budget} tokens per update: run --only rates first"
            ) from None
