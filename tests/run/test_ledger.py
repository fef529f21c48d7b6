"""The ledger and the events as people read them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pandas
import pytest

from recipe.config.settings import Config, RunConfig, StabilityConfig
from recipe.errors import RecipeError
from recipe.run.ledger import LedgerEntry, read_lines
from tests.helpers import read_events, read_ledger
from tests.support.runs import make_run


def test_pandas_reads_the_ledger_as_one_table_of_numbers(finished: Path) -> None:
    """Of a run with two validation sets, from the line before training on."""
    lines = read_lines(finished / "ledger.jsonl")
    names = [f.name for f in fields(LedgerEntry) if f.name not in ("sources", "validation")]
    names += [f"validation/{name}/{value}" for name in ("held_out", "mine") for value in ("loss", "bits_per_byte")]
    assert [list(line) for line in lines] == [names] * 9
    table = pandas.read_json(finished / "ledger.jsonl", lines=True)
    assert [name for name in table if not pandas.api.types.is_numeric_dtype(table[name])] == ["blocks_sha256"]
    assert table["update"].tolist() == list(range(9))
    assert table["tokens"].tolist() == [1536 * update for update in range(9)]
    for name in names[-4:]:
        assert table["update"][table[name].notna()].tolist() == [0, 4, 8]
    assert table["loss"].isna().tolist() == [True] + [False] * 8, "the line before training has no loss"


def test_every_event_says_what_when_and_after_which_update(finished: Path) -> None:
    events = read_events(finished)
    names = [("start", 0), ("parity_check", 0), ("sample", 4), ("sample", 8)]
    assert [(event["event"], event["update"]) for event in events] == names
    for event in events:
        assert list(event)[:3] == ["event", "update", "time_utc"]
        assert pandas.Timestamp(event["time_utc"]).tzname() == "UTC"
    assert events[0]["versions"].keys() >= {"python", "torch", "transformers", "accelerate", "datasets", "tokenizers"}


def test_a_number_that_is_not_finite_is_null_in_every_file(tmp_path: Path) -> None:
    """Also one that is known only later, and one within an event."""
    ledger = make_run(Config(run=RunConfig(directory=str(tmp_path)))).ledger
    nan, infinite = float("nan"), float("inf")
    ledger.write(LedgerEntry(1, 10, loss=2.0, grad_norm=1.0, validation={"validation/a/loss": nan}))
    ledger.amend(1, {"validation/b/loss": infinite, "validation/c/loss": 1.5})
    ledger.event("news", 1, numbers=[1.0, {"a": -infinite}, (nan,)])
    (line,), (event,) = read_ledger(tmp_path), read_events(tmp_path)
    assert [line[f"validation/{name}/loss"] for name in "abc"] == [None, None, 1.5]
    assert event["numbers"] == [1.0, {"a": None}, [None]]


def test_an_update_that_is_not_finite_is_an_event_and_too_many_in_a_row_are_an_error(tmp_path: Path) -> None:
    stability = StabilityConfig(max_skipped_updates=2)
    ledger = make_run(Config(run=RunConfig(directory=str(tmp_path)), stability=stability)).ledger
    fine = LedgerEntry(1, 10, loss=2.0, grad_norm=1.0, learning_rate=0.1)
    broken = replace(fine, update=2, loss=float("nan"))
    ledger.write(fine)
    ledger.write(broken)
    ledger.write(replace(fine, update=3))
    ledger.write(replace(broken, update=4))
    advice = (
        r"updates 4 to 5 were not finite .* --stability\.max_skipped_updates 4 .* --resume fresh, which moves this run"
    )
    with pytest.raises(RecipeError, match=advice):
        ledger.write(replace(broken, update=5, loss=1.0, grad_norm=float("inf")))
    assert [entry["update"] for entry in read_ledger(tmp_path)] == [1, 3]
    skipped = [
        (event["update"], event["loss"], event["grad_norm"]) for event in read_events(tmp_path, "skipped_update")
    ]
    assert skipped == [(2, "nan", "1.0"), (4, "nan", "1.0"), (5, "1.0", "inf")]


def test_lines_that_are_half_written_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start", "update": 0}\nnull\n{"event": "a", "update": 1.0}\n{"event": "b", "upda')
    assert [json.dumps(line) for line in read_lines(path)] == [
        '{"event": "start", "update": 0}',
        '{"event": "a", "update": 1}',
    ]
    assert read_lines(tmp_path / "nothing") == []
