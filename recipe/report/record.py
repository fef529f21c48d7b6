"""What a run has left, read back: settings, ledger and summary. Imports no torch, so it also reads a run that is going on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.config.command_line import read_config
from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.plan.run_plan import RunPlan, make_plan

COLUMNS = (
    *("update", "tokens", "loss", "grad_norm", "learning_rate", "target_tokens"),
    *("world_size", "micro_batch_size", "gradient_accumulation_steps"),
    *("update_seconds", "data_wait_seconds", "tokens_per_second", "mfu", "peak_memory_bytes"),
    *("validation_loss", "bits_per_byte"),
)


class Part(NamedTuple):
    """Updates in a row that were cut in the same way: rows `start` to `stop` - 1 of the record."""

    start: int
    stop: int
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


@dataclass(frozen=True)
class Record:
    """A run, finished or not.

    Args:
        directory: of the run.
        config: from config.yaml.
        plan: of the configuration on the last number of ranks.
        columns: name in the ledger -> float64, one value for each update that is in the model; NaN where there is none.
            Of a validation set with a name: `column_of("validation_loss", NAME)` and `column_of("bits_per_byte", NAME)`.
        hours: of training up to the end of each of these updates.
        events: the other lines of the ledger.
        summary: summary.json, empty for a run that is not finished.
    """

    directory: Path
    config: Config
    plan: RunPlan
    columns: dict[str, np.ndarray]
    hours: np.ndarray
    events: list[dict[str, Any]]
    summary: dict[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        nothing = np.full(len(self.columns["update"]), np.nan)
        return self.columns.get(name, nothing)

    def last(self, name: str) -> tuple[int, float] | None:
        """(row, value) of the last value in a column; None where it has none."""
        rows = np.flatnonzero(np.isfinite(self[name]))
        return (int(rows[-1]), float(self[name][rows[-1]])) if len(rows) else None

    def median(self, name: str, part: Part | None = None) -> float | None:
        """Median of a column, or of a part of it; None where it has no value."""
        values = self[name][part.start : part.stop] if part else self[name]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    def events_called(self, name: str) -> list[dict[str, Any]]:
        """The events of one kind, in the order of the ledger."""
        return [event for event in self.events if event["event"] == name]

    @property
    def updates(self) -> int:
        """Updates done; a skipped one has no row, but counts."""
        skipped = [event["update"] for event in self.events_called("skipped_update")]
        return max([int(self["update"][-1]), *skipped])

    @property
    def tokens(self) -> int:
        """Target tokens seen."""
        return int(self["tokens"][-1])

    @property
    def is_finished(self) -> bool:
        """Whether it has done all its updates and left a model."""
        return self.updates >= self.plan.planned_updates and (self.directory / "final").is_dir()

    @property
    def validation_sets(self) -> list[str]:
        """Names of the validation sets beside the held-out documents."""
        first = column_of("bits_per_byte", "")
        return [name.removeprefix(f"{first}/") for name in self.columns if name.startswith(f"{first}/")]

    def validation_before(self, validation_set: str) -> dict[str, Any] | None:
        """The evaluation before the first update; None where a later start has taken its place in the summary."""
        if self.events_called("resume"):
            return None
        if validation_set:
            of_set: dict[str, Any] | None = (
                self.summary.get("validation_sets", {}).get(validation_set, {}).get("before")
            )
            return of_set
        held_out: dict[str, Any] | None = self.summary.get("validation_before")
        return held_out

    @property
    def parts(self) -> list[Part]:
        """The run by how its updates were cut into ranks and micro-batches."""
        names = ("world_size", "micro_batch_size", "gradient_accumulation_steps")
        cuts = np.nan_to_num(np.stack([self[name] for name in names], axis=1))
        changes = np.flatnonzero((cuts[1:] != cuts[:-1]).any(axis=1)) + 1
        starts = [0, *changes.tolist()]
        stops = [*starts[1:], len(cuts)]
        return [Part(start, stop, *(int(n) for n in cuts[start])) for start, stop in zip(starts, stops, strict=True)]

    @property
    def gpu_hours(self) -> float | None:
        """Hours x ranks of the updates computed on CUDA; None where the ledger does not say what it was computed on."""
        starts = self.events_called("start")
        if not starts or all(start.get("device_type") != "cuda" for start in starts):
            return None
        part_of = np.searchsorted([start["update"] for start in starts], self["update"] - 1, side="right") - 1
        if part_of.min() < 0:
            return None
        on_cuda = np.array([start.get("device_type") == "cuda" for start in starts])[part_of]
        return float(np.nansum((self["update_seconds"] * self["world_size"])[on_cuda]) / 3600)


def read_record(directory: Path, update: int | None = None) -> Record:
    """Read `config.yaml`, `ledger.jsonl` and, where it is finished, `summary.json` of a run.

    Args:
        directory: of the run.
        update: read what was so after this update, for a checkpoint that later ones have followed; None for all.

    Raises:
        RecipeError: it is no run directory, or has no update yet.
    """
    path = directory / "ledger.jsonl"
    if not path.is_file() or not (directory / "config.yaml").is_file():
        raise RecipeError(
            f"{directory} is no run: no config.yaml and ledger.jsonl in it; give a directory such as runs/NAME"
        )
    rows, sets, seconds, events = _read_ledger(path, math.inf if update is None else update)
    if not rows:
        raise RecipeError(f"{directory} has done no update yet: its ledger is empty")
    config = read_config(directory / "config.yaml")
    columns = {name: np.array([row[position] for row in rows]) for position, name in enumerate(COLUMNS)}
    for name in sorted({name for of_update in sets for name in of_update}):
        of_set = [of_update.get(name, {}) for of_update in sets]
        columns[column_of("validation_loss", name)] = np.array([_number(values.get("loss")) for values in of_set])
        columns[column_of("bits_per_byte", name)] = np.array(
            [_number(values.get("bits_per_byte")) for values in of_set]
        )
    ranks, micro_batch_size = columns["world_size"][-1], columns["micro_batch_size"][-1]
    record = Record(
        directory=directory,
        config=config,
        plan=make_plan(config, *(int(number) if number >= 1 else 1 for number in (ranks, micro_batch_size))),
        columns=columns,
        hours=np.array(seconds) / 3600,
        events=events,
        summary={},
    )
    summary = directory / "summary.json"
    if record.is_finished and summary.is_file():
        record.summary.update(json.loads(summary.read_text(encoding="utf-8")))
    return record


def column_of(name: str, validation_set: str) -> str:
    """The column of a validation set: `name` itself for the held-out documents, whose set has no name."""
    return f"{name}/{validation_set}" if validation_set else name


def _read_ledger(
    path: Path, last: float
) -> tuple[list[tuple[float, ...]], list[dict[str, dict[str, Any]]], list[float], list[dict[str, Any]]]:
    """(a row of COLUMNS for each update up to `last`, its named validation sets, seconds of training up to its end, events).

    A line whose update is not after the one before takes its place: the run was rolled back. What it cost stays counted.
    """
    rows: list[tuple[float, ...]] = []
    sets: list[dict[str, dict[str, Any]]] = []
    seconds: list[float] = []
    events: list[dict[str, Any]] = []
    total_seconds, update = 0.0, 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                values = json.loads(line)
                update = int(values["update"])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue  # half written when the power went
            if update > last:
                continue
            if "event" in values:
                events.append({**values, "event": str(values["event"]), "update": update})
                continue
            row = tuple(_number(values.get(name)) for name in COLUMNS)
            while rows and rows[-1][0] >= update:
                rows.pop()
                sets.pop()
                seconds.pop()
            took = row[_STEP_SECONDS]
            total_seconds += took if math.isfinite(took) else 0.0
            rows.append(row)
            sets.append(values.get("validation") or {})
            seconds.append(total_seconds)
    return rows, sets, seconds, events


_STEP_SECONDS = COLUMNS.index("update_seconds")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
