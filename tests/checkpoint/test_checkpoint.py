"""A checkpoint is there whole or not at all, whatever fails while it is written."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recipe.checkpoint.files as checkpoint
from benchmarks.checkpoint import QUICK
from benchmarks.savers import Ours, Training
from recipe.checkpoint.files import (
    MANIFEST,
    STATE,
    TrainingState,
    list_checkpoints,
    load_checkpoint,
    read_state,
    take_snapshot,
    why_invalid,
    write_checkpoint,
)
from recipe.checkpoint.resume import Start
from recipe.config.settings import Config, ModelConfig, OptimizerConfig, RunConfig
from recipe.data.tokenizer import train_tokenizer
from recipe.errors import RecipeError
from recipe.model.export import PADDED
from recipe.model.gpt2 import CausalLanguageModel, build_model, build_optimizer
from recipe.run.directory import begin_run

Trained = tuple[CausalLanguageModel, torch.optim.Optimizer, Any]


def state_of(update: int) -> TrainingState:
    return TrainingState(update, update * 100, {"run": {"seed": 1}}, "ab" * 32, [{"epoch": 0}], 5.5)


def trained(name: str = "adamw", seed: int = 1) -> Trained:
    """A tiny padded model that has taken three steps, its optimizer, and a tokenizer."""
    tokenizer = train_tokenizer(["some text to train on"], 280)
    shape = ModelConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=320, n_positions=16)
    model = build_model(Config(model=shape), len(tokenizer), 0)
    optimizer = build_optimizer(model, OptimizerConfig(name=name))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        tokens = torch.randint(len(tokenizer), (2, 17), generator=generator)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, tokenizer


def write(root: Path, update: int, trained: Trained) -> Path:
    model, optimizer, tokenizer = trained
    gpt2: Any = model.gpt2
    return write_checkpoint(root, take_snapshot(model, optimizer), state_of(update), gpt2.config, tokenizer)


def everything(model: CausalLanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights without their padding, and the optimizer's state."""
    snapshot = take_snapshot(model, optimizer)
    rows = {k: v[: model.vocabulary] if k in PADDED else v for k, v in snapshot.model.items()}
    return rows | snapshot.optimizer


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(name: str, tmp_path: Path) -> None:
    saved = trained(name)
    path = write(tmp_path, 7, saved)
    assert why_invalid(path) is None
    assert read_state(path) == state_of(7)
    model, optimizer, _ = trained(name, seed=2)
    load_checkpoint(path, model, optimizer)
    expected, found = everything(*saved[:2]), everything(model, optimizer)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not {p.suffix for p in path.rglob("*") if p.is_file()} - {".json", ".safetensors"}, "nothing else is written"


