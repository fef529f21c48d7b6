"""Proof of the proofs: each fault that people make with this stack is noticed by a check that the real tests use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import test_train
from tests.checkpoint import test_checkpoint, test_resume
from tests.data import test_data
from tests.helpers import read_ledger, run, train, write_texts
from tests.step import test_update
from tests.support import faulty_train
from tests.support.faulty_train import FAULTS

PATCHED = ("recipe.step.update", "recipe.plan.schedule", "recipe.data.blocks", "recipe.checkpoint.files")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Plant a fault in this process; everything it replaced is put back."""
    from recipe.data.blocks import UpdateReader
    from recipe.data.lanes import Lane

    for module in map(importlib.import_module, PATCHED):
        keep(monkeypatch, module)
    monkeypatch.setattr(Lane, "_read_documents", Lane._read_documents)
    for name in ("__init__", "next_update"):
        monkeypatch.setattr(UpdateReader, name, getattr(UpdateReader, name))
    return lambda name: FAULTS[name]()


def keep(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    for name, value in list(vars(module).items()):
        if callable(value):
            monkeypatch.setattr(module, name, value)


accelerator = test_update.accelerator


def sgd_check(accelerator: Any) -> None:
    test_update.test_sgd_update_equals_one_big_batch(accelerator, "accumulate", 0.5)


def test_without_a_fault_the_checks_pass(accelerator: Any, plant: Callable[[str], None], tmp_path: Path) -> None:
    sgd_check(accelerator)
    test_data.test_no_token_is_dropped_and_each_document_ends_once(tmp_path, 3)


@pytest.mark.parametrize("fault", ["divide_the_loss_twice", "mean_of_means", "clip_each_micro_batch"])
def test_a_wrong_gradient_is_noticed(fault: str, accelerator: Any, plant: Callable[[str], None]) -> None:
    plant(fault)
    with pytest.raises(AssertionError):
        sgd_check(accelerator)


@pytest.mark.parametrize("fault", ["divide_the_loss_twice", "clip_each_micro_batch"])
def test_the_parity_receipt_stops_a_run_with_a_wrong_gradient(fault: str, tmp_path: Path) -> None:
    """What a user sees: the other path disagrees, and training does not begin."""
    write_texts(tmp_path / "texts")
    arguments = test_train.arguments(tmp_path / "run", tmp_path / "texts", "adamw", 5)
    script = (faulty_train.__file__, fault)
    done = train(*arguments, "--run.parity_check", "true", script=script)
    assert done.returncode == 2
    assert "parity check" in done.stderr
    assert "DO NOT AGREE" in done.stderr
    assert not (tmp_path / "run/ledger.jsonl").exists()


def test_a_dropped_tail_is_noticed(plant: Callable[[str], None], tmp_path: Path) -> None:
    plant("drop_the_tail_of_a_packing_batch")
    with pytest.raises(AssertionError):
        test_data.test_no_token_is_dropped_and_each_document_ends_once(tmp_path, 3)


def test_a_state_ahead_of_consumption_is_noticed(plant: Callable[[str], None], tmp_path: Path) -> None:
    plant("read_ahead_of_the_state")
    with pytest.raises(AssertionError):
        test_data.test_states_that_come_with_an_update_are_not_ahead_of_it(tmp_path)


@pytest.fixture(scope="module")
def faulty_ledgers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Ledgers of one healthy run on one rank, and of two real ranks with a fault each."""
    root = tmp_path_factory.mktemp("faulty")
    write_texts(root / "texts")
    ledgers = {}
    launcher = test_train.launcher(2)
    commands = {"none": [sys.executable, "recipe/train.py"]}
    for fault in ("tick_the_schedule_per_rank", "prepare_the_data_loader"):
        commands[fault] = [*launcher[:-1], faulty_train.__file__, fault]
    for fault, command in commands.items():
        done = run([*command, *test_train.arguments(root / fault, root / "texts", "sgd", 5)])
        assert done.returncode == 0, done.stderr
        ledgers[fault] = read_ledger(root / fault)
    return ledgers


def test_a_schedule_that_ticks_per_rank_is_noticed(faulty_ledgers: dict[str, list[dict[str, Any]]]) -> None:
    expected = [entry["learning_rate"] for entry in faulty_ledgers["none"]]
    assert [entry["learning_rate"] for entry in faulty_ledgers["tick_the_schedule_per_rank"]] != pytest.approx(expected)


def test_a_prepared_data_loader_is_noticed(faulty_ledgers: dict[str, list[dict[str, Any]]]) -> None:
    healthy, faulty = faulty_ledgers["none"], faulty_ledgers["prepare_the_data_loader"]
    assert {entry["world_size"] for entry in faulty} == {2}
    assert faulty[0]["blocks_sha256"] != healthy[0]["blocks_sha256"]
    with pytest.raises(AssertionError):
        test_train.assert_same_updates(healthy, faulty)


def test_a_manifest_that_is_not_synced_is_noticed(
    plant: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("forget_the_manifests_sync")
    with pytest.raises(AssertionError):
        test_checkpoint.test_the_manifest_is_written_last_and_synced_before_the_name_appears(tmp_path, monkeypatch)


def test_pruning_before_the_new_checkpoint_is_there_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "texts", count=16, largest=1200)
    monkeypatch.setattr(test_resume, "SCRIPT", ["tests/support/faulty_train.py", "prune_before_writing"])
    with pytest.raises(IndexError):  # no checkpoint is left
        test_resume.test_a_disk_that_stays_full_is_one_line_at_the_end_and_keeps_the_good_checkpoint(tmp_path)


def test_dropout_that_is_not_restored_is_noticed(tmp_path: Path) -> None:
    """A resumed run is compared with one that was not stopped, both with the fault."""
    write_texts(tmp_path / "texts", count=16, largest=1200)
    script = (faulty_train.__file__, "forget_to_restore_dropout")
    for directory, updates in (("whole", 8), ("resumed", 4), ("resumed", 8)):
        done = train(*test_resume.arguments(tmp_path / directory, "--run.max_updates", str(updates)), script=script)
        assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError):
        test_resume.assert_same_run(tmp_path / "whole", tmp_path / "resumed")
