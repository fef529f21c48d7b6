"""What a run leaves when it is complete: the model, the summary, and what is printed of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.config import Config
from recipe.console import Console
from recipe.evaluate import Evaluation
from recipe.export import export_model
from recipe.generate import GenerateConfig, generate
from recipe.parity import ParityReceipt
from recipe.plan import RunPlan
from recipe.run_directory import usage, write_summary


def finish_run(
    config: Config,
    plan: RunPlan,
    model: Any,
    tokenizer: Any,
    console: Console,
    precision: str,
    before: Evaluation | None,
    after: Evaluation | None,
    receipt: ParityReceipt | None,
) -> None:
    """Write final/ and summary.json, and print what a person wants to see first. On rank 0."""
    directory = Path(config.run.directory)
    gpt2 = model.gpt2.eval()
    export_model(gpt2, tokenizer, directory / "final")
    write_summary(directory / "summary.json", plan, precision, before, after, receipt)
    if before and after:
        console.section("validation", f"  before  {before}\n  after   {after}")
    if config.evaluation.sample_tokens:
        sampling = GenerateConfig(config.evaluation.prompt, config.evaluation.sample_tokens, seed=config.run.seed)
        console.section("sample", generate(gpt2, tokenizer, sampling))
    if receipt:
        console.section("parity receipt", receipt)
    console.section("finished model", usage(directory / "final"))
