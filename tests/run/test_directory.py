"""The directory of a run: whose it is, and what becomes of an earlier one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipe.checkpoint.resume import find_resume_point
from recipe.config.command_line import load_config
from recipe.config.settings import Config, RunConfig
from recipe.errors import RecipeError
from recipe.run.directory import begin_run, claim_run_directory, list_checkpoints
from tests.helpers import TINY, assert_one_line, read_events, read_ledger, train
from tests.support.runs import make_run


def old_ledger(directory: Path) -> None:
    """One file with updates and events, as version 0.1.0 wrote it."""
    directory.mkdir()
    lines: list[dict[str, Any]] = [{"event": "start", "update": 0, "loss": "chunked"}, {"update": 1, "loss": 5.0}]
    (directory / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_a_directory_of_an_earlier_version_is_refused_and_fresh_moves_it_aside(texts: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    old_ledger(directory)
    command = [
        *TINY,
        "--run.directory",
        str(directory),
        "--data.text_files",
        f"{texts}/*.txt",
        "--run.max_updates",
        "2",
    ]
    assert_one_line(train(*command), ["was written by version 0.1.0", "--run.directory", "--resume fresh"])
    assert {path.name for path in directory.iterdir()} <= {"ledger.jsonl", ".lock"}, "nothing is written there"
    done = train(*command, "--resume", "fresh")
    assert done.returncode == 0, done.stderr
    assert f"what this run replaces is now in {directory}/previous/1" in done.stdout
    assert '"chunked"' in (directory / "previous/1/ledger.jsonl").read_text(encoding="utf-8")
    assert [entry["update"] for entry in read_ledger(directory)] == [1, 2]
    assert [event["event"] for event in read_events(directory)] == ["start", "sample"]


def test_checkpoints_of_an_earlier_format_are_refused_in_one_line(finished: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(finished, tmp_path / "run")
    for checkpoint in list_checkpoints(directory / "checkpoints"):
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format": 2}), encoding="utf-8")
    config = load_config(["--config", str(directory / "config.yaml"), "--run.directory", str(directory)])
    with pytest.raises(
        RecipeError, match=r"its format is 2, of another version .* --resume fresh starts again"
    ) as refused:
        find_resume_point(config)
    assert "\n" not in str(refused.value)
    assert find_resume_point(replace(config, resume="fresh")).checkpoint is None


def test_a_directory_has_one_owner_and_is_tried_first(tmp_path: Path) -> None:
    config = Config(run=RunConfig(directory=str(tmp_path / "run")))
    first, second = make_run(config), make_run(config)
    claim_run_directory(first)
    with pytest.raises(RecipeError, match=r"another process is training in run\.directory"):
        claim_run_directory(second)
    first.lock[0].close()
    claim_run_directory(second)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match=r"cannot write run\.directory = .*Not a directory"):
        claim_run_directory(make_run(Config(run=RunConfig(directory=str(tmp_path / "file/run")))))


def test_a_new_run_moves_what_is_there_and_nothing_of_others(accelerator: Any, tmp_path: Path) -> None:
    run = make_run(Config(run=RunConfig(directory=str(tmp_path))), accelerator)
    for number in (1, 2):
        (tmp_path / "ledger.jsonl").write_text(f"{number}")
        (tmp_path / "notes.txt").write_text("mine")
        begin_run(run, 0, None)
        assert (tmp_path / f"previous/{number}/ledger.jsonl").read_text() == f"{number}"
        run.ledger.close()
    assert (tmp_path / "previous/2/events.jsonl").exists()
    assert (tmp_path / "notes.txt").exists()
    assert read_events(tmp_path, "start") != []
