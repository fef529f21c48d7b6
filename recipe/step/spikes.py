"""Spikes of the loss or the gradient norm, found by robust statistics over the updates before them."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from recipe.errors import DIVERGED_EXIT_CODE, RecipeError
from recipe.run.ledger import LedgerEntry, with_lower_rate
from recipe.run.run import Run

# The median absolute deviation of a normal distribution times this is its standard deviation.
_DEVIATIONS_PER_MAD = 1.4826
# In a window of almost equal values anything would be far away, so a deviation counts as at least this share of the median.
_SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True)
class Spike:
    """An update whose loss or gradient norm is far above those before it."""

    loss: float  # of the update
    grad_norm: float  # of the update
    loss_score: float  # robust standard deviations above the median of the window
    grad_norm_score: float  # robust standard deviations above the median of the window
    window: int  # updates that it was compared with

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} and gradient norm {self.grad_norm:.4f} are {self.loss_score:.1f} and "
            f"{self.grad_norm_score:.1f} robust standard deviations above the median of the {self.window} updates before"
        )


class SpikeDetector:
    """Compares each update with the window before it; the same on every rank, since loss and gradient norm are.

    OLMo 2 (OLMo et al., 2024, section 3) counts values at least 7 standard deviations from a rolling mean; the median and its
    absolute deviation are not moved by the spikes themselves.

    `recent` is [loss, gradient norm] of the updates before, if the run goes on.
    """

    def __init__(self, run: Run, recent: Iterable[list[float]] = ()) -> None:
        self.run, self.settings = run, run.config.stability
        self.recent = deque(recent, maxlen=self.settings.spike_window)

    def check(self, entry: LedgerEntry) -> Spike | None:
        """The spike that an update is, if it is one; None too while the window is not full. It joins the window if finite.

        Raises:
            RecipeError: it is one, and `stability.on_spike` is stop.
        """
        if self.run.plan.phase_at(entry.update).first_update == entry.update:
            self.recent.clear()  # with another budget, loss and norm have another noise
        spike = self.find(entry.loss, entry.grad_norm)
        if spike:
            self.run.console.say(f"update {entry.update:,}: {spike}")
            self.run.ledger.event("spike", entry.update, **asdict(spike))
            if self.settings.on_spike == "stop":
                ways = (
                    "stability.on_spike = stop: the same command with --stability.on_spike rollback leaves out the blocks that "
                    "led to it, with continue it goes on regardless, both from the last checkpoint"
                )
                raise spike_error(self.run, entry.update, spike, ways)
        return spike

    def find(self, loss: float | None, grad_norm: float | None) -> Spike | None:
        """As `check`, without a word."""
        if loss is None or grad_norm is None or not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return None
        window = list(self.recent)
        self.recent.append([loss, grad_norm])
        if len(window) < self.settings.spike_window:
            return None
        losses, norms = zip(*window, strict=True)
        spike = Spike(loss, grad_norm, robust_score(loss, losses), robust_score(grad_norm, norms), len(window))
        return spike if max(spike.loss_score, spike.grad_norm_score) >= self.settings.spike_score else None


def spike_error(run: Run, update: int, spike: Spike, ways: str) -> RecipeError:
    """The error that ends a run at a spike: why it does, and the ways on."""
    return RecipeError(f"update {update}: {spike}; {ways}; {with_lower_rate(run.config)}", exit_code=DIVERGED_EXIT_CODE)


def robust_score(value: float, window: Sequence[float]) -> float:
    """(value - median) / (1.4826 median absolute deviation) of a window."""
    middle = median(window)
    deviation = _DEVIATIONS_PER_MAD * median(abs(other - middle) for other in window)
    return (value - middle) / max(deviation, _SMALLEST_DEVIATION * abs(middle), 1e-12)
