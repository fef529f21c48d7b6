"""Trainings of one benchmark that differ in settings: each in a process of its own, its outcome kept in a file.

What is done is not done again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import command_line, write_json
from recipe.config.settings import HELD_OUT
from recipe.errors import DIVERGED_EXIT_CODE, RecipeError, run_command
from recipe.run.ledger import LEDGER, read_lines

NOISE = "gradient_noise_scale_tokens"
# Of a run: settings, exit_code, seconds, tokens, losses, validation_loss, noise, train_seconds
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        name: of the file of its outcome.
        settings: all that differ from the preset.
    """

    name: str
    settings: Mapping[str, Any]


def trials_command_line(name: str, description: str | None, runs: str) -> argparse.ArgumentParser:
    """That of a benchmark, with `--runs` and `--at_once`; outcomes are in `runs` where none is given."""
    parser = command_line(name, description)
    parser.add_argument("--runs", type=Path, help=f"directory of the outcomes; {runs} if it is not given")
    parser.add_argument("--at_once", type=int, default=1, help="runs at the same time, which share the cores")
    return parser


def nothing_but_training(tokens: int) -> dict[str, Any]:
    """Settings of a run of so many tokens, with one evaluation behind it."""
    return {
        "run.parity_check": False,
        "schedule.total_tokens": tokens,
        "evaluation.every_tokens": tokens,
        "evaluation.sample_tokens": None,
        "checkpoint.every_tokens": None,
        "checkpoint.every_minutes": None,
    }


def final_loss(outcome: Outcome | None) -> float:
    """Validation loss at the end; infinite if the run did not get there."""
    loss = outcome["validation_loss"] if outcome else None
    return math.inf if loss is None else float(loss)


class Trials:
    """The outcomes that are on the disk, one file each, and the processes that make more.

    Args:
        preset: configuration that all trials start from.
        directory: of the outcomes, and of what all runs share of the text.
        at_once: trainings at the same time, which share the cores.
    """

    def __init__(self, preset: str, directory: Path, at_once: int = 1) -> None:
        self.preset, self.directory, self.at_once = preset, directory, at_once
        os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # or pyarrow starts a thread, which no fork has
        if at_once > 1:
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.warm"])

    def read(self, trial: Trial) -> Outcome | None:
        """The outcome of a trial; None if there is none with these settings."""
        try:
            outcome: Outcome = json.loads((self.directory / f"{trial.name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return outcome if outcome["settings"] == json.loads(json.dumps(trial.settings)) else None

    def outcomes(self, trials: Iterable[Trial]) -> dict[str, Outcome]:
        """Those that are done, by name."""
        found = {trial.name: self.read(trial) for trial in trials}
        return {name: outcome for name, outcome in found.items() if outcome}

    def complete(self, trials: Sequence[Trial], what: str) -> bool:
        """Train what is missing, and say how it goes; whether there was something.

        Raises:
            RecipeError: a run has ended with another error than that it diverged.
        """
        missing = [trial for trial in trials if self.read(trial) is None]
        self.directory.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.at_once) as pool:
            running = pool.map(self._train, missing)
            for number, (trial, outcome) in enumerate(zip(missing, running, strict=True), start=1):
                loss, seconds = final_loss(outcome), outcome["seconds"]
                print(f"{what} {number}/{len(missing)}: {trial.name}, {loss:.3f} nats, {seconds:.0f} s", flush=True)
        return bool(missing)

    def _train(self, trial: Trial) -> Outcome:
        directory, log = self.directory / f"{trial.name}.run", self.directory / f"{trial.name}.log"
        shutil.rmtree(directory, ignore_errors=True)
        settings = {
            **trial.settings,
            "run.directory": str(directory),
            "data.cache_directory": str(self.directory / "cache"),
        }
        values = (value if isinstance(value, str) else json.dumps(value) for value in settings.values())
        flags = [text for name, value in zip(settings, values, strict=True) for text in (f"--{name}", value)]
        started = time.perf_counter()
        process = self._context.Process(target=train, args=(["--config", self.preset, *flags], str(log)))
        process.start()
        process.join()
        seconds = time.perf_counter() - started
        if process.exitcode not in (0, DIVERGED_EXIT_CODE):
            raise RecipeError(f"{trial.name} has ended with code {process.exitcode}: {log} says why")
        ledger = directory / LEDGER
        outcome = outcome_of(read_lines(ledger) if ledger.exists() else [])
        shutil.rmtree(directory)
        outcome = {"settings": dict(trial.settings), "exit_code": process.exitcode, "seconds": seconds, **outcome}
        write_json(self.directory / f"{trial.name}.json", outcome)
        return outcome


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
        "train_seconds": sum(line.get("update_seconds") or 0.0 for line in updates),
    }
