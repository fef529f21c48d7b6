"""What a run prints at its end works as it is printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.__main__ import main
from recipe.config.settings import Config, HubConfig, RunConfig
from recipe.finish import usage, what_next
from recipe.hub import Pusher
from recipe.run.console import Console
from tests.support.runs import make_run

AWKWARD = """Bob's "best" $runs; `x`"""


@pytest.mark.slow
def test_what_a_run_prints_at_its_end_works_for_any_path(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / AWKWARD
    shutil.copytree(finished, directory)
    (directory / "final/README.md").unlink(missing_ok=True)
    lines = what_next(directory).splitlines()
    assert len(lines) == 3
    for line in lines:
        python, m, recipe, *arguments = shlex.split(line, comments=True)
        assert (python, m, recipe) == ("python", "-m", "recipe")
        monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
        main()
    assert (directory / "report.html").is_file()
    assert (directory / "final/README.md").is_file()
    path, _, snippet = usage(directory / "final").partition("\n")
    assert path == str(directory / "final")
    capsys.readouterr()
    exec(snippet, {})  # as a person pastes it
    assert capsys.readouterr().out.startswith("def __init__(self")


def test_the_command_that_pushes_what_is_missing_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(run=RunConfig(directory=str(tmp_path / AWKWARD)), hub=HubConfig(repo_id="user/model"))
    run = replace(make_run(config), console=Console(True, 1))
    run.directory.mkdir()
    Pusher(run).push(1, tmp_path / "step-000001")  # there is none
    command = capsys.readouterr().out.split("; `", 1)[1].rpartition("` pushes what is missing")[0]
    assert shlex.split(command) == ["python", "-m", "recipe", "push", str(run.directory)]
