"""What a run leaves when it is complete: the model, the summary, and what is printed of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.config import Config
from recipe.console import Console
from recipe.evaluate import Evaluation
from recipe.export import export_model
from recipe.parity import ParityReceipt
from recipe.plan import RunPlan
from recipe.run_directory import usage, write_summary
from recipe.validation import HELD_OUT


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
    receipt: ParityReceipt | None,
) -> None:
    """Write final/ and summary.json, and print what a person wants to see first. On rank 0."""
    directory = Path(config.run.directory)
    export_model(model.gpt2, tokenizer, directory / "final")
    write_summary(directory / "summary.json", plan, precision, before, after, receipt)
    for name in after:
        title = "validation" if name == HELD_OUT else f"validation, {name}"
        console.section(title, f"  before  {before[name]}\n  after   {after[name]}")
    for text in samples.values():
        console.section("sample", text)
    if receipt:
        console.section("parity receipt", receipt)
    console.section(
        "what next",
        f"python -m recipe.report {directory}    # a page with its curves\n"
        f"python -m recipe.card {directory}      # a model card\n"
        "python -m recipe --help    # all commands",
    )
    console.section("finished model", usage(directory / "final"))
