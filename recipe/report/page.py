"""A page with the curves of a run, or of several."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from recipe.config.settings import Config, flat_fields, value_of
from recipe.format import value_text
from recipe.report.charts import EVENT_COLORS, PALETTE, chart, library, theme
from recipe.report.curves import Curves
from recipe.report.record import Record
from recipe.report.summary import NOT_THE_RUN, environment, html, rows_of
from recipe.text import one_line


def names_of(directories: Sequence[Path]) -> list[str]:
    """What to call runs: their directories, without what all of them begin with."""
    resolved = [directory.resolve() for directory in directories]
    common = os.path.commonpath([directory.parent for directory in resolved])
    return [one_line(directory.relative_to(common).as_posix()) for directory in resolved]


def report_page(records: Sequence[Record], names: Sequence[str]) -> str:
    """The page, one HTML document that asks the network for nothing.

    Raises:
        RecipeError: a library that draws is not installed.
    """
    javascript = library().javascript_bundle()
    curves = Curves(records, names)
    validation_sets = list(dict.fromkeys(name for record in records for name in record.validation_sets))
    charts = {axis: {m.column: chart(curves, m, axis).to_dict() for m in curves.metrics} for axis in ("tokens", "time")}
    template = environment(html).get_template("report.html.jinja")
    return template.render(
        javascript=javascript,
        palette=PALETTE,
        names=list(names),
        runs=list(zip(names, records, [rows_of(record, validation_sets) for record in records], strict=True)),
        differences=_settings_that_differ(records),
        event_kinds=Counter(event["event"] for record in records for event in record.notable_events),
        event_colors=EVENT_COLORS,
        curves=curves,
        page={"datasets": curves.datasets, "charts": charts, "themes": {m: theme(m) for m in ("light", "dark")}},
    )


def _settings_that_differ(records: Sequence[Record]) -> dict[str, list[str]]:
    """Dotted name -> its value in each run, for the settings that are not the same in all of them."""
    differences = {}
    for name, _ in flat_fields(Config):
        values = [value_of(record.config.public, name) for record in records]
        is_of_the_run = not name.startswith(NOT_THE_RUN)
        if is_of_the_run and any(value != values[0] for value in values):
            differences[name] = [value_text(value) for value in values]
    return differences
