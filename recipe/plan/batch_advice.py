"""What can be said about the size of an update before anything runs. Imports no torch."""

from recipe.config.settings import Config
from recipe.format import Number
from recipe.plan.batch_fits import (
    BEST_LEARNING_RATE,
    BEST_TOKENS_PER_UPDATE,
    CRITICAL_TOKENS_PER_UPDATE,
    SMALL_UPDATES_TRIED,
    RunSize,
    models_of_the_fits,
)
from recipe.plan.devices import Machine
from recipe.plan.memory import parameter_count, ranks_of_host, state_bytes
from recipe.plan.run_plan import RunPlan
from recipe.plan.scaling import exposed_reduction
from recipe.plan.schedule import beta2_of

OVERHEAD = 0.02  # of an update's time, for what it does once
MEMORY_SHARE = 0.9  # of the bandwidth in the data sheet: what an H100 reached (docs/results/2026-11-27-gpu.md)
# How often a step reads or writes a value of each parameter: parameter, gradient and two moments read, all but the gradient
# written; the norm reads the gradient, and clipping reads and writes it.
_ACCESSES = {"adamw": 7 + 3, "muon": 7 + 3, "sgd": 3 + 3}  # Muon: at most, its matrices have one moment
# FLOPs of Muon's step for a block of width d, over d^3: of five iterations for four matrices of d x d, 2 + 2 + 2 each, and for
# two of d x 4 d, 8 + 2 + 8 each. Every rank does all of it.
_NEWTON_SCHULZ = 5 * (4 * 6 + 2 * 18)


def batch_numbers(config: Config, plan: RunPlan, machine: Machine) -> list[Number]:
    """This update, the least that suits the devices, what others found best, and what a smaller one would do."""
    tokens = plan.update.tokens_per_update
    size = run_size(config, plan)
    floor = floor_number(config, plan, machine)
    sizes = ", then ".join(f"{phase.update.tokens_per_update:,}" for phase in plan.reached_phases)
    return [
        Number("this_run", tokens, "tokens", f"{sizes} tokens per update, {plan.total_updates:,} updates"),
        floor,
        *_fit_numbers(size, config.optimizer.learning_rate),
        *_smaller_update(config, plan, floor.value),
    ]


def run_size(config: Config, plan: RunPlan) -> RunSize:
    """What published fits ask of a run."""
    inner = parameter_count(config.model, n_positions=0) - config.model.vocab_size * config.model.n_embd
    return RunSize(plan.parameters, inner, plan.total_tokens)


def floor_number(config: Config, plan: RunPlan, machine: Machine) -> Number:
    """The tokens per update from which optimizer and reduction take `OVERHEAD` of its time at most."""

    def unknown(why: str) -> Number:
        return Number("floor", None, "tokens", f"not known{why}")

    device, ranks = machine.device, plan.update.world_size
    if device is None or device.memory_bytes_per_second is None:
        return unknown(" for a CPU" if device else ": give --device h100, or another one")
    if machine.flops_per_second is None:
        return unknown(": give --flops")
    tokens_per_second = machine.flops_per_second / plan.flops_per_token  # of a rank
    accesses = _ACCESSES[config.optimizer.name] * state_bytes(config)[0]
    step = accesses / (MEMORY_SHARE * device.memory_bytes_per_second)
    if config.optimizer.name == "muon":
        step += _NEWTON_SCHULZ * config.model.n_layer * config.model.n_embd**3 / machine.flops_per_second
    text, exposed = f"the optimizer's {1000 * step:.3g} ms take", 0.0
    if ranks > 1:
        links = machine.links(ranks, ranks_of_host(ranks))
        if links is None:
            return unknown(": give --link_gb_per_second, the bandwidth between ranks")
        exposed = exposed_reduction(config, plan.update, plan.update.sequence_length / tokens_per_second, links)
        text = f"the optimizer's {1000 * step:.3g} ms and the reduction's {1000 * exposed:.3g} ms behind backward take"
    floor = (step + exposed) / OVERHEAD * tokens_per_second * ranks
    below = "; this run is below" if plan.update.tokens_per_update < floor else ""
    text = f"{_rounded(floor)}: from there {text} 2 % of an update at most (estimated, {device.name}){below}"
    return Number("floor", floor, "tokens", text)


def _fit_numbers(size: RunSize, rate: float) -> list[Number]:
    """What others found best for runs of this size, how much they differ, and from where tokens are lost."""
    critical, fits = CRITICAL_TOKENS_PER_UPDATE, BEST_TOKENS_PER_UPDATE
    values = [fit.value(size) for fit in fits]
    rates = {fit.source: fit.value(size) for fit in BEST_LEARNING_RATE}
    lines = [
        (f"best_by_{fit.source}", value, "tokens", f"{_rounded(value)} = {fit.origin(size)}")
        for fit, value in zip(fits, values, strict=True)
    ]
    limit, factor = critical.value(size), max(values) / min(values)
    best = ", ".join(f"{value:.1e} ({source})" for source, value in rates.items())
    lines += [
        (
            "these_differ",
            factor,
            "times",
            f"by {factor:.1f}; a smaller update than the best loses little, a larger one much ({critical.source})",
        ),
        (
            f"limit_by_{critical.source}",
            limit,
            "tokens",
            f"{_rounded(limit)} takes 20 % more tokens: {critical.origin(size)}",
        ),
        ("learning_rate", rate, "", f"{rate:.1e}; best in these runs, of other architectures: {best}"),
        *((f"best_rate_by_{source}", value, "", "") for source, value in rates.items()),
    ]
    is_inside = any(not fit.beyond(size) for fit in (critical, *fits))
    numbers = [
        Number(key.replace(" ", "_"), value, unit, text, is_shown=is_inside and text != "")
        for key, value, unit, text in lines
    ]
    if is_inside:
        return numbers
    outside = (
        f"none was made for {size.parameters:,} parameters and {size.tokens:,} tokens: their models have "
        f"{models_of_the_fits()} parameters, and most runs 20 tokens for each"
    )
    return [Number("published_fits", None, "", outside), *numbers]


def _smaller_update(config: Config, plan: RunPlan, floor: float | None) -> list[Number]:
    """On one GPU: the smallest half, quarter, ... of this update that is no slower, and the beta2 it wants."""
    tokens, optimizer, (low, high) = plan.update.tokens_per_update, config.optimizer, SMALL_UPDATES_TRIED
    if plan.update.world_size > 1 or len(plan.phases) > 1 or optimizer.name != "adamw":
        return []
    if not low <= plan.parameters <= high:
        return []
    per_lane = plan.update.lanes * plan.update.sequence_length
    smaller = [tokens >> halvings for halvings in range(1, 41) if tokens % (per_lane << halvings) == 0]
    chosen = smaller[:1] if floor is None else [size for size in smaller if size >= floor][-1:]
    numbers = []
    for size in chosen:
        beta2, speed = (
            beta2_of(size, optimizer, tokens),
            "at most 2 % slower here" if floor else "how fast is not known",
        )
        text = f"{{}} tokens are as good per token with beta2 {beta2:.4f} (Marek 2025, arXiv:2507.07101), {speed}"
        numbers += [
            Number("smaller_update", size, "tokens", text),
            Number("beta2_of_the_smaller_update", beta2, "", is_shown=False),
        ]
    if numbers:
        why = "for several devices, to compare with a published batch, or to write low-precision state less often"
        numbers.append(Number("accumulate", None, "", why))
    return numbers


def _rounded(number: float) -> str:
    """To three digits: 517,000."""
    return f"{float(f'{number:.3g}'):,.0f}"
