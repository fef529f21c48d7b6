"""A checkpoint is there whole or not at all, whatever fails while it is written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import recipe.checkpoint.files as checkpoint
from recipe.checkpoint.files import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    load_checkpoint,
    read_state,
    take_snapshot,
)
from recipe.checkpoint.resume import find_resume_point
from recipe.checkpoint.saver import CheckpointSaver
from recipe.checkpoint.verify import why_invalid
from recipe.config.settings import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    flat_settings,
)
from recipe.data.blocks import UpdateBlocks, hash_blocks, to_tensors
from recipe.errors import RecipeError
from recipe.model.gpt2 import build_gpt2
from recipe.model.optimizer import build_optimizer
from recipe.run.directory import begin_run, list_checkpoints
from recipe.run.files import sha256_of
from recipe.run.ledger import LedgerEntry, read_lines
from tests.support.checkpoints import check_order_of_syncs, everything, state_of, trained, write
from tests.support.runs import make_run


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_next_update_is_the_same_after_loading(name: str, tmp_path: Path) -> None:
    """The padding rows are not in the file; the update after it must not see that."""
    saved = trained(name)
    path = write(tmp_path, 7, saved)
    other = trained(name, seed=2)
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
    later, fresh = take_snapshot(model, optimizer, before=earlier), take_snapshot(model, optimizer)
    found, expected = later.model | later.optimizer, fresh.model | fresh.optimizer
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == addresses
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_next_snapshot_waits_until_the_one_before_it_is_written(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share their memory: two updates saved in a row, with a slow disk, are both what they were."""
    original = checkpoint.write_model

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        original(*arguments)

    monkeypatch.setattr(checkpoint, "write_model", slow)
    config = Config(
        run=RunConfig(directory=str(tmp_path)),
        batch=BatchConfig(tokens_per_update=16, lanes=1),
        data=DataConfig(sequence_length=16),
        checkpoint=CheckpointConfig(every_tokens=1),
    )
    plain, plain_optimizer, tokenizer = trained()
    model, optimizer = accelerator.prepare(plain, plain_optimizer)
    directories: list[Path] = []
    saver = CheckpointSaver(
        make_run(config, accelerator), model, optimizer, tokenizer, lambda _, path: directories.append(path)
    )
    blocks = np.arange(17, dtype=np.int32)[None]
    held = UpdateBlocks(blocks, to_tensors(blocks, accelerator.device), hash_blocks(blocks), [{}])
    saved: list[dict[str, Tensor]] = []
    for update in (1, 2):
        for tensor in (*plain.parameters(), *(state["exp_avg"] for state in plain_optimizer.state.values())):
            tensor.detach().add_(1)
        saver.finish_update(LedgerEntry(update, 16 * update, blocks_sha256="ab" * 32), replace(held, update=update), [])
        saved.append({name: tensor.clone() for name, tensor in everything(plain, plain_optimizer).items()})
    saver.finish()
    assert directories == [tmp_path / "checkpoints/step-000001", tmp_path / "checkpoints/step-000002"]
    assert not saved[0]["transformer.wte.weight"].equal(saved[1]["transformer.wte.weight"])
    for directory, expected in zip(directories, saved, strict=True):
        load_checkpoint(directory, plain, plain_optimizer)
        found = everything(plain, plain_optimizer)
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


