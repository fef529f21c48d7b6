"""What one can watch: the bar on a real terminal, and the run's curves in TensorBoard and trackio, asked over HTTP.

And that a tracker never ends a run: its faults are a line and an event, and what can be known before is refused before.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from recipe.config.settings import Config, LogConfig, RunConfig
from recipe.errors import RecipeError
from recipe.run.trackers import TRACKER_PROJECT, Trackers, check_trackers
from tests.helpers import (
    ROOT,
    SCRIPT,
    TINY,
    assert_one_line,
    environment,
    free_port,
    read_events,
    read_ledger,
    start_ranks,
    start_training,
    train,
    wait_for,
)

TOKEN = "hf_ThisIsNoTokenButWouldBeASecret00000"
SEEN = ("loss", "grad_norm", "learning_rate", "tokens_per_second")


@dataclass(frozen=True)
class Watched:
    """A run of two ranks on terminals of 20 and then 120 columns, set back by two updates and resumed in between."""

    root: Path
    directory: Path
    screens: dict[int, str]


def on_terminal(columns: int, arguments: list[str], **more: str) -> str:
    """What two ranks that train on one terminal write to it."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    ranks = start_ranks(2, [SCRIPT, *arguments], stdout=inside, **more)
    os.close(inside)
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # the last rank has gone
        pass
    finally:
        for rank in ranks:
            rank.kill()
        os.close(terminal)
    screen = written.decode()
    assert [rank.wait() for rank in ranks] == [0, 0], screen
    return screen


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Watched:
    root = tmp_path_factory.mktemp("watched")
    directory = root / "runs/watched"
    arguments = [
        *[*TINY, "--run.directory", str(directory), "--data.text_files", f"{texts}/*.txt"],
        *["--log.trackers", "tensorboard", "trackio", "--checkpoint.every_tokens", "3072"],
    ]
    secrets = {"TRACKIO_DIR": str(root / "trackio"), "HF_TOKEN": TOKEN}
    screens = {20: on_terminal(20, [*arguments, "--run.max_updates", "4"], **secrets)}
    shutil.rmtree(directory / "checkpoints/step-000004")  # as if the power had gone after update 4
    screens[120] = on_terminal(120, [*arguments, "--run.max_updates", "8"], **secrets)
    assert "going on from" in screens[120]
    return Watched(root, directory, screens)


@contextmanager
def server(command: list[str], port: int, **more: str) -> Iterator[str]:
    """A server on 127.0.0.1 that answers; its address."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(BROWSER="true", **more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (URLError, OSError):
                assert process.poll() is None, "the server has ended"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def answer(address: str, question: dict[str, Any] | None = None) -> Any:
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def test_one_bar_that_fits_the_terminal(watched: Watched) -> None:
    for columns, screen in watched.screens.items():
        bars = [part for part in re.split(r"[\r\n]+", screen) if re.match(r" *\d+%\|", part)]
        updates = {20: 4, 120: 8}[columns]
        assert len(bars) >= 2, screen
        assert max(map(len, bars)) <= columns
        assert len(re.findall(rf"{updates}/{updates}[^\r\n]*\r\n", screen)) == 1, "two bars would end twice"
    assert re.search(r"8/8 \[.*updates/s, loss \d\.\d{4}, [\d,]+ tokens/s, lr ", watched.screens[120])


def test_tensorboard_shows_the_curves_of_the_ledger(watched: Watched) -> None:
    """Each update once, although two of them were trained again after the resume."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(watched.directory.parent)]
    ledger = read_ledger(watched.directory)
    assert [entry["update"] for entry in ledger] == list(range(1, 9))
    with server([*command, "--host", "127.0.0.1", "--port", str(port)], port) as address:
        run = "watched/token-budget-recipe"
        for _ in range(100):  # it reads in the background
            if run in answer(f"{address}/data/plugin/scalars/tags"):
                break
            time.sleep(0.1)
        for tag in SEEN:
            shown = answer(f"{address}/data/plugin/scalars/scalars?run={run}&tag={tag}")
            assert [(step, value) for _, step, value in shown] == [
                (entry["update"], pytest.approx(entry[tag], rel=1e-6)) for entry in ledger
            ]


def test_trackio_shows_the_curves_of_the_ledger(watched: Watched) -> None:
    """One run, which the resume went on with; it keeps what was logged of the two updates that were trained again."""
    port = free_port()
    trackio = str(Path(sys.executable).parent / "trackio")
    settings = {"TRACKIO_DIR": str(watched.root / "trackio"), "GRADIO_SERVER_PORT": str(port)}
    ledger = {entry["update"]: entry for entry in read_ledger(watched.directory)}
    with server([trackio, "show", "--project", "token-budget-recipe"], port, **settings) as address:
        page = urllib.request.urlopen(address, timeout=20).read().decode()
        assert "<html" in page
        (run,) = answer(f"{address}/api/get_runs_for_project", {"project": "token-budget-recipe"})["data"]
        assert run["name"] == "watched"
        logs = answer(f"{address}/api/get_logs", {"project": "token-budget-recipe", "run": "watched"})["data"]
    assert sorted(log["step"] for log in logs) == sorted([*ledger, 3, 4])
    latest = {log["step"]: log for log in logs}
    for update, entry in ledger.items():
        for name in SEEN:
            if update not in (3, 4) or name == "loss":  # a time is not the same twice
                assert latest[update][name] == pytest.approx(entry[name]), (update, name)


