"""What a run has left, read back: settings, ledger, events and summary. Imports no torch, so it reads a running one too."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recipe.config.command_line import read_config
from recipe.config.settings import HELD_OUT, Config
from recipe.errors import RecipeError
from recipe.plan.run_plan import RunPlan, make_plan
from recipe.run.ledger import EVENTS, LEDGER, read_lines, read_updates
from recipe.text import all_printable

DIVISION = ["world_size", "micro_batch_size", "gradient_accumulation_steps"]
SPEED = ["tokens_per_second", "mfu"]
# The gradient noise scale, its interval, and what it comes to for an update.
NOISE = [*(f"gradient_noise_scale_tokens{end}" for end in ("", "_low", "_high")), "gradient_snr", "expected_cosine"]
COLUMNS = (
    *("update", "tokens", "loss", "grad_norm", "learning_rate", *DIVISION, *SPEED),
    *("update_seconds", "data_wait_seconds", "peak_memory_bytes", "target_tokens", *NOISE),
)
COUNTS = ["update", "tokens", *DIVISION]
LARGEST_COUNT, LARGEST_NUMBER = 2**53, 3e38  # what float64 counts exactly, and what float32 holds

# The shapes of what is read of events and summary, as `_fits` has them. What has another is damaged, and left out.
_MACHINE = {
    "device": str,
    "device_type": str,
    "world_size": int,
    "precision": str,
    "time_utc": str,
    "recipe_commit": str,
}
_EVENTS: dict[str, Any] = {
    "start": {f"{name}?": kind for name, kind in _MACHINE.items()} | {"versions?": {str: str}},
    "sample": {"prompt": str, "text": str},
    "resume": {"changes": dict},
    "branch": {"checkpoint": str, "tokens": int, "changes": {str: list}},
}
_SUMMARY: dict[str, Any] = {
    "precision": str,
    "finished_utc": str,
    "validation": {str: {"after": {"tokens": int, "text_bytes": int}}},
    "parity_check": {"reference": str, "tolerance": float, "differences": [(str, float)]},
}


@dataclass(frozen=True)
class Record:
    """A run, finished or not."""

    directory: Path  # where it was written
    config: Config  # from config.yaml
    plan: RunPlan  # of the configuration, on the last number of ranks
    # The ledger as float64, NaN for a value it does not have. A row for each update that is in the model, and one
    # for update 0 with the validation before training. Added are `hours` of training up to the end of an update,
    # and `data_wait`, the share of its time that an update waited for data
    updates: pd.DataFrame
    events: list[dict[str, Any]]  # events.jsonl
    summary: dict[str, Any]  # summary.json; empty for a run that is not finished

    def events_named(self, name: str) -> list[dict[str, Any]]:
        """The events of one kind, in the order in which they happened."""
        return [event for event in self.events if event["event"] == name]

    @property
    def notable_events(self) -> list[dict[str, Any]]:
        """What interrupted or changed the run: every event but those of its ordinary course."""
        return [event for event in self.events if event["event"] not in ("start", "parity_check", "sample", "push")]

    @property
    def updates_done(self) -> int:
        """Updates done; a skipped one has no row, but counts."""
        return max([int(self.updates["update"].iloc[-1]), *[e["update"] for e in self.events_named("skipped_update")]])

    @property
    def tokens(self) -> int:
        """Target tokens seen."""
        return int(self.updates["tokens"].iloc[-1])

    @property
    def is_finished(self) -> bool:
        """Whether it has done all its updates and left a model."""
        return self.updates_done >= self.plan.planned_updates and (self.directory / "final").is_dir()

    @property
    def validation_sets(self) -> list[str]:
        """Names of the sets it was evaluated on, the held-out documents first."""
        columns = self.updates.dropna(axis=1, how="all").columns
        names = [name.split("/")[1] for name in columns if name.startswith("validation/") and name.endswith("/loss")]
        return sorted(names, key=lambda name: name != HELD_OUT)

    def evaluations(self, validation_set: str) -> pd.DataFrame:
        """(update, loss, bits_per_byte) of each evaluation on a set, NaN for no bits; update 0 is that before training."""
        columns = ["update", *(f"validation/{validation_set}/{name}" for name in ("loss", "bits_per_byte"))]
        found = (
            self.updates.reindex(columns=columns)
            .dropna(subset=columns[:2])
            .set_axis(["update", "loss", "bits_per_byte"], axis=1)
        )
        return found.astype({"update": int})

    def last_evaluation(self, validation_set: str) -> dict[str, Any] | None:
        """The last of `evaluations` after update 0; None if there is none."""
        rows: list[dict[str, Any]] = self.evaluations(validation_set).query("update > 0").tail(1).to_dict("records")
        return rows[0] if rows else None

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The run by the size of its updates, and how they were divided into ranks and micro-batches.

        Of each part: `tokens` of an update, the `first` and the `last`, the numbers of DIVISION, median `tokens_per_second` and
        `mfu`.
        """
        rows = (
            self.updates[self.updates["update"] > 0]
            .fillna(dict.fromkeys(DIVISION, 0))
            .astype(dict.fromkeys(DIVISION, int))
        )
        starts = [phase.first_update for phase in self.plan.phases]
        division = rows[DIVISION].assign(phase=np.searchsorted(starts, rows["update"], side="right"))
        part = (division != division.shift()).any(axis=1).cumsum()
        columns = {name: (name, "first") for name in DIVISION} | {name: (name, "median") for name in SPEED}
        found = rows.groupby(part).agg(first=("update", "min"), last=("update", "max"), **columns)
        parts = found.to_dict("records")
        return [{**part, "tokens": self.plan.update_at(int(part["first"])).tokens_per_update} for part in parts]

    @property
    def noise_scale(self) -> dict[str, float] | None:
        """Of the last update that has one: `tokens`, `low` and `high`, in tokens, `snr` and `cosine`; NaN: not determined."""
        rows = self.updates[NOISE].dropna(subset=NOISE[1:2])
        names = ("tokens", "low", "high", "snr", "cosine")
        return dict(zip(names, rows.iloc[-1].tolist(), strict=True)) if len(rows) else None

    def division(self, update: int, world_size: int, micro_batch_size: int) -> str:
        """The accumulation steps of an update with the division written out; empty for numbers of a damaged ledger."""
        plan = self.plan.update_at(update)
        try:
            return replace(plan, world_size=world_size, micro_batch_size=micro_batch_size).division
        except (RecipeError, ZeroDivisionError):
            return ""

    @property
    def gpu_hours(self) -> float | None:
        """Hours x ranks of the updates computed on CUDA; None if there are none, or events.jsonl does not say."""
        on_cuda = pd.Series(False, index=self.updates.index)
        for start in self.events_named("start"):
            on_cuda[self.updates["update"] > start["update"]] = start.get("device_type") == "cuda"
        rows = self.updates[on_cuda]
        return float((rows["update_seconds"] * rows["world_size"]).sum() / 3600) if len(rows) else None