def failures(monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """Let the `point`-th call of anything that touches the disk fail."""
    calls = iter(range(10**6))

    def failing(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls) == point:
                raise OSError(28, "No space left on device")
            return original(*args, **options)

        return call

    for name in ("sync", "sha256_of", "save_tensors", "write_model"):
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
    check_order_of_syncs(tmp_path, monkeypatch)


def harm_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change what the manifest says of the files."""

    def harm(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        change(manifest["files"])
        (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")

    return harm


def harm_state(old: str = "", new: str = "", **values: Any) -> Callable[[Path], None]:
    """Change the training state, by its values or as text, in a checkpoint that verifies."""

    def harm(path: Path) -> None:
        state = json.dumps(json.loads((path / STATE).read_text(encoding="utf-8")) | values)
        (path / STATE).write_text(state.replace(old, new) if old else state, encoding="utf-8")
        listed(path)

    return harm


def listed(path: Path) -> None:
    """Give the manifest the sizes and hashes that its files have now."""
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def pipe(path: Path) -> None:
    """A pipe that nobody writes to, in a file's place."""
    path.unlink()
    os.mkfifo(path)


HARMS: list[tuple[Any, str]] = [
    (lambda path: (path / MANIFEST).unlink(), "never finished"),
    (lambda path: (path / MANIFEST).write_text("{"), "cannot be read"),
    (lambda path: (path / MANIFEST).write_text("[]"), "cannot be read"),
    (lambda path: (path / MANIFEST).write_text("[" * 100_000), "nested too deeply"),
    (lambda path: (path / MANIFEST).write_text('{"format": Infinity}'), "Infinity is no number of JSON"),
    (lambda path: (path / MANIFEST).write_text(json.dumps({"format": 2})), "format is 2, of another version"),
    (lambda path: os.truncate(path / MANIFEST, 1 << 40), "manifest.json has 1,099,511,627,776 bytes"),
    (lambda path: pipe(path / MANIFEST), "manifest.json is no file"),
    (lambda path: (path / STATE).unlink(), "training/state.json is missing"),
    (lambda path: pipe(path / STATE), "training/state.json is missing"),
    (lambda path: os.truncate(path / "model.safetensors", 99), "has 99 bytes instead of"),
    (lambda path: (path / "config.json").write_bytes((path / "config.json").read_bytes()[::-1]), "has changed"),
    (harm_manifest(lambda files: files.pop(OPTIMIZER)), f"has no {OPTIMIZER}"),
    (harm_manifest(lambda files: files.pop(WEIGHTS)), f"has no {WEIGHTS}"),
    (harm_manifest(lambda files: files.pop(STATE)), f"has no {STATE}"),
    (harm_manifest(lambda files: files.update({"/etc/hostname": {}})), "names '/etc/hostname', which is not in it"),
    (harm_manifest(lambda files: files.update({"../a": {}})), "names '../a', which is not in it"),
    (harm_manifest(lambda files: files.update({"a\nb": {}})), r"names 'a\nb', which is not in it"),
    (harm_manifest(lambda files: files.update({WEIGHTS: []})), "manifest cannot be read"),
    (harm_state(more=1), "unexpected keyword argument 'more'"),
    (harm_state(update=1e999), "Infinity is no number of JSON"),
    (harm_state('"update": 5', '"update": 1e999'), "a value is not of its kind"),
    (harm_state('"update": 5, ', ""), "missing 1 required positional argument: 'update'"),
    (harm_state('{"update"', '[{"update"'), "training state cannot be used"),
    (harm_state(update="5"), "a value is not of its kind"),
    (harm_state(update=True), "a value is not of its kind"),
    (harm_state(config=[]), "a value is not of its kind"),
    (harm_state(lane_states=[{"streams": [{"epoch": -1}], "source_tokens": [7]}]), "a value is not of its kind"),
    (harm_state(lane_states=[{"era": 1}]), "unexpected keyword argument 'era'"),
    (harm_state(verification_loss=None), "a value is not of its kind"),
    (harm_state(recent=[[1.0]]), "a value is not of its kind"),
    (harm_state(skipped_blocks=[1, 2]), "cannot unpack"),
    (harm_state(skipped_batches=[1]), "in another unit than this version"),
    (harm_state(skipped_blocks=[[1.5, 2]]), "a value is not of its kind"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after 5 updates."""
    return write(tmp_path_factory.mktemp("sound"), 5, trained())


@pytest.mark.parametrize(("harm", "reason"), HARMS)
def test_a_damaged_checkpoint_is_known(harm: Any, reason: str, sound: Path, tmp_path: Path) -> None:
    """Also one that verifies and is none; and what never ends is not waited for."""
    path = shutil.copytree(sound, tmp_path / "step-000005")
    harm(path)
    assert reason in str(why_invalid(path))
    assert "\n" not in str(why_invalid(path))


def test_the_older_checkpoint_is_taken_if_the_newest_verifies_but_does_not_fit(tmp_path: Path) -> None:
    config = Config(run=RunConfig(directory=str(tmp_path)))
    for update in (5, 10):
        harm_state(config=flat_settings(config))(write(tmp_path / "checkpoints", update, trained()))
    harm_state(update="10")(tmp_path / "checkpoints/step-000010")
    point = find_resume_point(config)
    assert point.update == 5
    assert point.skipped == [("step-000010", "its training state cannot be used (a value is not of its kind)")]


def test_only_what_the_manifest_lists_is_read(tmp_path: Path) -> None:
    """Not the copy of another file, and not what macOS leaves."""
    saved = trained()
    path = write(tmp_path, 7, saved)
    other = write(tmp_path / "other", 7, trained(seed=3))
    shutil.copy(other / OPTIMIZER, path / "training/optimizer copy.safetensors")
    shutil.copy(other / OPTIMIZER, path / "training/aaa.safetensors")
    (path / "training/._optimizer.safetensors").write_bytes(b"\x00\x05\x16\x07" * 30)
    model, optimizer, _ = trained(seed=2)
    load_checkpoint(path, model, optimizer)
    expected, found = everything(*saved[:2]), everything(model, optimizer)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_tensors_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    def change(name: str, file: str, to: Callable[[Tensor], Tensor]) -> RecipeError:
        path = write(tmp_path / name, 5, trained())
        tensors = load_file(path / file)
        first = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
        save_file(tensors | {first: to(tensors[first])}, path / file)
        with pytest.raises(RecipeError, match=r"does not fit this (model|optimizer)") as refused:
            load_checkpoint(path, *trained()[:2])
        assert first in str(refused.value)
        return refused.value

    change("shape", OPTIMIZER, lambda tensor: tensor[:-1].clone())
    change("type", OPTIMIZER, lambda tensor: tensor.double())
    change("weights", WEIGHTS, lambda tensor: tensor.double())
    path = write(tmp_path, 5, trained())
    for file in (WEIGHTS, OPTIMIZER):
        (path / file).write_bytes(b"\xff" * 100)
        with pytest.raises(RecipeError, match=r"step-000005 cannot be loaded: .*header"):
            load_checkpoint(path, *trained()[:2])


def test_a_checkpoint_of_another_shape_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, 5, trained())
    shape = ModelConfig(n_layer=2, n_embd=64, n_head=2, vocab_size=320, n_positions=16)
    model = build_gpt2(Config(model=shape), 280, 0)
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


def test_newer_checkpoints_of_another_course_are_set_aside(accelerator: Any, tmp_path: Path) -> None:
    """Going on from an older one by its path: a rollback or the next resume must not take the newer ones for this run's."""
    directory = tmp_path / "run"
    paths = {update: write(directory / "checkpoints", update, trained()) for update in (5, 10, 15)}
    for name in ("ledger.jsonl", "events.jsonl"):
        (directory / name).write_text('{"update": 5}\n{"update": 10}\n{"update": 15}\n', encoding="utf-8")
    run = make_run(Config(run=RunConfig(directory=str(directory))), accelerator)
    begin_run(run, 10, paths[10])
    assert [path.name for path in list_checkpoints(directory / "checkpoints")] == ["step-000010", "step-000005"]
    assert why_invalid(directory / "previous/1/checkpoints/step-000015") is None
    assert (directory / "ledger.jsonl").read_text(encoding="utf-8") == '{"update": 5}\n{"update": 10}\n'
    assert [(event["update"], event.get("event")) for event in read_lines(directory / "events.jsonl")] == [
        (5, None),
        (10, None),
        (10, "start"),
    ]
