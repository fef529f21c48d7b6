"""The directory of a run: made, checked to be writable, and never written over."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.command_line import write_config
from recipe.config import Config
from recipe.errors import RecipeError
from recipe.plan import RunPlan

if TYPE_CHECKING:
    from recipe.evaluate import Evaluation
    from recipe.parity import ParityReceipt

_FILES_OF_A_RUN = ("config.yaml", "ledger.jsonl", "summary.json", "final")


def prepare_run_directory(config: Config) -> Path | None:
    """Make `run.directory` and write config.yaml into it. An earlier run found there is moved to previous/N.

    Returns: where the earlier run went, or None.
    Raises:
        RecipeError: the directory cannot be made or written.
    """
    directory = Path(config.run.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        earlier = [directory / name for name in _FILES_OF_A_RUN if (directory / name).exists()]
        previous = None
        if earlier:
            taken = [int(path.name) for path in directory.glob("previous/*") if path.name.isdigit()]
            previous = directory / "previous" / str(max(taken, default=0) + 1)
            previous.mkdir(parents=True)
            for path in earlier:
                os.replace(path, previous / path.name)
        write_config(config, directory / "config.yaml")
    except OSError as error:
        raise RecipeError(
            f"cannot write run.directory = {config.run.directory!r}: {error.strerror or error}; set --run.directory"
        ) from None
    return previous


def write_summary(
    path: Path,
    plan: RunPlan,
    precision: str,
    before: Evaluation | None,
    after: Evaluation | None,
    receipt: ParityReceipt | None,
) -> None:
    """What the ledger has no line for: the plan, validation before the first and after the last update, the receipt."""
    summary = {
        "plan": dict(plan.rows()),
        "parameters": plan.parameters,
        "precision": precision,
        "validation_before": asdict(before) if before else None,
        "validation_after": asdict(after) if after else None,
        "parity_receipt": asdict(receipt) if receipt else None,
    }
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def usage(model_directory: Path) -> str:
    """Where the model is, and the Python that loads it."""
    name = str(model_directory)
    return f"""{name}

from transformers import AutoTokenizer, GPT2LMHeadModel
model, tokenizer = GPT2LMHeadModel.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
print(tokenizer.decode(model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=50)[0]))"""
