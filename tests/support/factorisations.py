"""The run that is trained on several numbers of ranks with several micro-batches, and what must be the same in all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import TINY

UPDATES = 20
OPTIMIZERS = {"sgd": "0.5", "adamw": "5e-3"}  # name: learning rate
# Twice the budget from update 8 on, two thirds of it from update 12 on.
SCHEDULES = {
    "sgd": "[]",
    "adamw": "[{from_tokens: 10000, tokens_per_update: 3072}, {from_tokens: 20000, tokens_per_update: 1024}]",
}
TOKENS = {"sgd": [1536] * UPDATES, "adamw": [1536] * 7 + [3072] * 4 + [1024] * 9}  # of each update


def arguments(directory: Path, texts: Path, optimizer: str, micro_batch_size: int) -> list[str]:
    return [
        *TINY,
        *["--run.directory", str(directory), "--run.max_updates", str(UPDATES), "--data.text_files", f"{texts}/*.txt"],
        *["--optimizer.name", optimizer, "--optimizer.learning_rate", OPTIMIZERS[optimizer]],
        *["--batch.micro_batch_size", str(micro_batch_size), "--batch.schedule", SCHEDULES[optimizer]],
    ]


def assert_same_updates(reference: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> None:
    """The promise: the same blocks, and losses and gradient norms within float32 rounding (1e-5 relative)."""
    assert len(reference) == len(other) == UPDATES
    for mine, theirs in zip(reference, other, strict=True):
        assert theirs["blocks_sha256"] == mine["blocks_sha256"], mine["update"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5), mine["update"]
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-4), mine["update"]
