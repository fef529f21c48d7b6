"""The runs of the study of update sizes: which there are, and how they are trained and kept."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import write_json
from recipe.config.settings import HELD_OUT
from recipe.errors import DIVERGED_EXIT_CODE, RecipeError, run_command
from recipe.run.ledger import LEDGER, read_lines

NOISE = "gradient_noise_scale_tokens"
Outcome = dict[str, Any]  # of a run: settings, exit_code, seconds, tokens, losses, validation_loss, noise


@dataclass(frozen=True)
class Study:
    """What is varied. The rates tried for updates of B tokens are `factors` x `rate` (B / `rate_budget`)^`exponent`."""

    preset: str = "configs/quickstart.yaml"
    total_tokens: int = 983_040
    budgets: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768)
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    rate: float = 5e-3
    rate_budget: int = 4096
    exponent: float = 0.35
    half_life_tokens: int = 55_351  # of the second moment: beta2 0.95 at 4,096 tokens per update
    fixed_beta2: float = 0.95
    seeds: tuple[int, ...] = (1, 2, 3)
    fixed_beta2_budgets: tuple[int, ...] = (1024, 2048, 16_384, 32_768)
    hot_budgets: tuple[int, ...] = (2048, 32_768)  # trained at 4 times their best rate
    schedules: Mapping[str, tuple[tuple[float, int], ...]] = field(  # (share of the run, tokens per update from there)
        default_factory=lambda: {
            "two steps": ((0, 2048), (1 / 3, 8192), (2 / 3, 32_768)),
            "late step": ((0, 4096), (0.75, 16_384)),
        }
    )
    settings: Mapping[str, Any] = field(default_factory=dict)  # of every run, over what `common` says

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every run: the same lanes, so that all read the same text in the same order."""
        return {
            "run.parity_check": False,
            "batch.lanes": 4,
            "schedule.total_tokens": self.total_tokens,
            "schedule.warmup_tokens": self.total_tokens // 6,
            "evaluation.every_tokens": self.total_tokens,
            "evaluation.sample_tokens": None,
            "checkpoint.every_tokens": None,
            "checkpoint.every_minutes": None,
            **self.settings,
        }

    def rate_of(self, budget: int, factor: float) -> float:
        """A rate of the grid."""
        return factor * self.rate * (budget / self.rate_budget) ** self.exponent


@dataclass(frozen=True)
class Trial:
    """One run."""

    name: str
    budget: int  # tokens per update, at the start
    rate: float
    seed: int
    settings: Mapping[str, Any]  # all that differ from the preset


def _trial(study: Study, name: str, budget: int, rate: float, seed: int, **more: Any) -> Trial:
    own = {"batch.tokens_per_update": budget, "optimizer.learning_rate": float(f"{rate:.4g}"), "run.seed": seed}
    memory = {"optimizer.beta2_half_life_tokens": study.half_life_tokens}
    return Trial(name, budget, rate, seed, {**study.common, **own, **memory, **more})


def rates(study: Study, best: Mapping[int, float]) -> Iterator[Trial]:
    """Every rate of every budget."""
    for budget in study.budgets:
        for factor in study.factors:
            yield _trial(study, rate_name(budget, factor), budget, study.rate_of(budget, factor), study.seeds[0])


def seeds(study: Study, best: Mapping[int, float]) -> Iterator[Trial]:
    """The best rate of each budget again."""
    for budget in study.budgets:
        for seed in study.seeds[1:]:
            yield _trial(study, seed_name(budget, seed), budget, best[budget], seed)


def fixed_beta2(study: Study, best: Mapping[int, float]) -> Iterator[Trial]:
    """beta2 as it is, in place of its memory in tokens."""
    for budget in study.fixed_beta2_budgets:
        beta2 = {"optimizer.beta2": study.fixed_beta2, "optimizer.beta2_half_life_tokens": None}
        yield _trial(study, f"beta2-{budget}", budget, best[budget], study.seeds[0], **beta2)


def hot(study: Study, best: Mapping[int, float]) -> Iterator[Trial]:
    """Four times the best rate."""
    for budget in study.hot_budgets:
        yield _trial(study, f"hot-{budget}", budget, 4 * best[budget], study.seeds[0])


def schedules(study: Study, best: Mapping[int, float]) -> Iterator[Trial]:
    """Updates that grow, with the best rate of the first size, which grows with the root of the size."""
    for name, steps in study.schedules.items():
        (_, first), *_ = steps
        phases = [
            {"from_tokens": round(share * study.total_tokens), "tokens_per_update": size} for share, size in steps[1:]
        ]
        for seed in study.seeds:
            yield _trial(study, f"{name}-{seed}", first, best[first], seed, **{"batch.schedule": phases})


PARTS = {part.__name__: part for part in (rates, seeds, fixed_beta2, hot, schedules)}


