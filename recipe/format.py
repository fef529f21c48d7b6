"""Numbers and values as text for a person. A number and its unit have a space that does not break."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


def event_name(name: str) -> str:
    """`micro_batch` -> `micro batch`."""
    return name.replace("_", " ")


def event_text(event: dict[str, Any]) -> str:
    """The values of an event in one line, without empty ones and those that tell a person nothing."""
    values = {k: v for k, v in event.items() if k not in _NOT_SHOWN and v not in (None, [], {})}
    if "checkpoint" in values:
        values["checkpoint"] = Path(str(values["checkpoint"])).name
    text = "; ".join(f"{event_name(name)} {value_text(value)}" for name, value in values.items())
    return _DIRECTORIES.sub("", text)  # a reader has no use for the author's


_DIRECTORIES = re.compile(r"(?<![^\s'\"(\[=])~?/(?:[^\s/'\"]+/)+")  # that a path begins with; addresses have none
_NOT_SHOWN = ("event", "update", "time_utc", "blocks_sha256")


def json_value(value: Any) -> Any:
    """The value with null for each number that is not finite: JSON has none."""
    if isinstance(value, dict):
        return {name: json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def value_text(value: Any, levels: int = 5) -> str:
    """A JSON value in at most 200 characters; what is nested deeper than `levels` is left out."""
    if isinstance(value, dict | list | tuple) and not levels:
        return "…"
    shown = partial(value_text, levels=levels - 1)
    if isinstance(value, dict):
        are_changes = all(isinstance(inner, list) and len(inner) == 2 for inner in value.values())  # [earlier, now]
        texts = {k: " → ".join(map(shown, v)) if are_changes else shown(v) for k, v in value.items()}
        text = ", ".join(f"{name} {inner}" for name, inner in texts.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(map(shown, value))
    elif isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    else:
        text = "none" if value is None else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:199] + "…"


def short_count(number: float) -> str:
    """983,040, then 409.6 million, 26.3 billion, 1.2 trillion."""
    for name, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= 10 * scale or (name != "million" and number >= scale):
            return f"{number / scale:,.1f} {name}"
    return f"{number:,.0f}"


def percent(share: float) -> str:
    """0.412 -> 41.2 %."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """`42 s`, `1 min 24 s`, `3 h 12 min`, `5 d 3 h`."""
    text = f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    for large, small, scale, factor in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= scale:
            whole, rest = divmod(round(seconds / factor), scale // factor)
            text = f"{whole:,} {large} {rest} {small}"
            break
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def size_text(size_bytes: float) -> str:
    """Bytes in kB, MB or GB of powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / 1e3:.0f} kB" if size_bytes else "0"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first and the last column aligned to the left, those between them to the right."""
    first, *between = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = []
    for name, *cells, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, between, strict=True)]
        lines.append("  ".join(["", name.ljust(first), *cells, last]).rstrip())
    return "\n".join(lines)


def nearest_divisors(number: int, to: int, at_least: int = 1) -> list[int]:
    """The eight divisors of `number` that are nearest to `to`, in their order, of those that are `at_least` so large."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    divisors = {d for divisor in small for d in (divisor, number // divisor) if d >= at_least}
    return sorted(sorted(divisors, key=lambda divisor: (abs(divisor - to), divisor))[:8])


_FORMATS: dict[str, Callable[[Any], str]] = {
    "bytes": size_text,
    "hours": lambda hours: duration(3600 * hours),
    "tokens/s": "{:,.0f}".format,
    "share": percent,
    "device-hours": "{:,.2f}".format,
    "money": "{:,.2f}".format,
    "runs": "{:,.3g}".format,
}


@dataclass(frozen=True)
class Number:
    """A derived number: one line of a table, one entry of the JSON."""

    key: str
    value: float | None  # None until it is known
    unit: str
    derivation: str = "{}"  # how it follows from other numbers; {} is the place of the value
    is_shown: bool = True  # in the table; the JSON has it anyway

    @property
    def name(self) -> str:
        """The key in words: `state_bytes` -> `state`."""
        return self.key.removesuffix("_bytes").replace("_", " ")

    @property
    def shown(self) -> str:
        """The value for a person; nothing if it is not known."""
        return "" if self.value is None else _FORMATS.get(self.unit, "{:,}".format)(self.value)

    def __str__(self) -> str:
        return self.derivation.format(self.shown)
