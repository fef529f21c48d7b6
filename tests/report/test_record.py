"""A run read back: what the ledger holds, and which directories are refused."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard

from recipe.commands import card as card_command
from recipe.commands import report as report_command
from recipe.errors import RecipeError
from recipe.report.card import card_files
from recipe.report.record import read_record, some_of_each_kind, thin
from recipe.report.summary import rows_of
from recipe.run.ledger import EVENTS, LEDGER, read_lines
from tests.helpers import run
from tests.support.run_files import UPDATES, edit_lines, write_lines


def test_record_holds_the_ledger_and_the_validation_before_training(directory: Path) -> None:
    record, lines = read_record(directory), read_lines(directory / LEDGER)
    assert record.updates["update"].tolist() == list(range(UPDATES + 1))
    assert record.updates["loss"].tolist()[1:] == [line["loss"] for line in lines[1:]]
    assert np.isnan(record.updates["loss"][0]), "nothing is trained in update 0"
    assert record.validation_sets == ["held_out", "mine"]
    before = record.evaluations("mine").iloc[0]
    assert (before["update"], before["loss"]) == (0, lines[0]["validation/mine/loss"])
    assert record.last_evaluation("mine") == {
        "update": UPDATES,
        "loss": lines[-1]["validation/mine/loss"],
        "bits_per_byte": lines[-1]["validation/mine/bits_per_byte"],
    }
    assert record.updates["hours"].tolist() == pytest.approx(
        np.cumsum([line["update_seconds"] or 0 for line in lines]) / 3600
    )
    assert (record.updates_done, record.tokens, record.is_finished) == (12, 18_432, True)
    shapes = [(p["first"], p["last"], p["world_size"], p["micro_batch_size"]) for p in record.parts]
    assert shapes == [(1, 6, 1, 8), (7, 12, 2, 5)]


def test_record_of_a_checkpoint_ends_with_its_update(directory: Path) -> None:
    record = read_record(directory, 5)
    assert (record.updates_done, record.is_finished, record.summary) == (5, False, {})
    assert {event["event"] for event in record.events} == {"start"}, "what came later is not in it"
    last = record.last_evaluation("held_out")
    assert last is not None
    assert last["update"] == 3
    assert read_record(directory, 2).last_evaluation("held_out") is None, "that before training is not of this model"


def test_gpu_hours_are_of_the_updates_that_a_gpu_computed(directory: Path) -> None:
    assert read_record(directory).gpu_hours is None
    edit_lines(
        directory / EVENTS,
        lambda e: e | {"device_type": "cuda"} if e["event"] == "start" and e["world_size"] == 2 else e,
    )
    seconds = [line["update_seconds"] for line in read_lines(directory / LEDGER)[7:]]
    assert read_record(directory).gpu_hours == pytest.approx(2 * sum(seconds) / 3600)


def test_what_is_no_run_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run"):
        read_record(tmp_path)
    edit_lines(directory / LEDGER, lambda line: None if line["update"] else line)
    with pytest.raises(RecipeError, match="has done no update yet"):
        read_record(directory)
    write_lines(directory / LEDGER, [{"event": "start", "update": 0}, {"update": 1, "tokens": 1536, "loss": 6.0}])
    with pytest.raises(RecipeError, match=r"was written by version 0\.1\.0"):
        read_record(directory)


@pytest.mark.parametrize("command", [report_command, card_command])
@pytest.mark.parametrize("missing", ["vl_convert", "altair"])
def test_a_command_names_what_is_not_installed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, command: object, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # what an import finds if it is not installed
    monkeypatch.setattr(sys, "argv", ["recipe", str(directory)])
    with pytest.raises(RecipeError, match=rf"need {missing}.*pip install --editable '.\[report\]'"):
        command.main()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_report_loads_nothing_heavy_and_training_no_charts(directory: Path) -> None:
    """`report` answers about a run that is going on; and `card_files` is called where altair may not be installed."""
    shutil.rmtree(directory / "final")
    code = (
        "import sys, json; import recipe.report.card; early = list(sys.modules); "
        "from recipe.commands.report import main; main(); print(json.dumps([early, list(sys.modules)]))"
    )
    done = run([sys.executable, "-c", code, str(directory)])
    assert done.returncode == 0, done.stderr
    early, late = json.loads(done.stdout.splitlines()[-1])
    assert not {"altair", "vl_convert", "huggingface_hub"} & set(early)
    assert not {"torch", "transformers", "datasets", "accelerate"} & set(late)
    assert "altair" in late


def test_thinning_keeps_the_extremes_of_every_bucket() -> None:
    values = pd.Series(np.random.default_rng(0).normal(size=10_000), index=range(5, 10_005))
    values.iloc[[0, 17, 5_000]] = [np.nan, np.nan, 50.0]
    rows = thin(values, 100)
    assert len(rows) <= 202
    assert values[rows].notna().all()
    known = values.dropna()
    assert {known.index[0], known.index[-1], values.index[5_000]} <= set(rows)
    starts = [-(-len(known) * bucket // 100) for bucket in range(101)]
    for start, stop in itertools.pairwise(starts):
        assert {known.iloc[start:stop].idxmin(), known.iloc[start:stop].idxmax()} <= set(rows)


def test_one_kind_of_event_hides_no_other() -> None:
    events = [{"event": "push_failed", "update": update} for update in range(1000)]
    events.insert(500, {"event": "spike", "update": 500})
    shown = some_of_each_kind(events, 20)
    assert [event["update"] for event in shown if event["event"] == "push_failed"] == list(range(0, 1000, 50))
    assert {"event": "spike", "update": 500} in shown
    assert some_of_each_kind([], 20) == []


def test_an_evaluation_without_bits_per_byte_is_one(directory: Path) -> None:
    """As where the tokenizer does not keep the text: the loss is shown, and nothing in place of the other."""
    edit_lines(directory / LEDGER, lambda line: line | {"validation/held_out/bits_per_byte": None})
    record = read_record(directory)
    last = record.last_evaluation("held_out")
    assert last is not None
    assert last["loss"] == read_lines(directory / LEDGER)[-1]["validation/held_out/loss"]
    assert np.isnan(last["bits_per_byte"])
    card = card_files(directory, None)["README.md"].decode()
    results: Any = ModelCard(card).data
    metrics = [(result.dataset_type, result.metric_type) for result in results.eval_results]
    assert ("local-text-files", "bits_per_byte") not in metrics
    assert {("local-text-files", "loss"), ("local-text-files", "perplexity"), ("mine", "bits_per_byte")} < set(metrics)
    assert "nan" not in card.lower().split("## training")[0]
    summary = dict(rows_of(record, record.validation_sets).summary)
    assert summary["validation loss"]
    assert not summary["bits per byte"]
