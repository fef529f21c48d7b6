"""Output that cannot be written: a reader that has gone, a closed stream, a full disk, an encoding that lacks characters."""

from __future__ import annotations

import os
import signal
import sys
import termios
from pathlib import Path

import pytest

from tests.helpers import SCRIPT, TINY, run, start

SHORT = ["--run.max_updates", "12", "--evaluation.sample_tokens", "null"]


@pytest.fixture
def command(texts: Path, tmp_path: Path) -> list[str]:
    """A training of twelve updates, into `tmp_path`/run."""
    given = ["--run.directory", str(tmp_path / "run"), "--data.text_files", f"{texts}/*.txt"]
    return [sys.executable, SCRIPT, *TINY, *SHORT, *given]


def test_a_reader_that_goes_away_ends_no_training(command: list[str], tmp_path: Path) -> None:
    """As `| head -3` does, for both streams."""
    with start(command, PYTHONUNBUFFERED="1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_a_full_disk_under_the_log_ends_no_training(command: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full, start(command, stdout=full, stderr=full) as process:
        assert process.wait(timeout=120) == 0
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_a_terminal_that_is_closed_saves_and_ends(command: list[str], tmp_path: Path) -> None:
    """Its processes get SIGHUP, and whatever they write fails."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("these tests were started by nohup, which is obeyed")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    # It must not end before it is told to
    long = ["--run.max_updates", "99999", "--schedule.total_tokens", "100000000"]
    with start([*command, *long], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while b"tokens/s" not in said:
            said += os.read(ours, 4096)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 128 + signal.SIGHUP
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.slow
def test_closed_streams_end_no_training(command: list[str], tmp_path: Path) -> None:
    """And no file of the run gets their numbers, to which libraries write."""
    done = run(["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command])
    assert done.returncode == 0
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_any_text_can_be_printed_in_any_encoding(finished: Path) -> None:
    """The prompt has characters that cp1252 lacks."""
    command = [sys.executable, "-m", "recipe", "generate", str(finished / "final"), "--prompt", "→😀"]
    done = run([*command, "--max_new_tokens", "1"], PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\\u2192\\U0001f600")
