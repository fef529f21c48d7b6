"""A record in words: the numbers and tables that the report page and the model card share. What is not known is left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipe.config.settings import STANDARD_LIBRARY, Config
from recipe.data.sources import STANDARD_LIBRARY_VALIDATION_ONE_IN
from recipe.errors import RecipeError
from recipe.format import duration, event_name, percent, size_text, value_text
from recipe.plan.budget import UpdatePlan
from recipe.report.record import Part, Record, column_of
from recipe.report.smoothing import smoothing_window

Rows = list[tuple[str, str]]


class Table(NamedTuple):
    """A table with a header."""

    header: list[str]
    rows: list[list[str]]


def summary_rows(record: Record) -> Rows:
    """The run in a dozen lines, the most important first."""
    updates, planned = record.updates, record.plan.planned_updates
    model, window = record.config.model, smoothing_window(record["loss"])
    rows = [
        ("status", "finished" if record.is_finished else "not finished"),
        ("model", f"GPT-2, {record.plan.parameters:,} parameters"),
        ("shape", f"{model.n_layer} layers, width {model.n_embd:,}, {model.n_head} heads"),
        ("tokens seen", f"{record.tokens:,}"),
        ("tokens per parameter", per_parameter(record)),
        ("updates", f"{updates:,} of {planned:,}"),
        ("tokens per update", f"{record.config.batch.tokens_per_update:,}"),
    ]
    if validation := record.last("validation_loss"):
        rows.append(("validation loss", f"{validation[1]:.4f} nats per token"))
    if bits := record.last("bits_per_byte"):
        rows.append(("bits per byte", f"{bits[1]:.4f}"))
    for name in record.validation_sets:
        if bits := record.last(column_of("bits_per_byte", name)):
            rows.append((f"bits per byte, {name}", f"{bits[1]:.4f}"))
    losses = record["loss"][-window:]
    if (losses := losses[np.isfinite(losses)]).size:
        of = f", median of the last {window} updates" if window > 1 else ""
        rows.append(("training loss", f"{np.median(losses):.4f} nats per token{of}"))
    rows.append(("training time", duration(record.hours[-1] * 3600)))
    if (gpu_hours := record.gpu_hours) is not None:
        rows.append(("GPU-hours", f"{gpu_hours:,.3g}" if gpu_hours < 1000 else f"{gpu_hours:,.0f}"))
    rows += _speed(record)
    if (share := data_wait_share(record)) is not None:
        rows.append(("waiting for data", f"{percent(share)} of the time"))
    memory = record["peak_memory_bytes"]
    if (memory := memory[np.isfinite(memory)]).size:
        rows.append(("peak memory", f"{size_text(memory.max())} per rank"))
    if hardware := hardware_text(record):
        rows.append(("hardware", hardware))
    rows.append(("precision", precision(record)))
    happened = Counter(event["event"] for event in notable_events(record))
    if happened:
        rows.append(("events", ", ".join(f"{count:,} x {event_name(name)}" for name, count in happened.items())))
    return rows


def _speed(record: Record, part: Part | None = None) -> Rows:
    rows = []
    if (speed := record.median("tokens_per_second", part)) is not None:
        rows.append(("throughput", f"{speed:,.0f} tokens/s"))
    if (mfu := record.median("mfu", part)) is not None:
        rows.append(("MFU", percent(mfu)))
    return rows


def data_wait_share(record: Record) -> float | None:
    """The part of the training time that was spent waiting for data; None where it was not measured."""
    seconds, waited = record["update_seconds"], record["data_wait_seconds"]
    known = np.isfinite(seconds) & np.isfinite(waited)
    return float(waited[known].sum() / seconds[known].sum()) if seconds[known].sum() > 0 else None


def precision(record: Record) -> str:
    """What it was computed in: the last part's, where `auto` was decided, else as configured."""
    starts = record.events_called("start")
    return str((starts[-1] if starts else record.summary).get("precision") or record.config.precision)


def hardware_text(record: Record) -> str:
    """The devices of each part of the run, in order, each kind once."""
    return ", then ".join(dict.fromkeys(_devices(start) for start in record.events_called("start")))


def _devices(start: dict[str, Any]) -> str:
    ranks, name = start.get("world_size", 1), start.get("device", "unknown device")
    if start.get("device_type") == "cuda":
        return f"{ranks} x {name}"
    return f"{name}, {ranks} rank{'s' if ranks != 1 else ''}"


def machines_table(record: Record) -> Table:
    """Each part of the run: when and on what it began."""
    rows = [
        [
            value_text(start.get("time_utc", "")).replace("T", " ").rstrip("Z"),
            f"{start['update'] + 1:,}",
            _devices(start),
            ", ".join(f"{name} {number}" for name, number in (start.get("versions") or {}).items()),
            value_text(start.get("recipe_commit") or ""),
        ]
        for start in record.events_called("start")
    ]
    return Table(["started (UTC)", "first update", "device", "software", "recipe commit"], rows)


