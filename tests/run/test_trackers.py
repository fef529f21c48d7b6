"""What one can watch: the bar on a real terminal, and the run's curves in TensorBoard and trackio, asked over HTTP."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from tests.helpers import ROOT, SCRIPT, TINY, environment, free_port, read_ledger, start_ranks

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