def read_record(directory: Path, update: int | None = None) -> Record:
    """Read `config.yaml`, `ledger.jsonl`, `events.jsonl` and, if the run is finished, `summary.json`.

    `update` is the last to read, for a checkpoint that later ones have followed; None: all.

    Raises:
        RecipeError: it is no run directory, one of an earlier version, or has no update yet.
    """
    if not all((directory / name).is_file() for name in (LEDGER, "config.yaml")):
        raise RecipeError(
            f"{directory} is no run: it has no {LEDGER} and config.yaml; give a directory such as runs/NAME"
        )
    last = LARGEST_COUNT if update is None else update
    try:
        lines, events = read_updates(directory), read_lines(directory / EVENTS)
    except OSError as error:
        raise RecipeError(f"cannot read {error.filename}: {error.strerror}") from None
    updates = _numbers([line for line in lines if 0 <= line["update"] <= last])
    if not (updates["update"] > 0).any():
        raise RecipeError(f"{directory} has done no update yet: there is none in its {LEDGER}")
    config = read_config(directory / "config.yaml")
    numbers = updates[["world_size", "micro_batch_size"]].iloc[-1].fillna(1).clip(lower=1).astype(int)
    plan = make_plan(config, *numbers.tolist())
    updates["tokens"] = updates["tokens"].fillna(updates["update"].astype(int).map(plan.tokens_after))
    events = [event for event in map(_read_event, events) if event and 0 <= event["update"] <= last]
    record = Record(directory, config, plan, updates, events, {})
    if record.is_finished:
        record.summary.update(_read_summary(directory / "summary.json"))
    return record


