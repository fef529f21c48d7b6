"""What every benchmark needs: medians with their spread, ratios within a run, where it ran, and a dated result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any


def spread(values: Sequence[float]) -> str:
    """Median and range, to three digits: `0.41 (0.39..0.47)`."""
    return f"{median(values):#.3g} ({min(values):#.3g}..{max(values):#.3g})"


def ratio(values: Sequence[float], reference: Sequence[float]) -> str:
    """Spread of one over the other, round by round: what slows a whole round down cancels out."""
    return spread([value / other for value, other in zip(values, reference, strict=True)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def circumstances(machine: Mapping[str, Any]) -> str:
    """Of `recipe.run.environment.describe_machine`, in words: what a number needs beside it."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cpu = f"{machine['cpu_cores']} cores of {machine['cpu']} with {machine['cpu_instructions']}"
    return f"commit {machine['recipe_commit']}, on {cpu};\n{versions}"


def write_result(path: Path, text: str, values: Mapping[str, Any]) -> None:
    """Write `path.md` for people and `path.json` with every single measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    write_values(path.with_suffix(".json"), values)


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write `path` whole or not at all, so that what is cut off leaves what it had measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(_finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    """JSON has no word for a float that is not finite: it becomes text."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
