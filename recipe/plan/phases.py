"""The phases of a run: between two changes of `batch.schedule` all updates have one budget. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from recipe.config.settings import BudgetChange, Config
from recipe.plan.budget import UpdatePlan
from recipe.plan.schedule import beta2_of

_RATE_FACTORS = {"none": lambda ratio: 1.0, "sqrt": math.sqrt, "linear": float}


@dataclass(frozen=True)
class Phase:
    """Updates of one budget."""

    first_update: int  # from 1
    tokens_before: int  # target tokens that the updates before it have
    update: UpdatePlan  # how each of its updates is divided
    rate_factor: float = 1.0  # of the learning rate
    beta2: float | None = None  # of AdamW


def make_phases(config: Config, world_size: int, micro_batch_size: int) -> tuple[Phase, ...]:
    """The phases of a run that never ends. A change takes effect with the first update that begins at or after its tokens.

    Raises:
        RecipeError: a budget that does not divide.
    """
    batch, optimizer, length = config.batch, config.optimizer, config.data.sequence_length
    phases: list[Phase] = []
    for number, change in enumerate((BudgetChange(0, batch.tokens_per_update), *batch.schedule), start=-1):
        setting = "batch.tokens_per_update" if number < 0 else f"batch.schedule[{number}].tokens_per_update"
        update = UpdatePlan(change.tokens_per_update, length, batch.lanes, world_size, micro_batch_size, setting)
        first, tokens = 1, 0
        if phases:
            last, size = phases[-1], phases[-1].update.tokens_per_update
            updates = max(0, -(-(change.from_tokens - last.tokens_before) // size))
            first, tokens = last.first_update + updates, last.tokens_before + updates * size
            if not updates:  # two changes within one update: the second counts
                phases.pop()
        factor = _RATE_FACTORS[config.schedule.learning_rate_rule](change.tokens_per_update / batch.tokens_per_update)
        is_adam = optimizer.name != "sgd"
        beta2 = beta2_of(change.tokens_per_update, optimizer, batch.tokens_per_update) if is_adam else None
        phases.append(Phase(first, tokens, update, factor, beta2))
    return tuple(phases)


def phase_at(phases: Sequence[Phase], update: int) -> Phase:
    """The phase that an update, from 1, belongs to."""
    return next(phase for phase in reversed(phases) if phase.first_update <= max(update, 1))


def tokens_after(phases: Sequence[Phase], update: int) -> int:
    """Target tokens of the updates up to this one; 0 of none."""
    phase = phase_at(phases, update)
    return phase.tokens_before + (update - phase.first_update + 1) * phase.update.tokens_per_update


def updates_for(phases: Sequence[Phase], tokens: int) -> int:
    """The least number of updates that have so many target tokens, one at least."""
    phase = next(phase for phase in reversed(phases) if phase.tokens_before < tokens)
    return phase.first_update - 1 - (phase.tokens_before - tokens) // phase.update.tokens_per_update
