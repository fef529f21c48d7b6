"""Records as curves: for each metric the points to draw, thinned so that no spike is lost, and the events to mark."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from recipe.config.settings import HELD_OUT
from recipe.format import event_name, event_text
from recipe.report.record import Record, smoothing_window, some_of_each_kind, thin

RAW_BUCKETS, SMOOTH_POINTS = 300, 300  # a chart is no wider than 1,100 pixels
EVENTS_OF_A_KIND = 60  # marks on the curves; the page's legend counts them all
LONG_RUN_HOURS = 2.0  # shorter runs are drawn by minutes


@dataclass(frozen=True)
class Metric:
    """A column of `Record.updates` as a curve."""

    column: str  # its name
    title: str  # what it shows
    unit: str  # of the values, after `scale`
    scale: float = 1.0  # the column is multiplied by this
    is_noisy: bool = False  # drawn pale, under its running median
    may_be_logarithmic: bool = False  # whether one value may be many times the others'
    from_zero: bool = True  # whether the vertical axis begins at zero
    axis_format: str = ""  # of the vertical axis, in d3's notation
    band: tuple[str, str] | None = None  # columns of the ends of its interval; without an upper end it is open
    budget: str = ""  # a column that it is compared with, drawn dashed

    @property
    def is_validation(self) -> bool:
        """Whether only some updates have a value, drawn as dots."""
        return self.column.startswith("validation/")


LOSS = Metric("loss", "Loss", "nats per token", is_noisy=True, may_be_logarithmic=True, from_zero=False)
VALIDATION = Metric(f"validation/{HELD_OUT}/loss", "Validation loss", "nats per token")
_OF_UPDATES = (
    Metric("learning_rate", "Learning rate", "of each update", axis_format="~e"),
    Metric("grad_norm", "Gradient norm", "before clipping", is_noisy=True, may_be_logarithmic=True),
    Metric(
        "gradient_noise_scale_tokens",
        "Gradient noise scale",
        "tokens, with its 95 % interval; dashed: tokens of an update",
        may_be_logarithmic=True,
        axis_format="~s",
        band=("gradient_noise_scale_tokens_low", "gradient_noise_scale_tokens_high"),
        budget="target_tokens",
    ),
    Metric("gradient_snr", "Signal to noise", "of an update's gradient", may_be_logarithmic=True),
    Metric("tokens_per_second", "Throughput", "tokens per second", is_noisy=True, axis_format="~s"),
    Metric("mfu", "Model FLOPs utilisation", "% of the peak of all devices", 100, is_noisy=True),
    Metric("data_wait", "Waiting for data", "% of each update's time", 100, is_noisy=True),
    Metric("peak_memory_bytes", "Peak memory", "GB, of the largest rank", 1e-9),
)


def bits_per_byte(validation_set: str) -> Metric:
    """The metric of a validation set."""
    text = "held-out text" if validation_set == HELD_OUT else validation_set
    return Metric(f"validation/{validation_set}/bits_per_byte", "Bits per byte", f"on {text}", from_zero=False)


class Curves:
    """The points of all metrics of some runs.

    Attributes:
        metrics: those that any of the runs has values of.
        time_unit: of the points' `time`.
        datasets: column of a metric -> its points (run, update, tokens, time, value); "COLUMN, median" -> the same, smoothed;
            "events" -> the events to mark.
    """

    def __init__(self, records: Sequence[Record], names: Sequence[str]) -> None:
        self.names = list(names)
        is_long = max(record.updates["hours"].iloc[-1] for record in records) >= LONG_RUN_HOURS
        self.time_unit, self._per_hour = ("hours", 1.0) if is_long else ("minutes", 60.0)
        runs = [
            record.updates.assign(run=name, time=record.updates["hours"] * self._per_hour)
            for record, name in zip(records, names, strict=True)
        ]
        self._rows = pd.concat(runs, ignore_index=True)
        sets = dict.fromkeys(name for record in records for name in record.validation_sets)
        candidates = [LOSS, *map(bits_per_byte, sets), *_OF_UPDATES]
        self.metrics = [metric for metric in candidates if self._rows[metric.column].count()]
        self.datasets: dict[str, list[dict[str, Any]]] = {"events": []}
        for metric in [*self.metrics, *([VALIDATION] if HELD_OUT in sets else [])]:
            self.datasets[metric.column], self.datasets[median_of(metric)] = [], []
            for _, rows in self._rows.groupby("run", sort=False):
                self._add(metric, rows)
        for record, name in zip(records, names, strict=True):
            self._add_events(record, name)

    def _add(self, metric: Metric, rows: pd.DataFrame) -> None:
        """The points of a metric in one run."""
        values = rows[metric.column] * metric.scale
        self.datasets[metric.column] += _points(rows, values[thin(values, RAW_BUCKETS)])
        if metric.is_noisy:
            drawn = np.unique(np.linspace(0, len(rows) - 1, SMOOTH_POINTS).astype(int))
            medians = values.rolling(smoothing_window(values), center=True, min_periods=1).median()
            self.datasets[median_of(metric)] += _points(rows, medians.iloc[drawn])
        if metric.band:
            budget = rows[metric.budget][values.notna()] * metric.scale
            self.datasets.setdefault(budget_of(metric), []).extend(_points(rows, budget[thin(budget, RAW_BUCKETS)]))
            low, high = (rows[column] * metric.scale for column in metric.band)
            top = 2 * max(values.max(), budget.max())  # an end that is hardly known would leave the rest on the floor
            band = _points(rows, high.fillna(top).clip(upper=top)[thin(low, RAW_BUCKETS)])
            lows = low.set_axis(rows["update"])
            self.datasets.setdefault(band_of(metric), []).extend(
                {**point, "low": _rounded(lows[point["update"]])} for point in band
            )

    def _add_events(self, record: Record, name: str) -> None:
        updates, hours = record.updates["update"], record.updates["hours"]
        if updates.iloc[0] > 0:
            updates, hours = pd.concat([pd.Series([0.0]), updates]), pd.concat([pd.Series([0.0]), hours])
        for event in some_of_each_kind(record.notable_events, EVENTS_OF_A_KIND):
            self.datasets["events"].append(
                {
                    "run": name,
                    "event": event["event"],
                    "what": event_name(event["event"]),
                    "update": event["update"],
                    "tokens": record.plan.tokens_after(event["update"]),
                    "time": _rounded(np.interp(event["update"], updates, hours) * self._per_hour),
                    "details": event_text(event),
                }
            )

    def range_of(self, metric: Metric) -> tuple[float, float]:
        """(smallest, largest) value of a metric of `metrics`, over all runs."""
        values = self._rows[metric.column] * metric.scale
        return float(values.min()), float(values.max())

    def is_logarithmic(self, metric: Metric) -> bool:
        """Whether the largest value would leave the others on the floor."""
        smallest, largest = self.range_of(metric)
        middle = float(self._rows[metric.column].median()) * metric.scale
        return metric.may_be_logarithmic and smallest > 0 and largest > 10 * middle


def median_of(metric: Metric) -> str:
    """The dataset of a metric's running median."""
    return f"{metric.column}, median"


def band_of(metric: Metric) -> str:
    """The dataset of a metric's interval, from `low` to `value`."""
    return f"{metric.column}, interval"


def budget_of(metric: Metric) -> str:
    """The dataset of what a metric is compared with."""
    return f"{metric.column}, budget"


def _points(rows: pd.DataFrame, values: pd.Series) -> list[dict[str, Any]]:
    """Those of `rows` that `values` has a value for, as Vega-Lite reads them."""
    points = rows.loc[values.index, ["run", "update", "tokens", "time"]].assign(value=values).dropna()
    points = points.astype({"update": int, "tokens": int})
    points[["time", "value"]] = points[["time", "value"]].map(_rounded)
    found: list[dict[str, Any]] = points.to_dict("records")
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
