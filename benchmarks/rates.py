"""Which learning rate suits which length of a run: `python -m benchmarks.rates`, about an hour on two cores.

One model, of AdamW as in the presets, on 2 and on 20 tokens per parameter, each with rates by factors of two; of the best of
the long runs one with more weight decay. Outcomes are kept in --runs: the same command goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import table, write_result
from benchmarks.speedrun import ONE_MICRO_BATCH, PLAIN, QUICK
from benchmarks.trials import Outcome, Trial, Trials, final_loss, nothing_but_training, trials_command_line
from recipe.errors import run_command

Settings = dict[str, Any]
PARAMETERS = 350_000  # roughly: of the quickstart's model, 64 wide
SHAPE: Settings = {"model.n_embd": 64, "model.n_head": 2}
TOKENS_PER_PARAMETER = (2, 20)
RATES = {2: (2e-3, 4e-3, 8e-3, 16e-3), 20: (1e-3, 2e-3, 4e-3, 8e-3)}
WARMUP_UPDATES = 50  # 2 % of the short runs would be seven
DECAY = 0.1  # that of the presets
AVERAGING_SHARE = 0.22  # of the run, over which weight decay averages where Bergsma et al. (2025) found it best


def tokens_of(per_parameter: int, is_quick: bool) -> int:
    """Target tokens of a run: a whole number of updates."""
    size = int(PLAIN["batch.tokens_per_update"])
    return (4 if is_quick else PARAMETERS * per_parameter // size) * size


def trial(per_parameter: int, rate: float, decay: float = DECAY, is_quick: bool = False) -> Trial:
    """A run at a peak rate, with a warm-up and a cosine to a tenth."""
    tokens, warmup = tokens_of(per_parameter, is_quick), WARMUP_UPDATES * int(PLAIN["batch.tokens_per_update"])
    own = {"optimizer.learning_rate": rate, "optimizer.weight_decay": decay, "schedule.warmup_tokens": warmup}
    settings = {**PLAIN, **ONE_MICRO_BATCH, **SHAPE, **own, **nothing_but_training(tokens), "run.seed": 1}
    return Trial(f"{per_parameter}-{rate:g}-{decay:g}", {**settings, **(QUICK if is_quick else {})})


def rate_trials(is_quick: bool) -> dict[int, list[Trial]]:
    """By tokens per parameter: a trial for each rate."""
    return {
        length: [trial(length, rate, is_quick=is_quick) for rate in RATES[length]] for length in TOKENS_PER_PARAMETER
    }


def best_rate(losses: Mapping[float, float]) -> float:
    """Where the parabola through the three points around the lowest loss has its minimum, over the logarithm of the rate.

    The rate itself if it is the first or the last.
    """
    rates = sorted(losses)
    middle = min(range(len(rates)), key=lambda number: losses[rates[number]])
    if middle in (0, len(rates) - 1):
        return rates[middle]
    (x0, x1, x2), (y0, y1, y2) = zip(*((math.log(r), losses[r]) for r in rates[middle - 1 : middle + 2]), strict=True)
    left, right = (x1 - x0) ** 2 * (y1 - y2), (x1 - x2) ** 2 * (y1 - y0)
    curvature = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
    return math.exp(x1 - (left - right) / (2 * curvature))


def decay_of(rate: float, tokens: int) -> float:
    """The weight decay that averages over AVERAGING_SHARE of the run at this rate."""
    return 1 / (rate * AVERAGING_SHARE * tokens / int(PLAIN["batch.tokens_per_update"]))


def report(done: Mapping[int, Mapping[float, float]], decays: Mapping[float, float]) -> str:
    """Markdown. `done` are losses by tokens per parameter and rate; `decays` those of the long run by weight decay."""
    short, long = TOKENS_PER_PARAMETER
    best, size = {length: best_rate(losses) for length, losses in done.items()}, int(PLAIN["batch.tokens_per_update"])
    rate = min(done[long], key=lambda rate: done[long][rate])
    exponent = math.log(best[long] / best[short]) / math.log(long / short)
    edges = [f"{n} tokens per parameter" for n in done if best[n] in (min(done[n]), max(done[n]))]
    rows = [
        {
            "tokens per parameter": str(length),
            **{
                f"{rate:g}": f"{losses[rate]:.3f}" if rate in losses else ""
                for rate in sorted({*RATES[short], *RATES[long]})
            },
            "best rate": f"{best[length]:.2g}",
        }
        for length, losses in done.items()
    ]
    decay_rows = [{"weight decay": f"{decay:.2g}", "loss": f"{loss:.3f}"} for decay, loss in sorted(decays.items())]
    edge = f" The best of {' and of '.join(edges)} is at the edge of what was tried." if edges else ""
    return f"""Which learning rate suits which length of a run
AdamW as in the presets (beta2 0.95, weight decay {DECAY}, warm-up of {WARMUP_UPDATES} updates, cosine to a tenth),
updates of {size:,} tokens, the quickstart's model and text, 64 wide: {PARAMETERS:,} parameters. Validation loss at the
end, in nats per token, of one seed, by peak rate:

{table(rows)}
The best rate, by a parabola through the three around it, goes with the length of the run to the power of {exponent:.2f}.{edge}

Of {long} tokens per parameter at {rate:g}, by weight decay; the larger one averages over {AVERAGING_SHARE} of the run:

{table(decay_rows)}
"""


def main() -> None:
    options = trials_command_line("rates", __doc__, "runs/rates").parse_args()
    directory = options.runs or Path("runs/rates-quick" if options.quick else "runs/rates")
    results, of_rates = Trials("benchmarks/plain.yaml", directory, options.at_once), rate_trials(options.quick)
    results.complete([one for length in of_rates.values() for one in length], "rates")
    done = {
        length: {one.settings["optimizer.learning_rate"]: final_loss(results.read(one)) for one in all_of}
        for length, all_of in of_rates.items()
    }
    long = TOKENS_PER_PARAMETER[-1]
    rate = min(done[long], key=lambda rate: done[long][rate])
    more = decay_of(rate, tokens_of(long, options.quick))
    last = trial(long, rate, more, options.quick)
    results.complete([last], "decay")
    outcomes: dict[str, Outcome | None] = {
        one.name: results.read(one) for all_of in of_rates.values() for one in all_of
    }
    outcomes[last.name] = results.read(last)
    decays = {DECAY: done[long][rate], more: final_loss(results.read(last))}
    write_result("rates", options, {"runs": outcomes}, report(done, decays))


if __name__ == "__main__":
    run_command(main)
