"""What a run prints at its end works as it is printed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipe.__main__ import main
from recipe.config.command_line import read_config
from recipe.config.settings import Config, HubConfig, RunConfig
from recipe.evaluation.evaluate import Evaluation
from recipe.evaluation.in_run import RunEvaluation
from recipe.finish import finish_run, usage, what_next
from recipe.hub import Pusher
from recipe.model.export import load_pretrained
from recipe.report.record import read_record
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


def test_a_validation_loss_that_is_not_finite_is_null_in_the_summary(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run ends as any other; a report and a card can be made of it."""
    shutil.copytree(finished, tmp_path / "run")
    config = read_config(finished / "config.yaml")
    run = make_run(replace(config, run=replace(config.run, directory=str(tmp_path / "run"))))
    run = replace(run, console=Console(True, 1))
    run.accelerator.end_training = lambda: None
    gpt2, tokenizer = load_pretrained(str(finished / "final"))
    run.accelerator.unwrap_model = lambda model: model
    evaluation = RunEvaluation(run, {}, SimpleNamespace(gpt2=gpt2), tokenizer)
    evaluation.latest["held_out"] = Evaluation(float("nan"), float("inf"), 10, 20)
    finish_run(run, SimpleNamespace(gpt2=gpt2), tokenizer, evaluation)
    assert "nan nats per token, inf bits per byte" in capsys.readouterr().out
    text = (tmp_path / "run/summary.json").read_text(encoding="utf-8")
    after = json.loads(text, parse_constant=pytest.fail)["validation"]["held_out"]["after"]
    assert after == {"loss": None, "bits_per_byte": None, "tokens": 10, "text_bytes": 20}
    assert read_record(tmp_path / "run").summary["validation"]["held_out"]["after"] == after


def test_the_command_that_pushes_what_is_missing_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(run=RunConfig(directory=str(tmp_path / AWKWARD)), hub=HubConfig(repo_id="user/model"))
    run = replace(make_run(config), console=Console(True, 1))
    run.directory.mkdir()
    Pusher(run).push(1, tmp_path / "step-000001")  # there is none
    command = capsys.readouterr().out.split("; `", 1)[1].rpartition("` pushes what is missing")[0]
    assert shlex.split(command) == ["python", "-m", "recipe", "push", str(run.directory)]