def test_the_next_update_is_the_same_after_loading(tmp_path: Path) -> None:
    """The padding rows are not in the file; the update after it must not see that."""
    saved = trained()
    path = write(tmp_path, 7, saved)
    other = trained(seed=2)
    load_checkpoint(path, *other[:2])
    for model, optimizer, _ in (saved, other):
        tokens = torch.arange(34).reshape(2, 17)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    expected, found = everything(*saved[:2]), everything(*other[:2])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_snapshot_takes_the_memory_of_an_earlier_one() -> None:
    model, optimizer, _ = trained()
    earlier = take_snapshot(model, optimizer)
    addresses = {name: tensor.data_ptr() for name, tensor in (earlier.model | earlier.optimizer).items()}
    model, optimizer, _ = trained(seed=2)
    later, fresh = take_snapshot(model, optimizer, memory=earlier), take_snapshot(model, optimizer)
    found, expected = later.model | later.optimizer, fresh.model | fresh.optimizer
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == addresses
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_next_snapshot_waits_until_the_one_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share their memory: two updates saved in a row, with a slow disk, are both what they were."""
    training = Training(QUICK, tmp_path)
    ours = Ours(training, tmp_path)
    original = checkpoint.write_model

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        original(*arguments)

    monkeypatch.setattr(checkpoint, "write_model", slow)
    saved = {}
    for update in (1, 2):
        for tensor in training.tensors():
            tensor.detach().add_(1)
        ours.begin(update)
        saved[update] = training.fingerprint()
    ours.saver.finish()
    assert saved[1] != saved[2]
    for update in (2, 1):
        training.forget()
        ours.load(update)
        assert training.fingerprint() == saved[update]
        shutil.rmtree(ours.path(update))


def failures(monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """Let the `point`-th call of anything that touches the disk fail."""
    calls = iter(range(10**6))

    def failing(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls) == point:
                raise OSError(28, "No space left on device")
            return original(*args, **options)

        return call

    for name in ("_sync", "_sha256", "_save_optimizer", "write_model"):
        monkeypatch.setattr(checkpoint, name, failing(getattr(checkpoint, name)))
    monkeypatch.setattr(os, "replace", failing(os.replace))


def test_a_failure_at_any_point_leaves_the_older_checkpoint_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = trained()
    older = write(tmp_path, 5, saved)
    failed = 0
    for point in range(100):
        with monkeypatch.context() as patched:
            failures(patched, point)
            try:
                write(tmp_path, 6, saved)
            except OSError:
                failed += 1
            else:
                break
        whole = [path.name for path in list_checkpoints(tmp_path) if why_invalid(path) is None]
        assert older.name in whole
        assert [path.name for path in tmp_path.iterdir()] == [path.name for path in list_checkpoints(tmp_path)]
        assert why_invalid(tmp_path / "step-000006") is None or not (tmp_path / "step-000006").exists()
        shutil.rmtree(tmp_path / "step-000006", ignore_errors=True)  # there where only the last sync failed
    assert failed > 15, "there are that many points"
    assert why_invalid(tmp_path / "step-000006") is None


def test_the_manifest_is_written_last_and_synced_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the operating system sees it."""
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        events.append(f"rename {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    path = write(tmp_path, 5, trained())
    renamed = events.index("rename step-000005")
    names = {p.name for p in path.rglob("*") if p.is_file()}
    assert names <= set(events[:renamed])
    assert max(events.index(name) for name in names - {MANIFEST}) < events.index(MANIFEST) < renamed
    assert events[renamed - 1] == ".tmp-step-000005", "the directory itself"
    assert events[renamed + 1 :] == [tmp_path.name], "and the one its name is in"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / MANIFEST).unlink(), "never finished"),
        (lambda path: (path / MANIFEST).write_text("{"), "cannot be read"),
        (lambda path: (path / MANIFEST).write_text("[]"), "cannot be read"),
        (lambda path: (path / MANIFEST).write_text(json.dumps({"format": 9})), "format is 9"),
        (lambda path: (path / STATE).unlink(), "training/state.json is missing"),
        (lambda path: os.truncate(path / "model.safetensors", 99), "has 99 bytes instead of"),
        (lambda path: (path / "config.json").write_bytes((path / "config.json").read_bytes()[::-1]), "has changed"),
    ],
)
def test_a_damaged_checkpoint_is_known(harm: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, 5, trained())
    harm(path)
    assert reason in str(why_invalid(path))


def test_a_checkpoint_of_another_shape_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, 5, trained())
    shape = ModelConfig(n_layer=2, n_embd=64, n_head=2, vocab_size=320, n_positions=16)
    model = build_model(Config(model=shape), 280, 0)
    with pytest.raises(RecipeError, match="does not fit this model"):
        load_checkpoint(path, model, build_optimizer(model, OptimizerConfig()))


def test_a_snapshot_before_the_first_step_leaves_the_optimizer_as_it_is(tmp_path: Path) -> None:
    """torch would make the state that it is asked for by a step of its own, on the rank that saves alone."""
    model, _, tokenizer = trained()
    optimizer = build_optimizer(model, OptimizerConfig())
    path = write(tmp_path, 1, (model, optimizer, tokenizer))
    assert not optimizer.state
    other, stepped, _ = trained(seed=2)
    load_checkpoint(path, other, stepped)
    assert not stepped.state


def test_newer_checkpoints_of_another_course_are_set_aside(tmp_path: Path) -> None:
    """Going on from an older one by its path: a rollback or the next resume must not take the newer ones for this run's."""
    run = tmp_path / "run"
    paths = {update: write(run / "checkpoints", update, trained()) for update in (5, 10, 15)}
    (run / "ledger.jsonl").write_text('{"update": 5}\n{"update": 10}\n{"update": 15}\n', encoding="utf-8")
    config = Config(run=RunConfig(directory=str(run)))
    previous = begin_run(config, Start(paths[10], read_state(paths[10])))
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000010", "step-000005"]
    assert previous is not None
    assert why_invalid(previous / "checkpoints/step-000015") is None
    assert (run / "ledger.jsonl").read_text(encoding="utf-8") == '{"update": 5}\n{"update": 10}\n'
