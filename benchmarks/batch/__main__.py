"""How large should an update be? `python -m benchmarks.batch`: some 50 runs of the quickstart, 40 to 90 minutes on two cores.

Sizes from 1,024 to 32,768 tokens, each with three learning rates, or more until the best is neither the smallest nor the
largest, and its best with two more seeds; beta2 by its memory in tokens, and fixed; four times the best rate; sizes that grow.
Outcomes are kept in --runs: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.batch.analysis import READING_RULE, compare, finals, summary
from benchmarks.batch.pictures import pictures
from benchmarks.batch.study import PARTS, Results, Study, best_rates, factors_of, rate_name
from benchmarks.results import table, write_result
from benchmarks.trials import Outcome, Trials, final_loss, trials_command_line
from recipe.errors import RecipeError, run_command
from recipe.report.charts import library, theme
from recipe.run.ledger import utc_now

QUICK = Study(
    total_tokens=16_384,
    budgets=(256, 512, 1024),
    furthest=(0.5, 2.0),  # no further rates
    rate_budget=512,
    fixed_beta2_budgets=(256,),
    hot_budgets=(1024,),
    schedules={"one step": ((0, 256), (0.5, 512))},
    settings={
        **{"data.sequence_length": 64, "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 2},
        **{"evaluation.tokens": 4096, "batch.micro_batch_size": 4},
    },
)
LESS, MORE, EQUAL = -1, 1, 0


def report(study: Study, outcomes: Mapping[str, Outcome], found: Mapping[str, Any]) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    deviation = found["deviation"]
    spread = "not known yet, so nothing is claimed" if deviation is None else f"{deviation:.3f} nats"
    longest, shortest = (study.total_tokens // size for size in (min(study.budgets), max(study.budgets)))
    small, large, total = min(study.budgets), max(study.budgets), f"{study.total_tokens:,}"
    factors = ", ".join(f"{factor:g}" for factor in study.factors)
    return f"""How large should an update be?
The quickstart, {total} tokens in each run: {longest:,} updates of {small:,} tokens to {shortest:,} of {large:,}.
All runs read the same text in the same order (4 lanes).
Peak rates are {factors} x {study.rate:g} (B / {study.rate_budget:,})^{study.exponent:g} for updates of B tokens, and further
ones by factors of two where the best of these was the smallest or the largest.
beta2 is 2^(-B / {study.half_life_tokens:,}), not below 0.8, unless it says otherwise.

The rule for reading, fixed before the runs: {READING_RULE} One standard deviation is {spread}.

## Four claims for large updates

{_less_noise(found)}
{_smoother(found)}
{_higher_rates(study, outcomes, found)}
{_better(found)}

## Final validation loss, nats per token

{table(_final_table(study, outcomes, found))}
The first columns are one seed with each rate. The last two have the best rate, or four times that; "better", "equal" and
"worse" are against the best rate's seeds, by the rule. An infinite loss is a run that diverged.

{_schedules(study, outcomes, found)}
## To the same training loss

{_cost(found)}
## What this cannot say

