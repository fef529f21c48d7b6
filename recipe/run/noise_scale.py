"""The gradient noise scale: from sums over micro-batches to the ledger's columns (docs/batch.md). Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from statistics import NormalDist
from typing import Any

from recipe.run.ledger import LedgerEntry
from recipe.run.run import Run

HALF_LIFE_UPDATES, HALF_LIFE_SHARE = 8, 0.01  # measured updates, and share of the run's tokens: the longer of the two
FEWEST_UPDATES = 3  # with fewer there is no interval, and no number without one
_NORMAL = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class GroupSums:
    """What the groups of an update add up to, over all ranks: measured micro-batches that have a target.

    The gradient is that of (ranks / targets of the update) x the summed loss of the group.
    """

    square: float  # sum over groups of (squared norm of the gradient / targets of the group)
    targets: float  # unmasked, of these groups
    groups: float
    alone_square: float  # of one group alone
    alone_targets: float

    def columns(self, grad_norm: float, targets: float, ranks: int) -> dict[str, Any]:
        """The ledger's columns of an update: unbiased, also for groups of unequal size, and each may be negative.

        `grad_norm` is that of the whole update, which has so many unmasked targets.
        """
        square = grad_norm**2

        def per_token(of_groups: float, held: float, groups: float) -> float | None:
            """The trace of the covariance of one token's gradient; None for less than two groups in the update."""
            free = groups - held / targets
            return (of_groups * (targets / ranks) ** 2 - held * square) / free if groups and free > 0 else None

        s2 = per_token(self.square, self.targets, self.groups)
        alone = per_token(self.alone_square, self.alone_targets, float(self.alone_targets > 0))
        return {
            "noise_s2": s2,
            "noise_g2": None if s2 is None else square - s2 / targets,
            "noise_groups": int(self.groups) or None,
            "noise_first_s2": None if s2 is None else alone,
        }


@dataclass(frozen=True)
class Smoothed:
    """Sums over updates, whose weight halves with every half-life. The noise scale is s2 / g2, its interval that of g2 / s2.

    One updates' ratio is worthless, and so is their mean: of both the means are taken first.
    """

    tokens: int = 0  # at the last update in it
    weight: float = 0.0
    weight_2: float = 0.0  # of squared weights, as in the last three
    s2: float = 0.0
    g2: float = 0.0
    s2_s2: float = 0.0
    s2_g2: float = 0.0
    g2_g2: float = 0.0

    def add(self, tokens: int, s2: float, g2: float, half_life_tokens: float = math.inf) -> Smoothed:
        """With one update more, that ends at so many tokens."""
        old = 0.5 ** ((tokens - self.tokens) / half_life_tokens)
        return Smoothed(
            tokens,
            self.weight * old + 1,
            self.weight_2 * old**2 + 1,
            self.s2 * old + s2,
            self.g2 * old + g2,
            self.s2_s2 * old**2 + s2 * s2,
            self.s2_g2 * old**2 + s2 * g2,
            self.g2_g2 * old**2 + g2 * g2,
        )

    def scale(self) -> NoiseScale | None:
        """None if it is too early."""
        updates = self.weight**2 / self.weight_2 if self.weight else 0.0  # as many of equal weight have this error
        if round(updates) < FEWEST_UPDATES or self.s2 <= 0:
            return None
        inverse = self.g2 / self.s2
        residuals = self.g2_g2 - 2 * inverse * self.s2_g2 + inverse**2 * self.s2_s2
        error = math.sqrt(max(residuals, 0.0) * updates / (updates - 1)) / self.s2
        return NoiseScale.of(inverse, error * student(updates - 1))


@dataclass(frozen=True)
class NoiseScale:
    """Tokens at which an update's noise is as large as its gradient, with its 95 % interval."""

    tokens: float | None  # None: the estimate of 1 / tokens is not above 0
    low: float | None
    high: float | None  # None: above `low`, and not determined yet

    @classmethod
    def of(cls, inverse: float, margin: float) -> NoiseScale:
        """Of 1 / tokens and half of its interval, which is nearly normal where that of tokens is not."""
        return cls(*(1 / value if value > 0 else None for value in (inverse, inverse + margin, inverse - margin)))

    def columns(self, tokens: int) -> dict[str, Any]:
        """The ledger's columns, of an update of so many tokens."""
        snr = tokens / self.tokens if self.tokens else None
        return {
            "gradient_noise_scale_tokens": self.tokens,
            "gradient_noise_scale_tokens_low": self.low,
            "gradient_noise_scale_tokens_high": self.high,
            "gradient_snr": snr,
            "expected_cosine": math.sqrt(snr / (1 + snr)) if snr else None,
        }


def student(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, to 1 % from 3 degrees of freedom on (Abramowitz and Stegun, 26.7.5)."""
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


class NoiseColumns:
    """Adds to each measured update what its and earlier updates' noise come to; the same on every rank.

    `sums` are those of the updates before, if the run goes on. A skipped update is left out.
    """

    def __init__(self, run: Run, sums: Sequence[float] = ()) -> None:
        self.run, self._smoothed = run, Smoothed(int(sums[0]), *sums[1:]) if sums else Smoothed()

    @property
    def sums(self) -> list[float]:
        """For a checkpoint; none before the first measured update."""
        return list(astuple(self._smoothed)) if self._smoothed.weight else []

    def add_to(self, entry: LedgerEntry) -> LedgerEntry:
        """The entry with its smoothed columns."""
        s2, g2, every = entry.noise_s2, entry.noise_g2, self.run.config.log.noise_scale_every
        if not entry.is_finite or s2 is None or g2 is None or not math.isfinite(s2 + g2) or not every:
            return entry
        tokens = entry.target_tokens or 0
        half_life = max(HALF_LIFE_UPDATES * every * tokens, HALF_LIFE_SHARE * self.run.plan.total_tokens)
        self._smoothed = self._smoothed.add(entry.tokens, s2, g2, half_life)
        scale = self._smoothed.scale()
        if scale is None:
            return entry
        return replace(entry, **scale.columns(tokens))
