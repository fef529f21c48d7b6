"""What every benchmark needs: where it ran, medians with their spread, ratios of one run, and a dated result."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
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


def circumstances() -> dict[str, Any]:
    """Date, commit, machine, versions and load: what a number needs beside it."""
    import accelerate
    import torch
    import transformers

    return {
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("" if not _git("status", "--porcelain", "-uno") else " + changes"),
        "machine": f"{os.cpu_count()} cores of {_cpu()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "load_at_start": os.getloadavg()[0],
    }


def write_result(path: Path, text: str, values: Mapping[str, Any]) -> None:
    """Write `path.md` for people and `path.json` with every single measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "no git"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
