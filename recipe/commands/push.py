"""Push what a run has not pushed: `python -m recipe push RUN`. Settings are those of the run; flags come on top."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from recipe.config.checks import check_repo_id
from recipe.config.command_line import make_parser, parse
from recipe.config.settings import PushConfig
from recipe.errors import RecipeError, run_command
from recipe.hub.client import push_directory, revision_of


def main() -> None:
    """The command."""
    parser = make_parser(PushConfig, "python -m recipe push", "Push a run's checkpoints and finished model to the Hub.")
    parser.add_argument("run", help="Directory of the run.")
    run = Path(parse(parser, PushConfig, sys.argv[1:])[1]["run"])
    parser.set_defaults(_settings_of(run))
    settings, _ = parse(parser, PushConfig, sys.argv[1:])
    check_repo_id("repo_id", settings.repo_id)

    from recipe.checkpoint.files import list_checkpoints, why_invalid

    pushed = _pushed(run / "ledger.jsonl", settings.repo_id)
    directories = [path for path in list_checkpoints(run / "checkpoints")[::-1] if path.name not in pushed]
    directories += [run / "final"] if (run / "final").is_dir() else []
    for directory in directories:
        reason = why_invalid(directory) if directory.name != "final" else None
        if reason:
            print(f"{directory} is left out: {reason}")
            continue
        try:
            commit = push_directory(directory, settings, lambda reason: print(f"{reason}; trying again", flush=True))
        except RecipeError as error:
            raise RecipeError(f"{directory} was not pushed to {settings.repo_id}: {error}") from None
        revision = revision_of(directory, settings)
        print(f"pushed {directory} to {settings.repo_id}@{revision}, commit {commit}", flush=True)
    if not directories:
        print(f"nothing in {run} that is not pushed yet")


def _settings_of(run: Path) -> dict[str, Any]:
    import yaml

    try:
        section = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("hub", {})
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        raise RecipeError(f"{run} is no run directory: there is no config.yaml in it that can be read") from None
    return {f.name: section[f.name] for f in fields(PushConfig) if f.name in section}


def _pushed(ledger: Path, repo_id: str) -> set[str]:
    """The revisions that the run itself has pushed."""
    revisions = set()
    for text in ledger.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # half written, when the power went
            continue
        if line.get("event") == "push" and line["repo"] == repo_id:
            revisions.add(line["revision"])
    return revisions


if __name__ == "__main__":
    run_command(main)