{total} tokens are few for this model: far from converged, where small updates win most. The text is one small
source. Rates were tried in steps of {study.factors[1] / study.factors[0]:g}, with the first seed alone, which
flatters the best rate of each size a little. Weight decay, beta1 and the shape of the schedule were not varied.
Updates larger than {large:,} would leave fewer than {shortest}, which no claim could rest on.
"""


def _less_noise(found: Mapping[str, Any]) -> str:
    noise = {size: of for size, of in found["noise"].items() if of}
    text = "1. **Less noise: yes, by arithmetic.** The variance of an update's gradient is that of a token, over its tokens."
    if not noise:
        return f"{text} It was not measured in these runs."
    scales = [f"{size:,} tokens {of['tokens']:,.0f} ({_band(of)})" for size, of in noise.items()]
    ratios = [f"{size / noise[size]['tokens']:.2g} at {size:,}" for size in (min(noise), max(noise))]
    return (
        f"{text} The gradient noise scale, measured at the end of the runs, where larger updates have learned less, in tokens: "
        f"{', '.join(scales)}. The signal is "
        f"{' and '.join(ratios)} tokens times the noise."
    )


def _band(of: Mapping[str, float]) -> str:
    return f"{of['low']:,.0f} to {of['high']:,.0f}" if math.isfinite(of["high"]) else f"above {of['low']:,.0f}"


def _smoother(found: Mapping[str, Any]) -> str:
    rough, slope = found["roughness"], found["roughness_slope"]
    if slope is None:
        return "2. **Smoother curves: not measured.**"
    low, high = min(rough), max(rough)
    verdict = "true, and nothing but arithmetic" if abs(slope + 0.5) <= 0.1 else "true" if slope < 0 else "false"
    return (
        f"2. **Smoother curves: {verdict}.** An update's loss leaves its trend by {rough[low]:.3f} nats at {low:,} tokens and "
        f"{rough[high]:.3f} at {high:,}: as B^{slope:.2f}, where the mean of B tokens has B^-0.50."
    )


def _higher_rates(study: Study, outcomes: Mapping[str, Outcome], found: Mapping[str, Any]) -> str:
    usable = found["usable_rates"]
    title = "3. **Higher stable rates:"
    if len(usable) < 2:
        return f"{title} not determined.**"
    (first, (low, low_is_last)), *_, (_, (high, _)) = usable.items()
    rising = [
        size for size, before in zip(list(usable)[1:], usable, strict=False) if usable[size][0] > usable[before][0]
    ]
    verdict = "false"  # also where the smallest size might take more than was tried
    if high > low and low_is_last:
        verdict = f"not determined, since at {first:,} tokens the largest rate that was tried lost nothing"
    elif high > low:
        verdict = f"true, up to {max(rising):,} tokens"
    rates = ", ".join(
        f"{size:,} tokens {rate:.1e}{' or more' if is_last else ''}" for size, (rate, is_last) in usable.items()
    )
    best = ", ".join(f"{size:,} tokens {rate:.1e}" for size, rate in found["best_rates"].items())
    text = f"{title} {verdict}.** The largest rate that loses nothing against the best: {rates}. The best: {best}."
    for size in study.hot_budgets:
        if hot := outcomes.get(f"hot-{size}"):
            loss, reference = final_loss(hot), mean(found["finals"][size])
            said = f"{loss - reference:+.2f} nats" if math.isfinite(loss) else "it diverged"
            text += f" Four times the best rate at {size:,} tokens: {said}."
    return text


def _better(found: Mapping[str, Any]) -> str:
    return (
        "4. **Better final performance:** at equal tokens "
        f"{_larger_is(found['finals'], found['deviation'], 'the final validation loss')}; at equal updates "
        f"{_larger_is(found['after_updates'], found['deviation_after_updates'], _after(found))}."
    )


def _after(found: Mapping[str, Any]) -> str:
    return f"the training loss around update {found['updates']:,}, where small updates are still in their warm-up,"


def _larger_is(groups: Mapping[int, Sequence[float]], deviation: float | None, what: str) -> str:
    """The verdict, by what the rule says of the smallest and of the largest size against the best."""
    means = {size: mean(values) for size, values in groups.items() if values}
    if deviation is None or len(means) < 2:
        return "**not determined**"
    best = min(means, key=lambda size: means[size])
    equal = [size for size in means if compare(groups[size], groups[best], deviation) == EQUAL]
    verdict = {
        (True, True): "no difference",
        (True, False): "false",
        (False, True): "true",
        (False, False): "neither the smallest nor the largest is best",
    }[min(means) in equal, max(means) in equal]
    values = ", ".join(f"{size:,}: {value:.3f}" for size, value in means.items())
    return (
        f"**{verdict}**: {what} is {values}; equal to the best by the rule: {', '.join(f'{size:,}' for size in equal)}"
    )


def _final_table(study: Study, outcomes: Mapping[str, Outcome], found: Mapping[str, Any]) -> list[dict[str, str]]:
    rows, deviation = [], found["deviation"]
    factors = sorted({factor for size in study.budgets for factor in factors_of(study, size, outcomes)})
    for size in study.budgets:
        losses = {factor: outcomes.get(rate_name(size, factor)) for factor in factors}
        seeds = found["finals"].get(size, [])
        row = {"tokens per update": f"{size:,}", "updates": f"{study.total_tokens // size:,}"}
        row |= {f"x {factor:g}": _loss(outcome) for factor, outcome in losses.items()}
        row |= {
            f"best, {len(study.seeds)} seeds": f"{mean(seeds):.3f} ({min(seeds):.3f}..{max(seeds):.3f})"
            if seeds
            else ""
        }
        fixed = outcomes.get(f"beta2-{size}")
        row["beta2 fixed"] = _loss(fixed) + (
            f", {_against(finals([fixed]), seeds, deviation)}" if fixed and seeds else ""
        )
        row["4 x best"] = _loss(outcomes.get(f"hot-{size}"))
        rows.append(row)
    return rows


def _loss(outcome: Outcome | None) -> str:
    return "" if outcome is None else f"{final_loss(outcome):.3f}"


def _against(one: Sequence[float], other: Sequence[float], deviation: float | None) -> str:
    return {LESS: "better", EQUAL: "equal", MORE: "worse", None: "not determined"}[compare(one, other, deviation)]


def _schedules(study: Study, outcomes: Mapping[str, Outcome], found: Mapping[str, Any]) -> str:
    """Sizes that grow, against the best constant one."""
    constants = found["finals"]
    rows = []
    for name, steps in study.schedules.items():
        runs = finals([outcomes[key] for seed in study.seeds if (key := f"{name}-{seed}") in outcomes])
        if runs and constants:
            best = min(constants, key=lambda size: mean(constants[size]))
            sizes = " -> ".join(f"{size:,}" for _, size in steps)
            updates = len(
                next(outcomes[key] for seed in study.seeds if (key := f"{name}-{seed}") in outcomes)["tokens"]
            )
            row = {"sizes that grow": f"{sizes}, at {', '.join(f'{share:.0%}' for share, _ in steps[1:])}"}
            row |= {"updates": f"{updates:,}", "loss": f"{mean(runs):.3f} ({min(runs):.3f}..{max(runs):.3f})"}
            rows.append({**row, f"against {best:,}": _against(runs, constants[best], found["deviation"])})
    return f"## Sizes that grow\n\n{table(rows)}\n" if rows else ""


def _cost(found: Mapping[str, Any]) -> str:
    cost, hyperbola = found["cost"], found["cost"]["hyperbola"]
    if not cost["points"]:
        return "No run reached one.\n"
    rows = [
        {"tokens per update": f"{p['budget']:,}", "updates": f"{p['updates']:,.0f}", "tokens": f"{p['tokens']:,.0f}"}
        for p in cost["points"]
    ]
    text = (
        f"{cost['loss']:.3f} nats, the lowest that all sizes reach, averaged over 1/24 of the run:\n\n{table(rows)}\n"
    )
    if not hyperbola:
        return f"{text}No hyperbola (S / S_min - 1)(E / E_min - 1) = 1 goes through these points.\n"
    least = f"S_min = {hyperbola['least_updates']:,.0f} updates and E_min = {hyperbola['least_tokens']:,.0f} tokens"
    return (
        f"{text}(S / S_min - 1)(E / E_min - 1) = 1 (McCandlish et al., 2018) with {least}: a critical batch of "
        f"{hyperbola['critical_tokens']:,.0f} tokens. S_min / S + E_min / E, which is 1 on it, leaves that by up to "
        f"{hyperbola['misfit']:.2f} at these points. Here the rate falls as a cosine over all tokens, and a loss "
        "is reached at different places of it; in the theory each point has its own tuned rate.\n"
    )


def study_of(options: argparse.Namespace) -> Study:
    """The study that the flags ask for.

    Raises:
        RecipeError: fewer tokens than the largest size can be trained on.
    """
    study = QUICK if options.quick else Study()
    if options.tokens:
        study = replace(study, total_tokens=options.tokens)
    if study.total_tokens < 8 * max(study.budgets):
        least, size = 8 * max(study.budgets), max(study.budgets)
        raise RecipeError(
            f"--tokens {study.total_tokens:,} are fewer than 8 updates of {size:,} tokens: give {least:,} or more"
        )
    return study


def main() -> None:
    parser = trials_command_line("batch", __doc__, "runs/batch-TOKENS")
    parser.add_argument("--tokens", type=int, help="of each run; 983,040 if it is not given")
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, default=[*PARTS], help="train these alone; none: write the page"
    )
    options = parser.parse_args()
    study = study_of(options)
    library()  # before anything is trained
    directory = options.runs or Path(f"runs/batch-{study.total_tokens}")
    results = Results(study, Trials("benchmarks/plain.yaml", directory, options.at_once))
    results.complete([part for part in PARTS if part in options.only])
    outcomes = results.all()
    if not best_rates(study, outcomes):
        raise RecipeError(f"{directory} has no size whose rates are all done: run --only rates first")
    found = summary(study, outcomes)
    drawn = pictures(study, outcomes, found)
    values = {"study": asdict(study), "summary": found, "runs": outcomes}
    write_result("batch", options, values, report(study, outcomes, found), drawn["all"])
    curves = drawn["curves"].properties(padding=16, config=theme("light"))
    curves.save(options.out / f"{utc_now()[:10]}-batch-curves.png", scale_factor=2)


if __name__ == "__main__":
    run_command(main)