def test_no_file_of_a_run_or_its_trackers_holds_a_token(watched: Watched) -> None:
    files = [path for path in watched.root.rglob("*") if path.is_file()]
    assert {".db", ".jsonl", ".safetensors"} <= {path.suffix for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert not any(TOKEN in screen for screen in watched.screens.values())


# A tracker that fails.


def plain_arguments(directory: Path, texts: Path, *more: str) -> list[str]:
    return [*TINY, "--run.directory", str(directory), "--data.text_files", f"{texts}/*.txt", *more]


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_trackers_only_costs_their_curves(texts: Path, tmp_path: Path) -> None:
    """TensorBoard's file cannot grow beyond what it has after two updates; trackio's directory is none."""
    directory, places = tmp_path / "run", {"TRACKIO_DIR": "/dev/null/trackio"}
    more = ["--run.max_updates", "24", "--log.trackers", "tensorboard", "trackio"]
    process = start_training(*plain_arguments(directory, texts, *more), **places)
    wait_for(process, "update      2/")
    (curves,) = (directory / TRACKER_PROJECT).glob("events.out.tfevents.*")
    full = max(path.stat().st_size for path in (curves, directory / "ledger.jsonl")) + 1000
    unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    wait_for(process, "tracker tensorboard failed: [Errno 27] File too large; training goes on without it")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert [entry["update"] for entry in read_ledger(directory)] == list(range(1, 25))
    assert "finished model" in output
    failed = {event["tracker"]: event["reason"] for event in read_events(directory, "tracker_failed")}
    assert failed.keys() == {"tensorboard", "trackio"}
    assert "File too large" in failed["tensorboard"]
    assert "Not a directory: '/dev/null/trackio'" in failed["trackio"]


@pytest.fixture
def told(tmp_path: Path, accelerator: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Trackers, list[Any]]:
    """TensorBoard's and trackio's trackers, and (tracker, reason, update, whether it is left out) of each failure."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    failures: list[Any] = []
    config = Config(run=RunConfig(directory=str(tmp_path)), log=LogConfig(trackers=("tensorboard", "trackio")))
    return Trackers(config, lambda *failure: failures.append(failure)), failures


@pytest.mark.parametrize("moment", ["start", "store_init_configuration", "log", "finish"])
def test_an_exception_of_one_tracker_leaves_it_out_and_the_others_in(
    told: tuple[Trackers, list[Any]], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker, TrackioTracker

    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyError("a plugin's\nown")

    trackers, failures = told
    calls: list[str] = []
    for name in ("start", "store_init_configuration", "log", "finish"):
        monkeypatch.setattr(TrackioTracker, name, lambda self, *rest, _name=name, **more: calls.append(_name))
    monkeypatch.setattr(TensorBoardTracker, moment, fail)
    trackers.start(0)
    for update in (1, 2):
        trackers.log({"loss": 1.0}, update)
    trackers.finish()
    when = {"log": 1, "finish": 2}.get(moment, 0)
    assert failures == [("tensorboard", '"a plugin\'s\\nown"', when, True)]
    assert [call for call in calls if call != "store_init_configuration"] == ["start", "log", "log", "finish"]


def test_a_thread_of_tensorboard_that_dies_prints_nothing(
    told: tuple[Trackers, list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its writer raises in a thread of its own, and again at the next number."""
    trackers, failures = told
    trackers.config = Config(run=trackers.config.run, log=LogConfig(trackers=("tensorboard",)))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        trackers.start(0)
        trackers.log({"loss": 1.0}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    ((name, reason, _, is_left_out),) = failures
    assert (name, is_left_out) == ("tensorboard", True)
    assert "File too large" in reason
    assert capfd.readouterr().err == ""


def test_a_tracker_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("TRACKIO_DIR", "WANDB_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    config = Config(log=LogConfig(trackers=("trackio",)))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RecipeError, match=r"log\.trackers: trackio is not installed .*pip install trackio"):
        check_trackers(config)
    monkeypatch.delitem(sys.modules, "trackio")
    (tmp_path / "trackio.py").write_text("raise OSError('a library is\\nmissing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"log\.trackers: trackio cannot be used \(a library is missing\)"):
        check_trackers(config)


def test_a_refused_tracker_moves_nothing(finished: Path, texts: Path, tmp_path: Path) -> None:
    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    more = ["--resume", "fresh", "--log.trackers", "tensorboard", "wandb"]
    assert_one_line(train(*plain_arguments(tmp_path / "run", texts, *more)), ["wandb is not installed"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_wandb_is_refused_without_a_login_and_writes_into_the_run_directory_offline(
    texts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", minversion="0.31")
    home = {"HOME": str(tmp_path / "home"), "WANDB_MODE": "online"}
    more = ["--run.max_updates", "2", "--log.trackers", "wandb"]
    command = plain_arguments(tmp_path / "run", texts, *more)
    assert_one_line(train(*command, **home), ["wandb has no login", "wandb login", "WANDB_MODE=offline"])
    assert not (tmp_path / "run").exists()
    done = train(*command, **home | {"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert not read_events(tmp_path / "run", "tracker_failed")


@pytest.mark.slow
def test_trackio_writes_into_the_run_directory(texts: Path, tmp_path: Path) -> None:
    """If nobody has said where; and --resume fresh moves what an earlier run has left there."""
    directory = tmp_path / "run"
    for tracker in ("trackio", "wandb"):
        (directory / tracker).mkdir(parents=True)
        (directory / tracker / "earlier.db").touch()
    more = ["--run.max_updates", "1", "--log.trackers", "trackio", "--resume", "fresh"]
    done = train(*plain_arguments(directory, texts, *more))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (directory / "trackio").glob("*.db")] == [f"{TRACKER_PROJECT}.db"]
    assert {path.parent.name for path in (directory / "previous/1").glob("*/earlier.db")} == {"trackio", "wandb"}
