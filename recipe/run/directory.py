"""The directory of a run: made, checked to be writable, and never written over."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from recipe.checkpoint.files import list_checkpoints
from recipe.checkpoint.resume import Start
from recipe.config.command_line import write_config
from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.evaluation.in_run import HELD_OUT
from recipe.plan.run_plan import RunPlan
from recipe.run.environment import utc_now
from recipe.run.ledger import TRACKER_PROJECT, truncate_ledger

if TYPE_CHECKING:
    from recipe.evaluation.evaluate import Evaluation
    from recipe.step.parity import ParityCheck

_FILES_OF_A_RUN = (
    *("config.yaml", "ledger.jsonl", "summary.json", "final", "checkpoints", "report.html"),
    TRACKER_PROJECT,
)


def claim_run_directory(config: Config) -> FileLock:
    """Make `run.directory`, see that it can be written before anything expensive is done for it, and lock it.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        RecipeError: it cannot be made or written, or another process is training in it.
    """
    directory = Path(config.run.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.write_text("yes", encoding="utf-8")
        probe.unlink()
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"another process is training in run.directory = {config.run.directory!r}: wait for it, or set --run.directory"
        ) from None
    except OSError as error:
        raise _cannot_write(config, error) from None
    return lock


def begin_run(config: Config, start: Start) -> Path | None:
    """Make the directory ready: cut the ledger back to where `start` goes on, or make room for a new run.

    What this run takes the place of, an earlier run or checkpoints newer than where it goes on, is moved to previous/N.

    Returns: where that went, or None.
    Raises:
        RecipeError: the directory cannot be written.
    """
    directory = Path(config.run.directory)
    try:
        earlier = [directory / name for name in _FILES_OF_A_RUN if (directory / name).exists()]
        previous = None
        if start.checkpoint and start.checkpoint.parent.resolve() == (directory / "checkpoints").resolve():
            truncate_ledger(directory / "ledger.jsonl", start.update)
            newest_first = list_checkpoints(directory / "checkpoints")  # newer ones would be taken for this run's
            earlier = newest_first[: [path.name for path in newest_first].index(start.checkpoint.name)]
        if earlier:
            taken = [int(path.name) for path in directory.glob("previous/*") if path.name.isdigit()]
            previous = directory / "previous" / str(max(taken, default=0) + 1)
            for path in earlier:
                target = previous / path.relative_to(directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        write_config(config, directory / "config.yaml")
    except OSError as error:
        raise _cannot_write(config, error) from None
    return previous


def _cannot_write(config: Config, error: OSError) -> RecipeError:
    return RecipeError(
        f"cannot write run.directory = {config.run.directory!r}: {error.strerror or error}; set --run.directory"
    )


def write_summary(
    path: Path,
    plan: RunPlan,
    precision: str,
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    parity: ParityCheck | None,
) -> None:
    """What the ledger has no line for: the plan, validation before the first and after the last update, the parity."""
    summary = {
        "plan": dict(plan.rows()),
        "parameters": plan.parameters,
        "precision": precision,
        "validation_before": asdict(before[HELD_OUT]) if HELD_OUT in before else None,
        "validation_after": asdict(after[HELD_OUT]) if HELD_OUT in after else None,
        "validation_sets": {
            name: {"before": asdict(before[name]), "after": asdict(after[name])} for name in after if name != HELD_OUT
        },
        "parity_check": asdict(parity) if parity else None,
        "finished_utc": utc_now(),
    }
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def usage(model_directory: Path) -> str:
    """Where the model is, and the Python that loads it."""
    name = model_directory.as_posix()  # in Python's quotes a backslash would mean something else
    return f"""{name}

from transformers import AutoTokenizer, GPT2LMHeadModel
model, tokenizer = GPT2LMHeadModel.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
print(tokenizer.decode(model.generate(**tokenizer("def __init__(self", return_tensors="pt"), max_new_tokens=50)[0]))"""