def _read_event(event: dict[str, Any]) -> dict[str, Any] | None:
    """An event whose texts can be shown; None for a damaged one."""
    try:
        kind, shown = event.get("event"), all_printable(event)
    except RecursionError:
        return None
    return shown if isinstance(kind, str) and _fits(event, _EVENTS.get(kind, {})) else None


def _read_summary(path: Path) -> dict[str, Any]:
    """Those parts of a summary that are as `recipe.finish` writes them; none if there is no such file."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {name: all_printable(summary[name]) for name, shape in _SUMMARY.items() if _fits(summary[name], shape)}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value has a shape: a type, [of each], (of the first, ...), {name: of its value} or {str: of each}.

    The value of `name?` may be missing or null.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict) or str in shape:
            return isinstance(value, dict) and all(_fits(inner, shape[str]) for inner in value.values())
        return all(
            (name.endswith("?") and value.get(name[:-1]) is None) or _fits(value.get(name.rstrip("?")), inner)
            for name, inner in shape.items()
        )
    if isinstance(shape, list | tuple):
        shapes = shape * len(value) if isinstance(value, list) and isinstance(shape, list) else shape
        return isinstance(value, list) and len(value) == len(shapes) and all(map(_fits, value, shapes))
    return type(value) is shape and (shape is not int or abs(value) < LARGEST_COUNT)


def _numbers(ledger: list[dict[str, Any]]) -> pd.DataFrame:
    """The columns of a ledger that are numbers, and the two that `Record.updates` adds."""

    def number(value: Any) -> float:
        return float(value) if type(value) in (int, float) and abs(value) <= LARGEST_NUMBER else np.nan

    names = dict.fromkeys(name for line in ledger for name in line)
    sets = [match[1] for name in names if (match := re.fullmatch(r"validation/([\w-]+)/loss", name))]
    columns = [*COLUMNS, *(name for name in names if re.fullmatch(r"source/[\w-]+/(tokens|passes)", name))]
    columns += [f"validation/{name}/{value}" for name in sets for value in ("loss", "bits_per_byte")]
    numbers = pd.DataFrame(
        [[number(line.get(name)) for name in columns] for line in ledger], columns=columns, dtype=float
    )
    numbers[COUNTS] = numbers[COUNTS].where(lambda counts: (counts >= 0) & (counts <= LARGEST_COUNT))
    seconds = numbers["update_seconds"].where(lambda values: values > 0)
    return numbers.assign(hours=seconds.fillna(0).cumsum() / 3600, data_wait=numbers["data_wait_seconds"] / seconds)


def thin(values: pd.Series, buckets: int) -> pd.Index:
    """Labels of the smallest and the largest value of each of `buckets` equal parts, so that no spike is lost.

    Also the first and the last. All that are not NaN if there are no more than two for each bucket.
    """
    known = values.dropna()
    if len(known) <= 2 * buckets:
        return known.index
    parts = known.groupby(np.arange(len(known)) * buckets // len(known))
    return known.index[[0, -1]].union(parts.idxmin()).union(parts.idxmax())


def smoothing_window(values: pd.Series) -> int:
    """Updates that a running median takes together: a twentieth of the run, 200 at most, an odd number."""
    return min(int(values.count()) // 20, 200) // 2 * 2 + 1


def some_of_each_kind(events: list[dict[str, Any]], of_a_kind: int) -> list[dict[str, Any]]:
    """Of each kind at most `of_a_kind` events, evenly spread: one that came a thousand times hides no other."""
    kinds = pd.Series([event["event"] for event in events], dtype=object)
    groups = kinds.groupby(kinds)
    is_shown = groups.cumcount() % np.ceil(groups.transform("size") / of_a_kind) == 0
    return [event for event, shown in zip(events, is_shown, strict=True) if shown]