def parts_table(record: Record) -> Table:
    """How the budget of an update was divided, for each part of the run that was cut in one way."""
    batch, rows = record.config.batch, []
    for part in record.parts:
        first, last = record["update"][part.start], record["update"][part.stop - 1]
        try:
            division = UpdatePlan(
                batch.tokens_per_update,
                record.config.data.sequence_length,
                batch.lanes,
                part.world_size,
                part.micro_batch_size,
            ).division
        except (RecipeError, ZeroDivisionError):  # numbers of a damaged ledger
            division = ""
        rows.append(
            [
                f"{first:,.0f} to {last:,.0f}",
                f"{part.world_size:,}",
                f"{part.micro_batch_size:,}",
                f"{part.gradient_accumulation_steps:,}",
                division,
                "; ".join(value if name != "MFU" else f"MFU {value}" for name, value in _speed(record, part)),
            ]
        )
    return Table(["updates", "ranks", "micro-batch", "accumulation steps", "division", "median speed"], rows)


def held_out(config: Config) -> str:
    """Which documents are for validation."""
    if config.data.dataset == STANDARD_LIBRARY and not config.data.text_files:
        return f"one file in {STANDARD_LIBRARY_VALIDATION_ONE_IN:,}, by hash of its path"
    one_in = config.data.validation_one_in
    return f"one document in {one_in:,}, by hash of its text" if one_in else "none"


def data_rows(record: Record) -> Rows:
    """Where the text came from, and how much of it was seen."""
    data = record.config.data
    if data.text_files:
        names = [Path(name).name for name in data.text_files]  # the directories are the author's own
        rows = [("source", "local files: " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))]
    elif data.dataset == STANDARD_LIBRARY:
        versions = {(start.get("versions") or {}).get("python") for start in record.events_called("start")} - {None}
        rows = [("source", "the .py files of Python's standard library, without its tests")]
        rows += [("revision", "Python " + ", ".join(sorted(map(str, versions))))] if versions else []
    else:
        rows = [("source", data.repository), ("configuration", data.configuration or "default"), ("split", data.split)]
        rows.append(("revision", data.revision or "not pinned: the newest when each part of the run began"))
    rows += [("tokens seen", f"{record.tokens:,}"), ("held out", held_out(record.config))]
    if validation := record.summary.get("validation_after"):
        rows.append(("validation set", f"{validation['tokens']:,} tokens, {validation['text_bytes']:,} bytes"))
    its_own = f"byte-level BPE of {record.config.model.vocab_size:,} tokens, trained on the text"
    rows.append(("tokenizer", data.tokenizer or initial_weights(record.config) or its_own))
    return rows


def hyperparameter_rows(config: Config) -> Rows:
    """What enters an update."""
    optimizer, schedule, batch = config.optimizer, config.schedule, config.batch
    rows = [
        ("tokens per update", f"{batch.tokens_per_update:,}"),
        ("sequence length", f"{config.data.sequence_length:,} tokens"),
        ("lanes", f"{batch.lanes:,}"),
        ("optimizer", "SGD"),
        ("peak learning rate", f"{optimizer.learning_rate:g}"),
        ("warm-up", f"linear, {schedule.warmup_tokens:,} tokens"),
        ("decay", f"cosine to {100 * schedule.final_learning_rate_fraction:g} % of the peak"),
        ("weight decay", f"{optimizer.weight_decay:g}, on matrices and embeddings"),
        ("gradient clipping", f"norm {optimizer.max_grad_norm:g}" if optimizer.max_grad_norm else "none"),
        ("dropout", f"{config.model.dropout:g}"),
        ("first weights", initial_weights(config) or f"normal, standard deviation {config.model.initializer_range:g}"),
        ("seed", f"{config.run.seed}"),
    ]
    if optimizer.name == "adamw":
        rows[3] = (
            "optimizer",
            f"AdamW, betas {optimizer.beta1:g} and {optimizer.beta2:g}, epsilon {optimizer.epsilon:g}",
        )
    return rows


def parity_rows(record: Record) -> Rows:
    """The parity check: (another way to compute the first update, relative difference of the gradient)."""
    parity = record.summary.get("parity_check") or {}
    return [(way, f"{difference:.1e}") for way, difference in parity.get("differences", [])]


def notable_events(record: Record) -> list[dict[str, Any]]:
    """What interrupted or changed the run: every event but those of its ordinary course."""
    return [event for event in record.events if event["event"] not in ("start", "sample", "push")]


def first_of_each_kind(events: list[dict[str, Any]], of_a_kind: int) -> list[dict[str, Any]]:
    """Events in their order, of each kind only the first: one kind that came a thousand times hides no other."""
    seen: Counter[str] = Counter()
    shown = []
    for event in events:
        seen[event["event"]] += 1
        if seen[event["event"]] <= of_a_kind:
            shown.append(event)
    return shown


def hub_dataset(config: Config) -> str | None:
    """The id of the Hub dataset that a run read; None where it read something else."""
    is_other = config.data.text_files or config.data.dataset == STANDARD_LIBRARY
    return None if is_other or not is_hub_id(config.data.repository) else config.data.repository


def is_hub_id(name: str) -> bool:
    """Whether this can be a name on the Hub, and is nothing on this machine."""
    return re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) is not None and not Path(name).exists()


def initial_weights(config: Config) -> str | None:
    """What the run started from: a name on the Hub, or the last part of a directory; None where it started from nothing."""
    name = config.model.init_from
    return name if name is None or is_hub_id(name) else Path(name).name


def per_parameter(record: Record) -> str:
    """Tokens seen for each parameter."""
    ratio = record.tokens / record.plan.parameters
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
