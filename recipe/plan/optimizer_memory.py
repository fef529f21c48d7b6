"""How long the optimizer remembers, in tokens: the number that should stay when the budget changes. Imports no torch."""

from recipe.config.settings import Config
from recipe.format import Number, short_count
from recipe.plan.run_plan import RunPlan
from recipe.plan.schedule import beta2_of, half_life

# Rate x decay below which there is none that a run could notice.
_SMALLEST_DECAY = 1e-15


def optimizer_numbers(config: Config, plan: RunPlan) -> list[Number]:
    """Half-lives of AdamW's moments, and the time over which weight decay averages, at the peak rate, as a share of the run."""
    optimizer, tokens = config.optimizer, plan.update.tokens_per_update
    numbers = []
    if optimizer.name == "adamw":
        for name, beta in (("beta1", optimizer.beta1), ("beta2", beta2_of(tokens, optimizer))):
            text = f"{{}} tokens: {tokens:,} x ln 0.5 / ln {beta:.6g}" if beta else "none"
            numbers.append(Number(f"{name}_half_life", round(half_life(tokens, beta)), "tokens", text))
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    if rate * decay > _SMALLEST_DECAY:
        updates = 1 / (rate * decay)
        text = f"{{}} of the run: 1 / ({rate:g} x {decay:g}) = {short_count(updates)} updates of {plan.total_updates:,}"
        numbers.append(Number("weight_decay_averages_over", updates / plan.total_updates, "runs", text))
    return numbers
