"""Published fits of the best batch and learning rate: one table, to be replaced when better ones appear. Imports no torch.

They were made for other architectures (RMSNorm, SwiGLU, QK-norm), and they differ by several times where they overlap.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RunSize:
    """What the fits ask of a run."""

    parameters: int  # N: all of them, the tied output layer once
    inner_parameters: int  # n: without embeddings
    tokens: int  # D: target tokens of the whole run

    @property
    def flops(self) -> float:
        """C, arithmetic of the run: 6 N D, within 7 % of the count that leaves out embeddings and has attention."""
        return 6.0 * self.parameters * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Fit:
    """A published fit: `value(size)` is tokens per update, a peak learning rate, or a share of the run."""

    source: str  # author and year
    citation: str
    formula: str
    value: Callable[[RunSize], float]
    ranges: Mapping[str, tuple[float, float]]  # attributes of RunSize -> what was measured for the fit
    is_verified: bool = (
        True  # constants seen in the authors' own text, code or data; else they are as others report them
    )

    def beyond(self, size: RunSize) -> list[str]:
        """The ranges that a run is outside: `60 M to 1 B parameters`."""
        units = {"inner_parameters": "parameters", "flops": "FLOP", "tokens_per_parameter": "tokens per parameter"}
        return [
            f"{short(low)} to {short(high)} {units.get(name, name)}"
            for name, (low, high) in self.ranges.items()
            if not low <= getattr(size, name) <= high
        ]

    def origin(self, size: RunSize) -> str:
        """`0.58 D^0.571 (arXiv:2503.04715), beyond its 60 M to 1 B parameters`."""
        beyond = f", beyond its {self.beyond(size)[0]}" if self.beyond(size) else ""
        return f"{self.formula} ({self.citation}{'' if self.is_verified else ', as reported'}){beyond}"


def short(number: float) -> str:
    """60 M, 3.3 B, 1e+17."""
    for letter, scale in (("B", 1e9), ("M", 1e6)):
        if scale <= number < 1e12:
            return f"{number / scale:g} {letter}"
    return f"{number:g}"


_BERGSMA = "arXiv:2505.13738"
_BERGSMA_RANGE = {"parameters": (111e6, 3.3e9), "tokens_per_parameter": (20.0, 1280.0)}
_BI = "arXiv:2401.02954"
_BI_RANGE = {"flops": (1e17, 2e19)}  # tried at 1e20 too; everything within 0.25 % of the best loss counts as best
_LI = "arXiv:2503.04715"
_LI_RANGE = {"inner_parameters": (60e6, 1e9), "tokens": (2e9, 100e9)}
_PORIAN = "arXiv:2406.19146"
_PORIAN_RANGE = {"parameters": (25e6, 110e6), "tokens": (0.5e9, 2.2e9)}  # at 20 tokens per parameter
BEST_TOKENS_PER_UPDATE = (
    Fit("Li 2025", _LI, "0.58 D^0.571", lambda run: 0.58 * run.tokens**0.571, _LI_RANGE),
    Fit(
        "Bergsma 2025",
        _BERGSMA,
        "2,048 x 0.0306 D^0.383",
        lambda run: 2048 * 0.0306 * run.tokens**0.383,
        _BERGSMA_RANGE,
        is_verified=False,
    ),
    Fit("Bi 2024", _BI, "0.2920 (6 N D)^0.3271", lambda run: 0.2920 * run.flops**0.3271, _BI_RANGE),
    Fit(
        "Porian 2024",
        _PORIAN,
        "2,048 x 160 (N / 108 M)^(2/3)",
        lambda run: 2048 * 160 * (run.parameters / 108e6) ** (2 / 3),
        _PORIAN_RANGE,
    ),
)
# The batch that needs 20 % more tokens to the same loss than a small one. It depends on D, hardly on N.
CRITICAL_TOKENS_PER_UPDATE = Fit(
    "Zhang 2024",
    "arXiv:2410.21676",
    "512 x 22.9 (D / 1 M)^0.468",
    lambda run: 512 * 22.9 * (run.tokens / 1e6) ** 0.468,
    {"parameters": (85e6, 1.2e9), "tokens": (1.7e9, 24.6e9)},
)
BEST_LEARNING_RATE = (
    Fit(
        "Li 2025",
        _LI,
        "1.79 n^-0.713 D^0.307",
        lambda run: 1.79 * run.inner_parameters**-0.713 * run.tokens**0.307,
        _LI_RANGE,
    ),
    Fit("Bi 2024", _BI, "0.3118 (6 N D)^-0.1250", lambda run: 0.3118 * run.flops**-0.1250, _BI_RANGE),
    Fit(
        "Porian 2024",
        _PORIAN,
        "0.0047 (N / 108 M)^(-1/3)",
        lambda run: 0.0047 * (run.parameters / 108e6) ** (-1 / 3),
        _PORIAN_RANGE,
    ),
)
# Of the run, over which AdamW's weight decay averages where that is best; in muP.
BEST_AVERAGING_SHARE = Fit(
    "Bergsma 2025",
    _BERGSMA,
    "1.084 (D / N)^-0.527",
    lambda run: 1.084 * run.tokens_per_parameter**-0.527,
    _BERGSMA_RANGE,
    is_verified=False,
)
# The tests behind "smaller updates are as good per token if beta2 keeps its memory" (Marek et al., 2025, arXiv:2507.07101): a
# model of 30 M parameters with everything tuned, 124 M with its rate tuned, 1.3 B against an untuned baseline.
SMALL_UPDATES_TRIED = (30e6, 1.32e9)


def models_of_the_fits() -> str:
    """`25 M to 3.3 B`."""
    ranges = [fit.ranges for fit in (*BEST_TOKENS_PER_UPDATE, CRITICAL_TOKENS_PER_UPDATE)]
    limits = [limit for of in ranges for name, limit in of.items() if name.endswith("parameters")]
    return f"{short(min(low for low, _ in limits))} to {short(max(high for _, high in limits))}"
