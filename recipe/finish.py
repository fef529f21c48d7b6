"""What a run leaves when it is complete: the model, the summary, and what is printed of them."""

import json
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from recipe.config.settings import HELD_OUT
from recipe.errors import RecipeError
from recipe.evaluation.in_run import RunEvaluation
from recipe.format import json_value
from recipe.model.export import export_model
from recipe.run.files import new_file
from recipe.run.ledger import EVENTS, LEDGER, read_events, read_lines, utc_now
from recipe.run.run import Run
from recipe.step.parity import ParityCheck


def end_stopped_run(run: Run, pusher: Any, saver: Any) -> None:
    """Say how to go on, wait for the pushes, and exit with the code of what stopped the run. Collective.

    Raises:
        RecipeError: the last update is not saved.
    """
    is_same = run.config.resume == "auto" or run.config.run.branch
    same = "the same command" if is_same else "the same command with --resume auto"
    run.console.say(f"stopped by {run.stop.reason}" + ("" if saver.failure else f"; {same} goes on from here"))
    for finish in (pusher.finish, run.ledger.trackers.finish):
        run.on_main(finish)  # a launcher ends the others when it sees one rank leave
    run.accelerator.end_training()
    saver.raise_failure()
    sys.exit(run.stop.exit_code)


def has_nothing_left(run: Run, update: int) -> bool:
    """Whether a run that has done `update` updates has nothing left to do; says so."""
    plan, final = run.plan, run.directory / "final"
    if update > plan.planned_updates:
        tokens = plan.tokens_after(update)
        is_early = plan.planned_updates < plan.total_updates
        setting = f"--run.max_updates {update}" if is_early else f"--schedule.total_tokens {tokens}"
        run.console.say(
            f"\nthis run has done {update:,} updates, and {plan.planned_updates:,} are planned: nothing is trained; {setting} "
            "finishes it as it is, and a larger number goes on"
        )
        return True
    if update == plan.planned_updates and any(final.glob("*.safetensors")):
        again = "" if run.config.run.branch else "; --resume fresh trains it again"
        run.console.section(f"this run is complete{again}", usage(final))
        return True
    return False


def finish_run(run: Run, model: Any, tokenizer: Any, evaluation: RunEvaluation) -> None:
    """Write final/ and summary.json, and print what a person wants to see first. Rank 0 does it; the others end.

    Raises:
        RecipeError: the model or the summary cannot be written.
    """
    if not run.is_main:
        return run.accelerator.end_training()
    directory = run.directory
    export_model(model.gpt2, tokenizer, directory / "final")
    # As the record has it: this process may be a later start of the run.
    before = evaluation.of_line(next((line for line in read_lines(directory / LEDGER) if line["update"] == 0), {}))
    parity = _parity_check(run)
    summary = {
        "plan": dict(run.plan.rows()),
        "parameters": run.plan.parameters,
        "precision": run.precision,
        "validation": {
            name: {"before": asdict(before[name]) if name in before else None, "after": asdict(after)}
            for name, after in evaluation.latest.items()
        },
        "parity_check": asdict(parity) if parity else None,
        "finished_utc": utc_now(),
    }
    try:
        with new_file(directory / "summary.json") as file:
            file.write_text(json.dumps(json_value(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write {directory}/summary.json: {error.strerror}") from None
    for name, after in evaluation.latest.items():
        title = "validation" if name == HELD_OUT else f"validation, {name}"
        run.console.section(title, f"  before  {before.get(name, 'not measured')}\n  after   {after}")
    for text in evaluation.samples.values():
        run.console.section("sample", text)
    if parity:
        run.console.section("parity check", parity)
    run.console.section("what next", what_next(directory))
    run.console.section("finished model", usage(directory / "final"))
    run.ledger.trackers.finish()
    run.accelerator.end_training()


def _parity_check(run: Run) -> ParityCheck | None:
    """That of the first start; None if there was none."""
    events = read_events(run.directory / EVENTS, "parity_check", 0)
    return ParityCheck(**{f.name: events[-1][f.name] for f in fields(ParityCheck)}) if events else None


def what_next(directory: Path) -> str:
    """Commands for a complete run, to be copied into a shell."""
    quoted = shlex.quote(str(directory))
    return (
        f"python -m recipe report {quoted}    # a page with its curves\n"
        f"python -m recipe card {quoted}      # a model card\n"
        "python -m recipe --help    # all commands"
    )


def usage(model_directory: Path) -> str:
    """Where the model is, and the Python that loads it."""
    name = repr(model_directory.as_posix())
    return f"""{model_directory}

from transformers import AutoTokenizer, GPT2LMHeadModel
model, tokenizer = GPT2LMHeadModel.from_pretrained({name}), AutoTokenizer.from_pretrained({name})
print(tokenizer.decode(model.generate(**tokenizer("def __init__(self", return_tensors="pt"), max_new_tokens=50)[0]))"""
