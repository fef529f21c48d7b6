"""Write a source as files of token ids, once: `python -m recipe prepare --config PRESET --output DIRECTORY`."""

from __future__ import annotations  # without it, --help prints each Annotated type in full

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from recipe.config.checks import check_repo_id
from recipe.config.command_line import make_parser, parse_run
from recipe.config.settings import Config, CountOrNull, PushConfig, SourceConfig
from recipe.errors import RecipeError
from recipe.hub.client import check_repository, explain, push_dataset
from recipe.report.dataset_card import dataset_card
from recipe.run.launch import check_launch
from recipe.run.stop import StopRequest


@dataclass(frozen=True)
class PrepareConfig(Config):
    """The settings of a run, of which data and batch.lanes say what is prepared, and where it goes."""

    output: str = ""
    """Directory of the files: a new one, or one that this command was stopped in."""
    format: Literal["parquet", "llmc"] = "parquet"
    """parquet: a column input_ids, a row per document. llmc: shards of llm.c, which has no place for documents' ends."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where the files are made: on this machine, or by datatrove on a Slurm or a Ray cluster that shares its directories."""
    processes: CountOrNull = None
    """Processes that work at once, never what they write; on a cluster its tasks. Null: the processors that this process may
    use, or a task for each file, 1,000 at most."""
    sbatch: tuple[str, ...] = ()
    """slurm: arguments of sbatch without their dashes, of which two are needed: partition=cpu time=4:00:00"""
    repo_id: str | None = None
    """Push what was made to the Hub, as the dataset repository `user/name`. Null: push nothing."""
    private: bool = True
    """Create the repository as a private one, and refuse one that is public."""


def main() -> None:
    """The command."""
    arguments = sys.argv[1:]
    parser = make_parser(PrepareConfig, "python -m recipe prepare", "Write text as files of token ids to train from.")
    config, _ = parse_run(parser, PrepareConfig, arguments)
    if not config.output.strip():
        raise RecipeError("set --output to the directory that is to hold the files")
    if config.repo_id is not None:
        check_repo_id("repo_id", config.repo_id)
    check_launch()
    stop = StopRequest()
    stop.listen()
    tasks = "" if config.executor == "local" else ", and ends its tasks"
    stop.prepare(f"before all was prepared{tasks}; the same command goes on from here")

    from recipe.data.engine import Engine
    from recipe.data.prepare import Wanted, prepare
    from recipe.data.workers import available_processors

    do_files = None
    if config.executor != "local":
        do_files = Engine(config.executor, config.processes, config.sbatch, _say).do_all

    directory, push = Path(config.output), PushConfig(config.repo_id, config.private)
    if push.repo_id:
        _say(check_repository(push, "repo_id", "the files", "dataset"))
    processes = config.processes or available_processors()
    manifest = prepare(Wanted(config, directory, config.format), processes, _say, do_files)
    for part, words in (("training", "to train on"), ("held_out", "held out")):
        _say(f"{manifest[part]['documents']:,} documents, {manifest[part]['tokens']:,} tokens {words}")
    _say(f"train from {directory}:\n  {shlex.join(training_command(config, manifest, arguments))}")
    if push.repo_id:
        _push(directory, push, manifest)


def training_command(config: PrepareConfig, manifest: dict[str, Any], arguments: Sequence[str]) -> list[str]:
    """The command that trains on what was prepared by `arguments`, with their settings of everything else."""
    flags: list[list[str]] = []
    for argument in arguments:
        flags = [*flags, [argument]] if argument.startswith("--") else [*flags[:-1], [*flags[-1], argument]]
    given = {flag[0].partition("=")[0].removeprefix("--") for flag in flags}
    replaced = {f.name for f in fields(PrepareConfig)} - {f.name for f in fields(Config)}
    replaced |= {f"data.{f.name}" for f in fields(SourceConfig)} | {"data.tokenizer", "data.validation_one_in"}
    kept = [flag for flag in flags if flag[0].partition("=")[0].removeprefix("--") not in replaced]
    ending = "parquet" if config.format == "parquet" else "bin"
    tokenizer = config.data.tokenizer or (None if config.model.init_from else f"{config.output}/tokenizer")
    more = {"data.token_files": f"{config.output}/*.{ending}"} | ({"data.tokenizer": tokenizer} if tokenizer else {})
    if manifest["rows_are"] == "packed":
        more["data.rows_are"] = "packed"
    if not any(name.startswith("val-") for name in manifest["files"]):
        more["data.validation_one_in"] = "null"
    for name, nothing in {"text_files": "[]", "token_column": "null", "token_dtype": "null"}.items():
        if getattr(config.data, name) and f"data.{name}" not in given:  # it is in a file of settings
            more[f"data.{name}"] = nothing
    added = [part for name, value in more.items() for part in (f"--{name}", value)]
    return ["python", "-m", "recipe", "train", *(part for flag in kept for part in flag), *added]


def _push(directory: Path, push: PushConfig, manifest: dict[str, Any]) -> None:
    card = dataset_card(str(push.repo_id), manifest)
    try:
        commit = push_dataset(directory, push, {"README.md": card}, lambda reason: _say(f"{reason}; trying again"))
    except Exception as error:
        raise RecipeError(
            f"{directory} was not pushed to {push.repo_id}: {explain(error)}; the same command tries again"
        ) from None
    _say(f"pushed {directory} to {push.repo_id}, commit {commit}")


def _say(line: str) -> None:
    print(line, flush=True)
