"""A page with the curves of a run, or of several."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.format import event_name, event_text, short_count
from recipe.report.charts import PALETTE, chart, event_color, library, theme
from recipe.report.curves import Curves
from recipe.report.record import Record
from recipe.report.reproduce import reproducing_command, settings_that_differ
from recipe.report.smoothing import smoothing_window
from recipe.report.summary import (
    data_rows,
    first_of_each_kind,
    hyperparameter_rows,
    machines_table,
    notable_events,
    parity_rows,
    parts_table,
    summary_rows,
)

EVENTS_OF_A_KIND = 20
SAMPLES_SHOWN = 20
_TILES = (
    *("validation loss", "bits per byte", "tokens seen", "training time", "throughput", "MFU"),
    *("peak memory", "updates", "tokens per update", "training loss"),
)


def names_of(directories: Sequence[Path]) -> list[str]:
    """What to call runs: their directories, without what all of them begin with."""
    resolved = [directory.resolve() for directory in directories]
    common = os.path.commonpath([directory.parent for directory in resolved])
    return [directory.relative_to(common).as_posix() for directory in resolved]


def report_page(records: Sequence[Record], names: Sequence[str]) -> str:
    """The page, one HTML document that asks the network for nothing.

    Raises:
        RecipeError: the library that draws is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    javascript = library().javascript_bundle()
    curves = Curves(records, names)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # samples hold any text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    kinds = Counter(event["event"] for record in records for event in notable_events(record))
    return templates.get_template("report.html.jinja").render(
        javascript=javascript,
        palette=PALETTE,
        names=list(names),
        subtitle=f"Training report of {len(records)} runs" if len(records) > 1 else _status(records[0]),
        comparison=_comparison(records),
        tiles=_tiles(records[0]),
        runs=[_sections(record, name) for record, name in zip(records, names, strict=True)],
        differences=settings_that_differ(records),
        event_kinds=[(event_name(kind), event_color(kind), count) for kind, count in kinds.items()],
        charts=[(metric.name, metric.title, metric.unit, curves.is_logarithmic(metric)) for metric in curves.metrics],
        time_unit=curves.time_unit,
        window=smoothing_window(records[0]["loss"]) if len(records) == 1 else None,
        page={
            "datasets": curves.datasets,
            "charts": {
                axis: {metric.name: chart(curves, metric, axis) for metric in curves.metrics}
                for axis in ("tokens", "time")
            },
            "themes": {"light": theme("light"), "dark": theme("dark")},
        },
    )


def _status(record: Record) -> str:
    finished = record.summary.get("finished_utc", "").replace("T", " at ").replace("Z", " UTC")
    if record.is_finished:
        return f"Training report, finished {finished}".rstrip()
    return f"Training report, not finished: {record.updates:,} of {record.plan.planned_updates:,} updates"


def _comparison(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """(name, its value in each run), in the order of the summary; a dash where a run has none."""
    facts = [dict(summary_rows(record)) for record in records]
    longest = max(facts, key=len)
    names = [*longest, *dict.fromkeys(name for of_run in facts for name in of_run if name not in longest)]
    return [(name, [of_run.get(name, "–") for of_run in facts]) for name in names]


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """(name, number, unit) of the six numbers that are looked for first."""
    facts = {**dict(summary_rows(record)), "tokens seen": short_count(record.tokens)}
    chosen = [name for name in _TILES if name in facts][:6]
    return [(name, *facts[name].partition(" ")[::2]) for name in chosen]


def _sections(record: Record, name: str) -> dict[str, Any]:
    """What the page shows of one run under the curves."""
    events, samples = notable_events(record), record.events_called("sample")
    shown = first_of_each_kind(events, EVENTS_OF_A_KIND)
    step = -(-len(samples) // SAMPLES_SHOWN) or 1
    tokens = record.config.batch.tokens_per_update
    return {
        "name": name,
        "events": [(f"{e['update']:,}", event_name(e["event"]), event_text(e)) for e in shown],
        "more_events": len(events) - len(shown),
        "samples": [
            (f"{s['update']:,}", f"{s['update'] * tokens:,}", str(s.get("prompt", "")), str(s.get("text", "")))
            for s in samples[::-step]  # the newest first
        ],
        "tables": [
            ("How an update was divided", parts_table(record)),
            ("Where it ran", machines_table(record)),
        ],
        "lists": [
            ("Data", data_rows(record)),
            ("Hyper-parameters", hyperparameter_rows(record.config)),
            ("Parity check: first update's gradient, computed in other ways", parity_rows(record)),
        ],
        "command": reproducing_command(record.config),
    }
