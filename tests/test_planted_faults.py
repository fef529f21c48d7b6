"""Proof of the proofs: each fault that people make with this stack is noticed by a check that the real tests use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers import FAULTY, SCRIPT, assert_same_run, read_ledger, run_ranks, train, write_texts
from tests.support import factorisations, resuming
from tests.support.checkpoints import check_order_of_syncs
from tests.support.faulty_train import FAULTS
from tests.support.gradients import check_sgd_update
from tests.support.lanes import check_conservation_of_files, check_states_of_updates
from tests.support.mixtures import LONG_AND_SHORT, check_shares, mixture_of

PATCHED = ("recipe.step.update", "recipe.step.parity", "recipe.model.optimizer", "recipe.checkpoint.files")
Plant = Callable[[str], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
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


def test_without_a_fault_the_checks_pass(accelerator: Any, plant: Plant, tmp_path: Path) -> None:
    check_sgd_update(accelerator, "accumulate", 0.5)
    check_conservation_of_files(tmp_path, 3)
    check_shares(mixture_of(tmp_path, LONG_AND_SHORT))


@pytest.mark.parametrize("fault", ["divide_the_loss_twice", "mean_of_means", "clip_each_micro_batch"])
def test_a_wrong_gradient_is_noticed(fault: str, accelerator: Any, plant: Plant) -> None:
    plant(fault)
    with pytest.raises(AssertionError):
        check_sgd_update(accelerator, "accumulate", 0.5)


@pytest.mark.parametrize("fault", ["divide_the_loss_twice", "clip_each_micro_batch"])
def test_the_parity_check_stops_a_run_with_a_wrong_gradient(fault: str, tmp_path: Path) -> None:
    """What a user sees: the other path disagrees, and training does not begin."""
    write_texts(tmp_path / "texts")
    arguments = factorisations.arguments(tmp_path / "run", tmp_path / "texts", "adamw", 5)
    done = train(*arguments, "--run.parity_check", "true", script=(FAULTY, fault))
    assert done.returncode == 2
    assert "parity check" in done.stderr
    assert "DO NOT AGREE" in done.stderr
    assert not (tmp_path / "run/ledger.jsonl").exists()


def test_a_dropped_tail_is_noticed(plant: Plant, tmp_path: Path) -> None:
    plant("drop_the_tail_of_a_packing_batch")
    with pytest.raises(AssertionError):
        check_conservation_of_files(tmp_path, 3)


def test_weights_that_are_drawn_by_documents_are_noticed(plant: Plant, tmp_path: Path) -> None:
    plant("draw_by_documents")
    with pytest.raises(AssertionError):
        check_shares(mixture_of(tmp_path, LONG_AND_SHORT))


def test_a_state_ahead_of_consumption_is_noticed(plant: Plant, tmp_path: Path) -> None:
    plant("read_ahead_of_the_state")
    with pytest.raises(AssertionError):
        check_states_of_updates(tmp_path)


@pytest.fixture(scope="module")
def faulty_ledgers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Ledgers of one healthy run on one rank, and of two real ranks with a fault each."""
    root = tmp_path_factory.mktemp("faulty")
    write_texts(root / "texts")
    ledgers = {}
    for fault in ("none", "tick_the_schedule_per_rank", "prepare_the_data_loader"):
        ranks, script = (1, [SCRIPT]) if fault == "none" else (2, [FAULTY, fault])
        run_ranks(ranks, [*script, *factorisations.arguments(root / fault, root / "texts", "sgd", 5)])
        ledgers[fault] = read_ledger(root / fault)
    return ledgers


@pytest.mark.slow
def test_a_schedule_that_ticks_per_rank_is_noticed(faulty_ledgers: dict[str, list[dict[str, Any]]]) -> None:
    expected = [entry["learning_rate"] for entry in faulty_ledgers["none"]]
    assert [entry["learning_rate"] for entry in faulty_ledgers["tick_the_schedule_per_rank"]] != pytest.approx(expected)


@pytest.mark.slow
def test_a_prepared_data_loader_is_noticed(faulty_ledgers: dict[str, list[dict[str, Any]]]) -> None:
    healthy, faulty = faulty_ledgers["none"], faulty_ledgers["prepare_the_data_loader"]
    assert {entry["world_size"] for entry in faulty} == {2}
    assert faulty[0]["blocks_sha256"] != healthy[0]["blocks_sha256"]
    with pytest.raises(AssertionError):
        factorisations.assert_same_updates(healthy, faulty)


def test_a_manifest_that_is_not_synced_is_noticed(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("forget_the_manifests_sync")
    with pytest.raises(AssertionError):
        check_order_of_syncs(tmp_path, monkeypatch)


@pytest.mark.slow
def test_pruning_before_the_new_checkpoint_is_there_is_noticed(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=16, largest=1200)
    with pytest.raises(IndexError):  # no checkpoint is left
        resuming.check_full_disk(tmp_path / "run", (FAULTY, "prune_before_writing"))


@pytest.mark.slow
def test_dropout_that_is_not_restored_is_noticed(tmp_path: Path) -> None:
    """A resumed run is compared with one that was not stopped, both with the fault."""
    write_texts(tmp_path / "texts", count=16, largest=1200)
    for directory, updates in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        arguments = resuming.arguments(tmp_path / directory, "--run.max_updates", str(updates))
        done = train(*arguments, script=(FAULTY, "forget_to_restore_dropout"))
        assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "whole", tmp_path / "resumed")
