"""Muon against AdamW, each with its best learning rate: `python -m benchmarks.optimizers`, about an hour on two cores.

On the quickstart's model and on one of 10 M parameters, the same text, updates and schedule. Rates by factors of two with one
seed; the best of each with two seeds more. Outcomes are kept in --runs: the same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.results import table, write_result
from benchmarks.speedrun import ONE_MICRO_BATCH, PLAIN, QUICK
from benchmarks.trials import Outcome, Trial, Trials, final_loss, nothing_but_training, trials_command_line
from recipe.errors import run_command

SEEDS = (1, 2, 3)
QUICK_TOKENS = 16_384
# By name: what differs from `benchmarks/plain.yaml`, and target tokens of a run
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "10 M": ({"model.n_layer": 8, "model.n_embd": 320, "model.n_head": 5}, 327_680),
    "1.1 M": ({}, 983_040),
}
RATES = {
    ("10 M", "adamw"): (5e-4, 1e-3, 2e-3),
    ("10 M", "muon"): (2.5e-3, 5e-3),
    ("1.1 M", "adamw"): (2.5e-3, 5e-3, 10e-3),
    ("1.1 M", "muon"): (5e-3, 10e-3, 20e-3),
}
Kind = tuple[str, str]  # model and optimizer


def trial(kind: Kind, rate: float, seed: int, is_quick: bool = False) -> Trial:
    """A run of a model and an optimizer, with a warm-up of a sixth and a cosine to a tenth."""
    shape, tokens = MODELS[kind[0]]
    tokens = QUICK_TOKENS if is_quick else tokens
    own = {"optimizer.name": kind[1], "optimizer.learning_rate": rate, "run.seed": seed}
    settings = {
        **PLAIN,
        **ONE_MICRO_BATCH,
        **shape,
        **own,
        **nothing_but_training(tokens),
        "schedule.warmup_tokens": tokens // 6,
    }
    name = f"{kind[0]}-{kind[1]}-{rate:g}-{seed}".replace(" ", "")
    return Trial(name, {**settings, **(QUICK if is_quick else {})})


def report(done: Mapping[Kind, Mapping[float, list[Outcome]]]) -> str:
    """Markdown. `done`: by model and optimizer, and by rate, an outcome for each seed, the tuning's first."""
    rows, seconds = [], {}
    for (model, optimizer), of_rates in done.items():
        best = best_rate(of_rates)
        losses = [final_loss(outcome) for outcome in of_rates[best]]
        seconds[model, optimizer] = mean(outcome["train_seconds"] for outcome in of_rates[best])
        rows.append(
            {
                "parameters": model,
                "optimizer": optimizer,
                "one seed, by rate": ", ".join(
                    f"{final_loss(outcomes[0]):.3f} at {rate:g}" for rate, outcomes in sorted(of_rates.items())
                ),
                f"{len(losses)} seeds at the best": ", ".join(f"{loss:.3f}" for loss in losses),
                "mean": f"{mean(losses):.3f}",
                "deviation": f"{stdev(losses):.3f}",
                "best is at the edge": "yes" if best in (min(of_rates), max(of_rates)) else "no",
            }
        )
    slower = ", ".join(
        f"{seconds[model, 'muon'] / seconds[model, 'adamw']:.2f} times as long of {model} parameters"
        for model in MODELS
        if (model, "muon") in seconds
    )
    lengths = ", ".join(f"{MODELS[model][1]:,} tokens of {model} parameters" for model in MODELS)
    return f"""Muon against AdamW
The same text, updates of {PLAIN["batch.tokens_per_update"]:,} tokens, warm-up of a sixth, cosine to a tenth:
{lengths}. Validation loss at the end, in nats per token:

{table(rows)}
Muon's updates took {slower} as AdamW's, with what ran beside.
"""


def best_rate(of_rates: Mapping[float, list[Outcome]]) -> float:
    """That with the lowest loss of the first seed."""
    return min(of_rates, key=lambda rate: final_loss(of_rates[rate][0]))


def main() -> None:
    options = trials_command_line("optimizers", __doc__, "runs/optimizers").parse_args()
    directory = options.runs or Path("runs/optimizers-quick" if options.quick else "runs/optimizers")
    results = Trials("benchmarks/plain.yaml", directory, options.at_once)

    def outcomes(trials: list[Trial]) -> list[Outcome]:
        found = results.outcomes(trials)
        return [found[one.name] for one in trials]

    tuning = {
        kind: {rate: trial(kind, rate, SEEDS[0], options.quick) for rate in rates} for kind, rates in RATES.items()
    }
    results.complete([one for of_rates in tuning.values() for one in of_rates.values()], "rates")
    done = {kind: {rate: outcomes([one]) for rate, one in of_rates.items()} for kind, of_rates in tuning.items()}
    more = {
        kind: [trial(kind, best_rate(of_rates), seed, options.quick) for seed in SEEDS[1:]]
        for kind, of_rates in done.items()
    }
    results.complete([one for of_kind in more.values() for one in of_kind], "seeds")
    for kind, trials in more.items():
        done[kind][best_rate(done[kind])] += outcomes(trials)
    runs = {f"{model}, {optimizer}": of_rates for (model, optimizer), of_rates in done.items()}
    write_result("optimizers", options, {"runs": runs}, report(done))


if __name__ == "__main__":
    run_command(main)
