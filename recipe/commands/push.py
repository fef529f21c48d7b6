"""Push what a run has not pushed: `python -m recipe push RUN`. Settings are those of the run; flags come on top."""

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from recipe.config.checks import check_repo_id
from recipe.config.command_line import make_parser, parse, read_config
from recipe.config.settings import PushConfig
from recipe.errors import RecipeError
from recipe.hub.background import end_with_training
from recipe.hub.client import explain, push_directory, revision_of
from recipe.report.card import card_files
from recipe.run.directory import list_checkpoints
from recipe.run.ledger import EVENTS, read_lines
from recipe.text import one_line


def main() -> None:
    """The command."""
    parser = make_parser(PushConfig, "python -m recipe push", "Push a run's checkpoints and finished model to the Hub.")
    parser.add_argument("run", help="Directory of the run.")
    parser.add_argument("--follow", help="For the training: push this directory alone; end when standard input closes.")
    run = Path(parse(parser, PushConfig, sys.argv[1:])[1]["run"])
    hub = read_config(run / "config.yaml").hub
    parser.set_defaults({f.name: getattr(hub, f.name) for f in fields(PushConfig)})
    settings, flags = parse(parser, PushConfig, sys.argv[1:])
    check_repo_id("repo_id", settings.repo_id)
    if flags["follow"]:
        end_with_training(run)
    revision = None
    for directory in [Path(flags["follow"])] if flags["follow"] else _missing(run, settings.repo_id):
        more = _card(run, directory, settings)
        try:
            commit = push_directory(
                directory, settings, more, lambda reason: print(f"{reason}; trying again", flush=True)
            )
        except Exception as error:
            raise RecipeError(f"{directory} was not pushed to {settings.repo_id}: {explain(error)}") from None
        revision = revision_of(directory, settings)
        print(f"pushed {directory} to {settings.repo_id}@{revision}, commit {commit}", flush=True)
    if revision is None:
        print(f"{run} has nothing to push")


def _card(run: Path, directory: Path, settings: PushConfig) -> dict[str, bytes]:
    """What lies beside a pushed model; nothing if the run's files are too damaged for that."""
    number = directory.name.removeprefix("step-")
    try:
        return card_files(run, settings.repo_id, update=int(number) if number.isdigit() else None)
    except Exception as error:  # the model is worth more
        print(f"{directory.name} is pushed without a card: {explain(error)}", flush=True)
        return {}


def _missing(run: Path, repo_id: str | None) -> Iterator[Path]:
    """What the run has not pushed: its finished checkpoints, oldest first, and the finished model."""
    from recipe.checkpoint.verify import why_invalid

    events = read_lines(run / EVENTS)
    pushed = [e.get("revision") for e in events if e.get("event") == "push" and e.get("repo") == repo_id]
    final = run / "final"
    for directory in [*list_checkpoints(run / "checkpoints")[::-1], *([final] if final.is_dir() else [])]:
        if directory.name in pushed:
            continue
        reason = "it is a symbolic link" if directory.is_symlink() else None
        if reason or (directory != final and (reason := why_invalid(directory))):
            print(one_line(f"{directory} is left out: {reason}"), flush=True)
        else:
            yield directory
