"""Learning rate and times as functions of tokens, never of ranks. Imports no torch."""

import math

from recipe.config.settings import OptimizerConfig, ScheduleConfig


def total_updates(schedule: ScheduleConfig, parameters: int, tokens_per_update: int) -> int:
    """Updates of the whole run: its tokens, rounded up to whole updates."""
    tokens = schedule.total_tokens or math.ceil(schedule.tokens_per_parameter * parameters)
    return -(-tokens // tokens_per_update)


def learning_rate(tokens: int, total_tokens: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Learning rate of the update that ends at `tokens` target tokens.

    It rises linearly from 0 to the peak at `warmup_tokens`, then falls as half a cosine to
    `final_learning_rate_fraction` x peak at `total_tokens`.
    """
    peak, floor = optimizer.learning_rate, optimizer.learning_rate * schedule.final_learning_rate_fraction
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    if tokens >= total_tokens:
        return floor
    progress = (tokens - schedule.warmup_tokens) / (total_tokens - schedule.warmup_tokens)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def crosses(tokens_before: int, tokens_after: int, every_tokens: int) -> bool:
    """True if a multiple of `every_tokens` lies in (tokens_before, tokens_after]."""
    return tokens_after // every_tokens > tokens_before // every_tokens
