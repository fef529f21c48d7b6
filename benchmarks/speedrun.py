"""What each ingredient of the quickstart gives: `python -m benchmarks.speedrun`, about 25 minutes on two cores.

The same text, model and number of tokens. A plain run, as most recipes have it; each ingredient alone with it; all of them,
added one after the other. The plain run and the whole are trained with three seeds. Outcomes are kept in --runs: the same
command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.results import table, write_result
from benchmarks.trials import Outcome, Trial, Trials, final_loss, nothing_but_training, trials_command_line
from recipe.errors import run_command

Settings = dict[str, Any]
TOKENS = 983_040
SEEDS = (1, 2, 3)
PLAIN: Settings = {
    "batch.tokens_per_update": 4096,
    "batch.lanes": 8,
    "data.shuffle_blocks": 128,
    "optimizer.name": "adamw",
    "optimizer.beta2_half_life_tokens": None,
    "schedule.shape": "cosine",
    "schedule.final_learning_rate_fraction": 0.1,
    "schedule.warmup_tokens": TOKENS // 6,
}
# An update of these is one micro-batch: nothing can be measured of its gradients, and it takes less time.
ONE_MICRO_BATCH: Settings = {"batch.micro_batch_size": 16, "log.noise_scale_every": None}
# The best of those by factors of 1.4 to 2, with one seed.
RATES = {("adamw", 4096): 5e-3, ("adamw", 1024): 3e-3, ("muon", 4096): 1e-2, ("muon", 1024): 7e-3}
# By what is said of them, in the order in which they are added; each has the rate that goes with it.
INGREDIENTS: dict[str, Settings] = {
    "Muon": {"optimizer.name": "muon"},
    "1,024 tokens per update, beta2's memory in tokens": {
        "batch.tokens_per_update": 1024,
        "batch.lanes": 4,
        "optimizer.beta2_half_life_tokens": 300_000,
    },
    "a line to 0, a warm-up of 5 %": {
        "schedule.shape": "linear",
        "schedule.final_learning_rate_fraction": 0,
        "schedule.warmup_tokens": TOKENS // 20,
    },
    "blocks shuffled over all of a lane's": {"data.shuffle_blocks": 1024},
}
QUICK_TOKENS = 16_384
QUICK: Settings = {
    **{"data.sequence_length": 64, "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 2},
    **{"schedule.warmup_tokens": 1024, "evaluation.tokens": 4096},
}


def trials(is_quick: bool = False) -> dict[str, list[Trial]]:
    """Of the plain run, of each ingredient alone, and of the first of them together up to each: one trial for each seed.

    Keys are `plain`, `alone NUMBER` and `together NUMBER`, from 1.
    """
    added = list(accumulate(INGREDIENTS.values(), lambda before, more: before | more))
    kinds = {"plain": Settings()}
    kinds |= {f"alone {number}": more for number, more in enumerate(INGREDIENTS.values(), start=1)}
    kinds |= {f"together {number}": all_of for number, all_of in enumerate(added, start=1)}
    with_seeds = ("plain", f"together {len(added)}")
    shared = nothing_but_training(QUICK_TOKENS) | QUICK if is_quick else nothing_but_training(TOKENS)
    return {
        kind: [
            Trial(
                f"{kind}-{seed}".replace(" ", "-"),
                {**with_rate(PLAIN | own), **shared, "run.seed": seed},
            )
            for seed in (SEEDS if kind in with_seeds else SEEDS[:1])
        ]
        for kind, own in kinds.items()
        if kind != "together 1"  # that is alone 1
    }


def with_rate(settings: Settings) -> Settings:
    """The settings, with the rate of their optimizer and their size of an update."""
    return {
        **settings,
        "optimizer.learning_rate": RATES[settings["optimizer.name"], settings["batch.tokens_per_update"]],
    }


def report(done: Mapping[str, Sequence[Outcome]]) -> str:
    """Markdown, for `benchmarks.results.write_result`; `done` are the outcomes of `trials`."""
    losses = {kind: [final_loss(outcome) for outcome in of] for kind, of in done.items()}
    losses["together 1"] = losses["alone 1"]
    first, whole = losses["plain"], losses[f"together {len(INGREDIENTS)}"]
    before = first[0]
    rows = [{"": "plain", "alone": f"{before:.3f}", "gives": "", "together": f"{before:.3f}", "adds": ""}]
    for number, name in enumerate(INGREDIENTS, start=1):
        alone, together = losses[f"alone {number}"][0], losses[f"together {number}"][0]
        gives, adds = f"{alone - first[0]:+.3f}", f"{together - before:+.3f}"
        rows.append({"": name, "alone": f"{alone:.3f}", "gives": gives, "together": f"{together:.3f}", "adds": adds})
        before = together
    seconds = {kind: mean(outcome["train_seconds"] for outcome in of) for kind, of in done.items()}
    slower = seconds[f"together {len(INGREDIENTS)}"] / seconds["plain"]
    spreads = [
        {
            "": name,
            "validation loss": f"{mean(of):.3f}",
            "of each seed": ", ".join(f"{loss:.3f}" for loss in of),
            "deviation": f"{stdev(of):.3f}",
        }
        for name, of in (("plain", first), ("whole", whole))
    ]
    return f"""What each ingredient of the quickstart gives
{TOKENS:,} tokens of the same text, the same model. Validation loss at the end, in nats per token, of one seed:

{table(rows)}
Of {len(SEEDS)} seeds:

{table(spreads)}
The updates of the whole took {slower:.2f} times as long as those of the plain run, {seconds["plain"]:.0f} s here with whatever
ran beside. Each run has the best of the learning rates that were tried for its optimizer and size of an update, by factors of
1.4 to 2, with one seed.
"""


def main() -> None:
    options = trials_command_line("speedrun", __doc__, "runs/speedrun").parse_args()
    directory = options.runs or Path("runs/speedrun-quick" if options.quick else "runs/speedrun")
    results, all_of = Trials("benchmarks/plain.yaml", directory, options.at_once), trials(options.quick)
    results.complete([trial for of in all_of.values() for trial in of], "speedrun")
    done = {kind: list(results.outcomes(of).values()) for kind, of in all_of.items()}
    write_result("speedrun", options, {"runs": done}, report(done))


if __name__ == "__main__":
    run_command(main)
