"""What a run leaves when it is complete: the model, the summary, and what is printed of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.config.settings import Config
from recipe.evaluation.evaluate import Evaluation
from recipe.evaluation.in_run import HELD_OUT
from recipe.model.export import export_model
from recipe.plan.run_plan import RunPlan
from recipe.run.console import Console
from recipe.run.directory import usage, write_summary
from recipe.step.parity import ParityCheck


def finish_run(
    config: Config,
    plan: RunPlan,
    model: Any,
    tokenizer: Any,
    console: Console,
    precision: str,
    before: dict[str, Evaluation],
    after: dict[str, Evaluation],
    samples: dict[str, str],
    parity: ParityCheck | None,
) -> None:
    """Write final/ and summary.json, and print what a person wants to see first. On rank 0."""
    directory = Path(config.run.directory)
    export_model(model.gpt2, tokenizer, directory / "final")
    write_summary(directory / "summary.json", plan, precision, before, after, parity)
    for name in after:
        title = "validation" if name == HELD_OUT else f"validation, {name}"
        console.section(title, f"  before  {before[name]}\n  after   {after[name]}")
    for text in samples.values():
        console.section("sample", text)
    if parity:
        console.section("parity check", parity)
    console.section(
        "what next",
        f"python -m recipe report {directory}    # a page with its curves\n"
        f"python -m recipe card {directory}      # a model card\n"
        "python -m recipe --help    # all commands",
    )
    console.section("finished model", usage(directory / "final"))
