"""What a log shows of a run, by time."""

from __future__ import annotations

import itertools
import time

import pytest

from recipe.run.console import Console
from recipe.run.ledger import LedgerEntry


def lines_of(
    updates: int, seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[int]:
    """The updates that have a line, in a run whose updates take that long."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    console = Console(True, updates)
    console.start(0)
    for update in range(1, updates + 1):
        clock[0] = update * seconds
        console.progress(LedgerEntry(update, update, 5.0, 1.0, 1e-3, tokens_per_second=1.0))
    shown = capsys.readouterr().out.splitlines()
    return [int(line.split()[1].partition("/")[0].replace(",", "")) for line in shown]


def test_the_first_updates_and_the_last_have_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines_of(240, 0.4, monkeypatch, capsys) == [*range(1, 11), 85, 160, 235, 240]


def test_a_long_run_has_a_line_every_half_minute_and_later_every_ten_minutes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """50,000 updates of 9 s are five days: hours of silence would look like a run that hangs."""
    shown = lines_of(50_000, 9.0, monkeypatch, capsys)
    seconds = [9 * (later - earlier) for earlier, later in itertools.pairwise(shown)]
    assert seconds[10:14] == [36] * 4
    assert max(seconds) <= 609
    assert 700 < len(shown) < 900
