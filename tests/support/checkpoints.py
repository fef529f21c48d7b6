"""A tiny model after three steps, and a checkpoint of it; what must hold while one is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipe.checkpoint.files import MANIFEST, TrainingState, take_snapshot, write_checkpoint
from recipe.config.settings import Config, ModelConfig, OptimizerConfig
from recipe.data.tokenizer import train_tokenizer
from recipe.model.export import PADDED
from recipe.model.gpt2 import CausalLanguageModel, build_gpt2
from recipe.model.optimizer import build_optimizer

Trained = tuple[CausalLanguageModel, torch.optim.Optimizer, Any]


def state_of(update: int) -> TrainingState:
    return TrainingState(
        update, update * 100, {"run": {"seed": 1}}, "ab" * 32, [{"streams": [{"epoch": 0}], "source_tokens": [7]}], 5.5
    )


def trained(name: str = "adamw", seed: int = 1) -> Trained:
    """A tiny padded model that has taken three steps, its optimizer, and a tokenizer."""
    tokenizer = train_tokenizer(["some text to train on"], 280)
    shape = ModelConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=320, n_positions=16)
    model = build_gpt2(Config(model=shape), len(tokenizer), 0)
    optimizer = build_optimizer(model, OptimizerConfig(name=name))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        tokens = torch.randint(len(tokenizer), (2, 17), generator=generator)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, tokenizer


def write(root: Path, update: int, trained: Trained) -> Path:
    """Its checkpoint after `update` updates."""
    model, optimizer, tokenizer = trained
    gpt2: Any = model.gpt2
    return write_checkpoint(root, take_snapshot(model, optimizer), state_of(update), gpt2.config, tokenizer)


def everything(model: CausalLanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights without their padding, and the optimizer's state."""
    snapshot = take_snapshot(model, optimizer)
    rows = {k: v[: model.vocabulary] if k in PADDED else v for k, v in snapshot.model.items()}
    return rows | snapshot.optimizer


def check_order_of_syncs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is written last and synced before the name appears, as the operating system sees it.

    Raises:
        AssertionError: it is not.
    """
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
    path = write(root, 5, trained())
    renamed = events.index("rename step-000005")
    names = {p.name for p in path.rglob("*") if p.is_file()}
    assert names <= set(events[:renamed])
    assert max(events.index(name) for name in names - {MANIFEST}) < events.index(MANIFEST) < renamed
    assert events[renamed - 1] == ".tmp-step-000005", "the directory itself"
    assert events[renamed + 1 :] == [root.name], "and the one its name is in"
