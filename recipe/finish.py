"""What a run leaves when it is complete: the model, the summary, and what is printed of them."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recipe.config.settings import HELD_OUT
from recipe.errors import RecipeError
from recipe.evaluation.evaluate import Evaluation
from recipe.evaluation.in_run import RunEvaluation
from recipe.model.export import export_model
from recipe.run.files import new_file
from recipe.run.ledger import LEDGER, read_lines, utc_now
from recipe.run.run import Run
from recipe.step.parity import ParityCheck


def end_stopped_run(run: Run, pusher: Any, saver: Any) -> None:
    """Say how to go on, wait for the pushes, and exit with the code of what stopped the run. Collective.

    Raises:
        RecipeError: the last update is not saved.
    """
    same = "the same command" if run.config.resume == "auto" else "the same command with --resume auto"
    run.console.say(f"stopped by {run.stop.reason}; {same} goes on from here")
    for finish in (pusher.finish, run.ledger.trackers.finish):
        run.on_main(finish)  # a launcher ends the others when it sees one rank leave
    run.accelerator.end_training()
    saver.raise_failure()
    sys.exit(run.stop.exit_code)


def finish_run(run: Run, model: Any, tokenizer: Any, evaluation: RunEvaluation, parity: ParityCheck | None) -> None:
    """Write final/ and summary.json, and print what a person wants to see first. Rank 0 does it; the others return.

    Raises:
        RecipeError: the model or the summary cannot be written.
    """
    if not run.is_main:
        return
    directory = run.directory
    export_model(model.gpt2, tokenizer, directory / "final")
    before = {name: _before_training(run, name, after) for name, after in evaluation.latest.items()}
    summary = {
        "plan": dict(run.plan.rows()),
        "parameters": run.plan.parameters,
        "precision": run.precision,
        "validation": {
            name: {"before": (old := before[name]) and asdict(old), "after": asdict(after)}
            for name, after in evaluation.latest.items()
        },
        "parity_check": asdict(parity) if parity else None,
        "finished_utc": utc_now(),
    }
    try:
        with new_file(directory / "summary.json") as file:
            file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {directory}/summary.json: {error.strerror}") from None
    for name, after in evaluation.latest.items():
        title = "validation" if name == HELD_OUT else f"validation, {name}"
        run.console.section(title, f"  before  {before[name] or 'not measured'}\n  after   {after}")
    for text in evaluation.samples.values():
        run.console.section("sample", text)
    if parity:
        run.console.section("parity check", parity)
    run.console.section(
        "what next",
        f"python -m recipe report {directory}    # a page with its curves\n"
        f"python -m recipe card {directory}      # a model card\n"
        "python -m recipe --help    # all commands",
    )
    run.console.section("finished model", usage(directory / "final"))
    run.ledger.trackers.finish()


def _before_training(run: Run, name: str, after: Evaluation) -> Evaluation | None:
    """What the ledger's line of update 0 says of the set `name`; None if a run went on from elsewhere and has no such line."""
    for line in read_lines(run.directory / LEDGER)[:1]:
        loss, bits = (line.get(f"validation/{name}/{value}") for value in ("loss", "bits_per_byte"))
        if line["update"] == 0 and loss is not None and bits is not None:
            return replace(after, loss=loss, bits_per_byte=bits)
    return None


def usage(model_directory: Path) -> str:
    """Where the model is, and the Python that loads it."""
    name = model_directory.as_posix()  # in Python's quotes a backslash would mean something else
    return f"""{name}

from transformers import AutoTokenizer, GPT2LMHeadModel
model, tokenizer = GPT2LMHeadModel.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
print(tokenizer.decode(model.generate(**tokenizer("def __init__(self", return_tensors="pt"), max_new_tokens=50)[0]))"""
