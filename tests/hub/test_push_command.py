"""`recipe push` on a run that nobody trained: damaged files, and links that lead out of the run."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipe.commands import push as command
from recipe.config.command_line import read_config, write_config
from recipe.config.settings import Config, HubConfig, PushConfig, RunConfig
from recipe.hub.background import PUSHING, Pusher
from recipe.hub.client import push_directory
from recipe.run.directory import FORMAT
from recipe.run.ledger import EVENTS, LEDGER
from recipe.run.run import Run
from tests.helpers import read_events, skip_if_quick
from tests.support.checkpoints import state_of
from tests.support.hub_server import HubServer
from tests.support.run_files import write_run
from tests.support.runs import make_run

SECRET = b"a private key"
CHECKPOINT = ("model.safetensors", "config.json", "training/optimizer.safetensors", "training/state.json")


def write_checkpoint(directory: Path) -> Path:
    """With files that verify, and are no model."""
    (directory / "training").mkdir(parents=True)
    files = {}
    for name in CHECKPOINT:
        content = (json.dumps(asdict(state_of(6))) if name.endswith("state.json") else name).encode()
        (directory / name).write_bytes(content)
        files[name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}), encoding="utf-8")
    return directory


def plant_links(directory: Path, elsewhere: Path) -> Path:
    """Links to a secret, to the directory it is in, and to nowhere; and a pipe, which nobody writes to."""
    elsewhere.mkdir()
    (elsewhere / "id_rsa").write_bytes(SECRET)
    (directory / "vocab.json").symlink_to(elsewhere / "id_rsa")
    (directory / "original").symlink_to(elsewhere)
    (directory / "dangling.json").symlink_to(elsewhere / "none")
    os.mkfifo(directory / "pipe.json")
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run with one checkpoint and a finished model."""
    write_run(tmp_path / "run")
    write_checkpoint(tmp_path / "run/checkpoints/step-000006")
    (tmp_path / "run/final/model.safetensors").write_bytes(b"finished")
    return tmp_path / "run"


def push(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["push", str(directory), "--repo_id", "user/model"])
    command.main()


def test_nothing_behind_a_link_is_pushed(online: HubServer, tmp_path: Path) -> None:
    checkpoint = plant_links(write_checkpoint(tmp_path / "step-000001"), tmp_path / "elsewhere")
    push_directory(checkpoint, PushConfig("user/model", training_state=True), {}, print)
    assert set(online.pushed("main")) == {*CHECKPOINT, "manifest.json"}


def test_nothing_behind_a_link_comes_into_the_queue(tmp_path: Path) -> None:
    """Nor does a link in the queue's place lead it out of the run; that of a linked `checkpoints` is its own."""
    disk = tmp_path / "disk"
    plant_links(write_checkpoint(disk / "step-000001"), tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(disk)
    (tmp_path / "run" / PUSHING).symlink_to(tmp_path / "elsewhere")
    config = Config(run=RunConfig(directory=str(tmp_path / "run")), hub=HubConfig(repo_id="user/model"))
    nothing: Any = None
    pusher = Pusher(Run(config, nothing, SimpleNamespace(is_main_process=True), "fp32", nothing, nothing, nothing))
    pusher._child = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
    pusher._started = float("inf")
    pusher.push(1, tmp_path / "run/checkpoints/step-000001")
    (links,) = (tmp_path / "run" / PUSHING).glob("*/step-000001")
    queued = {path.relative_to(links).as_posix() for path in links.rglob("*") if not path.is_dir()}
    assert queued == {*CHECKPOINT, "manifest.json"}
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["id_rsa"]


def test_a_model_behind_a_link_is_left_out_with_a_line(
    online: HubServer, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not one in a `checkpoints` that is linked to another disk."""
    os.rename(directory / "final", directory.parent / "final")
    (directory / "final").symlink_to(directory.parent / "final")
    os.rename(directory / "checkpoints", directory.parent / "disk")
    (directory / "checkpoints").symlink_to(directory.parent / "disk")
    (directory / "checkpoints/step-000012").symlink_to(directory.parent / "disk/step-000006")
    push(directory, monkeypatch)
    output = capsys.readouterr().out
    for name in ("final", "checkpoints/step-000012"):
        assert f"{directory / name} is left out: it is a symbolic link\n" in output
    assert list(online.repositories["user/model"].tags) == ["step-000006"]
    assert online.pushed("main")["model.safetensors"] == b"model.safetensors"


def test_damaged_records_stop_no_push(
    online: HubServer, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Events without what they should have, and of other types; without its ledger, a model is pushed without a card."""
    lines = ['{"event": "push", "update": 6}', '{"event": "push", "update": null, "repo": "user/model"}', "[]", "null"]
    lines += ['{"event": "push", "update": 6, "repo": "user/model", "revision": ["step-000006"]}', "[" * 100_000]
    lines += ['{"event": "sample", "update": 6, "text": "\\u0000\\u001b\\ud800"}']
    (directory / EVENTS).write_text("\n".join(lines), encoding="utf-8")
    (directory / "summary.json").write_text('{"validation": []', encoding="utf-8")
    push(directory, monkeypatch)
    assert capsys.readouterr().out.count("pushed ") == 2
    assert {"README.md", "curves.png", "config.yaml", "model.safetensors"} < set(online.pushed("main"))

    (directory / LEDGER).write_bytes(b"\xff\xfe\x00" * 99)
    push(directory, monkeypatch)
    output = capsys.readouterr().out
    assert "final is pushed without a card: " in output
    assert "has done no update yet" in output
    assert online.repositories["user/model"].messages[-1] == "Push final"


@pytest.mark.slow
def test_a_push_beside_a_training_needs_no_encoding_of_the_console(
    online: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process prints the run's name, which cp1252 does not have, after the commit."""
    skip_if_quick()
    directory = write_run(tmp_path / "läuft-日本")
    (directory / "final/model.safetensors").write_bytes(b"finished")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    config = replace(read_config(directory / "config.yaml"), hub=HubConfig(repo_id="user/model"))
    write_config(config, directory / "config.yaml")
    run = make_run(config)
    run.console.enabled = True
    pusher = Pusher(run)
    pusher.push(12, directory / "final")
    pusher.finish()
    run.ledger.close()
    assert "pushed final to user/model@main\n" in capsys.readouterr().out
    (event,) = read_events(directory, "push")
    assert event["commit"] == online.repositories["user/model"].branches["main"]
