"""Spikes of the loss or the gradient norm: told by robust statistics over the updates before them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from recipe.config.settings import StabilityConfig

# The median absolute deviation of a normal distribution times this is its standard deviation.
_DEVIATIONS_PER_MAD = 1.4826
# In a window of almost equal values anything would be far away: no deviation counts as less than this share of the median.
_SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True)
class Spike:
    """An update whose loss or gradient norm is far above those before it.

    Args:
        loss, grad_norm: of the update.
        loss_score, grad_norm_score: robust standard deviations above the median of the window.
        window: updates that it was compared with.
    """

    loss: float
    grad_norm: float
    loss_score: float
    grad_norm_score: float
    window: int

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} and gradient norm {self.grad_norm:.4f} are {self.loss_score:.1f} and "
            f"{self.grad_norm_score:.1f} robust standard deviations above the median of the {self.window} updates before"
        )


class SpikeDetector:
    """Compares each update with the window before it; the same on every rank, since loss and gradient norm are.

    OLMo 2 (OLMo et al., 2024, section 3) counts values at least 7 standard deviations from a rolling mean; the median and its
    absolute deviation are not moved by the spikes themselves.

    Args:
        settings: window and score.
        recent: [loss, gradient norm] of the updates before, where the run goes on.
    """

    def __init__(self, settings: StabilityConfig, recent: Iterable[list[float]] = ()) -> None:
        self.settings = settings
        self.recent = deque(recent, maxlen=settings.spike_window)

    def check(self, loss: float, grad_norm: float) -> Spike | None:
        """The spike that an update is, if it is one; None too while the window is not full. It joins the window if finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        window = list(self.recent)
        self.recent.append([loss, grad_norm])
        if len(window) < self.settings.spike_window:
            return None
        losses, norms = zip(*window, strict=True)
        spike = Spike(loss, grad_norm, robust_score(loss, losses), robust_score(grad_norm, norms), len(window))
        return spike if max(spike.loss_score, spike.grad_norm_score) >= self.settings.spike_score else None


def robust_score(value: float, window: Sequence[float]) -> float:
    """(value - median) / (1.4826 median absolute deviation) of a window."""
    middle = median(window)
    deviation = _DEVIATIONS_PER_MAD * median(abs(other - middle) for other in window)
    return (value - middle) / max(deviation, _SMALLEST_DEVIATION * abs(middle), 1e-12)
