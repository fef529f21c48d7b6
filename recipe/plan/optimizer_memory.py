"""How long the optimizer remembers, in tokens: the number that should stay when the budget changes. Imports no torch."""

from recipe.config.settings import Config
from recipe.format import Number, short_count
from recipe.plan.batch_advice import run_size
from recipe.plan.batch_fits import BEST_AVERAGING_SHARE
from recipe.plan.run_plan import RunPlan
from recipe.plan.schedule import half_life

# Rate x decay below which there is none that a run could notice.
_SMALLEST_DECAY = 1e-15


def optimizer_numbers(config: Config, plan: RunPlan) -> list[Number]:
    """Half-lives of AdamW's moments, and the time over which weight decay averages, at the peak rate, as a share of the run.

    They are those of the first phase; what others have is in the text.
    """
    optimizer, phases = config.optimizer, plan.reached_phases
    first, numbers = phases[0].update.tokens_per_update, []
    betas = {
        "beta1": [optimizer.beta1 for _ in phases],
        "beta2": [phase.beta2 for phase in phases if phase.beta2 is not None],
    }
    for name, values in betas.items() if phases[0].beta2 is not None else ():
        lives = [half_life(p.update.tokens_per_update, beta) for p, beta in zip(phases, values, strict=True)]
        text = f"{{}} tokens: {first:,} x ln 0.5 / ln {values[0]:.6g}" if values[0] else "none"
        numbers.append(Number(f"{name}_half_life", round(lives[0]), "tokens", text + _then(lives, ",.0f")))
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    if rate * decay > _SMALLEST_DECAY:
        updates = [1 / (rate * phase.rate_factor * decay) for phase in phases]
        shares = [n * p.update.tokens_per_update / plan.total_tokens for n, p in zip(updates, phases, strict=True)]
        size, fit = run_size(config, plan), BEST_AVERAGING_SHARE
        best = f"; best in muP {fit.value(size):.2g}: {fit.source}, {fit.origin(size)}"
        text = f"{{}} of the run: 1 / ({rate:g} x {decay:g}) = {short_count(updates[0])} updates{_then(shares, ',.3g')}{best}"
        numbers.append(Number("weight_decay_averages_over", shares[0], "runs", text))
    return numbers


def _then(values: list[float], form: str) -> str:
    """What later phases have, if that is something else."""
    shown = [f"{value:{form}}" for value in values]
    return f"; then {', '.join(shown[1:])}" if len(set(shown)) > 1 else ""