def rate_name(budget: int, factor: float) -> str:
    """The trial of a rate."""
    return f"rate-{budget}-{factor:g}"


def seed_name(budget: int, seed: int) -> str:
    """The trial of a later seed."""
    return f"seed-{budget}-{seed}"


def best_rates(study: Study, outcomes: Mapping[str, Outcome]) -> dict[int, float]:
    """The rate of the lowest final validation loss, of each budget whose rates are all done."""
    best = {}
    for budget in study.budgets:
        losses = {factor: outcomes.get(rate_name(budget, factor)) for factor in study.factors}
        if all(losses.values()):
            factor = min(losses, key=lambda factor: final_loss(losses[factor]))
            best[budget] = study.rate_of(budget, factor)
    return best


def final_loss(outcome: Outcome | None) -> float:
    """Validation loss at the end; infinite if the run did not get there."""
    loss = outcome["validation_loss"] if outcome else None
    return math.inf if loss is None else float(loss)


class Results:
    """The outcomes that are on the disk, one file each, and the process that makes more.

    Args:
        directory: of the outcomes, and of what all runs share of the text.
    """

    def __init__(self, study: Study, directory: Path) -> None:
        self.study, self.directory = study, directory
        os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # or pyarrow starts a thread, which no fork has
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.batch.warm"])

    def read(self, trial: Trial) -> Outcome | None:
        """The outcome of a trial; None if there is none with these settings."""
        try:
            outcome: Outcome = json.loads((self.directory / f"{trial.name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return outcome if outcome["settings"] == json.loads(json.dumps(trial.settings)) else None

    def all(self) -> dict[str, Outcome]:
        """Everything that is done, by name; what needs a best rate that is not known yet is left out."""
        done: dict[str, Outcome] = {}
        for part in PARTS.values():
            try:
                found = {trial.name: self.read(trial) for trial in part(self.study, best_rates(self.study, done))}
            except KeyError:  # a best rate
                continue
            done |= {name: outcome for name, outcome in found.items() if outcome}
        return done

    def complete(self, parts: Sequence[str]) -> None:
        """Train what is missing of these parts, and say how it goes.

        Raises:
            RecipeError: the rates have to be tried first; or a run has ended with another error than that it diverged.
        """
        for name in parts:
            try:
                trials = list(PARTS[name](self.study, best_rates(self.study, self.all())))
            except KeyError as budget:
                raise RecipeError(
                    f"{name} takes the best rate of {budget} tokens per update: run --only rates first"
                ) from None
            for number, trial in enumerate(trials, start=1):
                if self.read(trial) is None:
                    outcome = self._train(trial)
                    write_json(self.directory / f"{trial.name}.json", outcome)
                    loss, seconds = final_loss(outcome), outcome["seconds"]
                    print(f"{name} {number}/{len(trials)}: {trial.name}, {loss:.3f} nats, {seconds:.0f} s", flush=True)

    def _train(self, trial: Trial) -> Outcome:
        directory, log = self.directory / "running", self.directory / f"{trial.name}.log"
        shutil.rmtree(directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        settings = {
            **trial.settings,
            "run.directory": str(directory),
            "data.cache_directory": str(self.directory / "cache"),
        }
        values = (value if isinstance(value, str) else json.dumps(value) for value in settings.values())
        flags = [text for name, value in zip(settings, values, strict=True) for text in (f"--{name}", value)]
        started = time.perf_counter()
        process = self._context.Process(target=train, args=(["--config", self.study.preset, *flags], str(log)))
        process.start()
        process.join()
        seconds = time.perf_counter() - started
        if process.exitcode not in (0, DIVERGED_EXIT_CODE):
            raise RecipeError(f"{trial.name} has ended with code {process.exitcode}: {log} says why")
        outcome = outcome_of(read_lines(directory / LEDGER)) if (directory / LEDGER).exists() else outcome_of([])
        shutil.rmtree(directory)
        return {"settings": trial.settings, "exit_code": process.exitcode, "seconds": seconds, **outcome}


def train(arguments: list[str], log: str) -> None:
    """`recipe/train.py` in this process, which writes into a file."""
    with open(log, "w", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.argv = ["recipe/train.py", *arguments]
    from recipe.train import main

    run_command(main)


def outcome_of(lines: Sequence[Mapping[str, Any]]) -> Outcome:
    """What is kept of a ledger."""
    updates = [line for line in lines if line["update"] > 0]
    last = updates[-1] if updates else {}
    noise = {name: last[name] for name in (NOISE, f"{NOISE}_low", f"{NOISE}_high", "expected_cosine") if name in last}
    return {
        "tokens": [line["tokens"] for line in updates],
        "losses": [line["loss"] if line["loss"] is None else round(line["loss"], 5) for line in updates],
        "validation_loss": last.get(f"validation/{HELD_OUT}/loss"),
        "noise": noise,
    }
