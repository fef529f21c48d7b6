"""Learning rate and times as functions of tokens, never of ranks. Imports no torch."""

import math
from collections.abc import Callable

from recipe.config.settings import OptimizerConfig, ScheduleConfig

# Below it the second moment is hardly more than the last gradient.
SMALLEST_BETA2 = 0.8


def stated_tokens(schedule: ScheduleConfig, parameters: int) -> int:
    """Target tokens of the whole run, before they are rounded up to whole updates."""
    return schedule.total_tokens or math.ceil(schedule.tokens_per_parameter * parameters)


def learning_rate(tokens: int, total_tokens: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of the update that ends at `tokens` target tokens.

    It rises linearly from 0 to the peak at `warmup_tokens`, and falls from `decay_start` on to `final_learning_rate_fraction`
    x peak at `total_tokens`.
    """
    peak, floor = optimizer.learning_rate, optimizer.learning_rate * schedule.final_learning_rate_fraction
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    if tokens >= total_tokens:
        return floor
    start = decay_start(total_tokens, schedule)
    if schedule.shape == "wsd" and tokens <= start:  # whatever the length of the run
        return peak
    return floor + (peak - floor) * _SHAPES[schedule.shape]((tokens - start) / (total_tokens - start))


# Of the way from the peak to the end: what is left of it after a share of the decay. wsd: Haegele et al., 2024.
_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "linear": lambda share: 1.0 - share,
    "wsd": lambda share: 1.0 - math.sqrt(share),
}


def decay_start(total_tokens: int, schedule: ScheduleConfig) -> int:
    """Tokens at which the rate begins to fall."""
    if schedule.shape != "wsd":
        return schedule.warmup_tokens
    return total_tokens - (schedule.decay_tokens or total_tokens // 5)


def beta2_of(tokens_per_update: int, optimizer: OptimizerConfig, given_for: int | None = None) -> float:
    """AdamW's beta2 in an update of so many tokens.

    By its half-life; without one it is `optimizer.beta2` for updates of `given_for` tokens (None: these), and keeps its memory
    in tokens for others. Marek et al., 2025.
    """
    if optimizer.beta2_half_life_tokens is not None:
        return max(SMALLEST_BETA2, 0.5 ** (tokens_per_update / optimizer.beta2_half_life_tokens))
    kept = optimizer.beta2 ** (tokens_per_update / (given_for or tokens_per_update))
    return max(kept, min(SMALLEST_BETA2, optimizer.beta2))


def half_life(tokens_per_update: int, beta: float) -> float:
    """Tokens after which a gradient counts half in a moment that decays by `beta` in an update; 0 if it keeps nothing."""
    return tokens_per_update * math.log(0.5) / math.log(beta) if beta else 0.0


def crosses(tokens_before: int, tokens_after: int, every_tokens: int) -> bool:
    """True if a multiple of `every_tokens` lies in (tokens_before, tokens_after]."""
    return tokens_after // every_tokens > tokens_before // every_tokens
