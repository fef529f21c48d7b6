"""A `batch.schedule` to paste into another run, from the gradient noise scale that this one has measured."""

from recipe.config.settings import BudgetChange
from recipe.report.record import Record

LEAST_SHARE = 0.02  # of the run, between two changes, and the largest update


def rising_budget(record: Record) -> list[BudgetChange]:
    """Twice the budget from where the scale's low end was above that, in two measured updates in a row behind the warm-up.

    So each new update is still half noise or more. None for a run that has a schedule already.
    """
    config, total = record.config, record.plan.total_tokens
    if config.batch.schedule:
        return []
    budget, last_change, is_above = config.batch.tokens_per_update, 0, False
    changes: list[BudgetChange] = []
    rows = record.updates[["tokens", "gradient_noise_scale_tokens_low"]].dropna()
    for tokens, low in rows[rows["tokens"] >= config.schedule.warmup_tokens].itertuples(index=False):
        was_above, is_above = is_above, low > 2 * budget
        is_due = not changes or tokens - last_change >= LEAST_SHARE * total
        if is_above and was_above and is_due and 2 * budget <= LEAST_SHARE * total and tokens < total:
            budget, last_change, is_above = 2 * budget, int(tokens), False
            changes.append(BudgetChange(last_change, budget))
    return changes
