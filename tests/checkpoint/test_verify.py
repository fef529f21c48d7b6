"""Ranks that verify a checkpoint together read each file once, and miss nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipe.checkpoint.verify import why_invalid
from tests.helpers import run_ranks
from tests.support.checkpoints import trained, write


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [None, "training/optimizer.safetensors", "model.safetensors"])
def test_ranks_share_out_what_is_read(damaged: str | None, tmp_path: Path) -> None:
    checkpoint, result = write(tmp_path, 5, trained()), tmp_path / "result.json"
    if damaged:
        with (checkpoint / damaged).open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
    run_ranks(3, ["-m", "tests.support.hashing_together", str(checkpoint), str(result)])
    found = json.loads(result.read_text(encoding="utf-8"))
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    names.remove("manifest.json")
    assert sorted(name for of_rank in found["of_ranks"] for name in of_rank) == sorted(names)
    assert all(found["of_ranks"])
    assert found["again"] == [], "rank 0 reads nothing a second time"
    assert found["why_invalid"] == (f"{damaged} has changed since it was written" if damaged else None)


def test_hashes_that_are_known_already_count(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 5, trained())
    assert why_invalid(checkpoint, {"config.json": "0" * 64}) == "config.json has changed since it was written"
    assert why_invalid(checkpoint, {}) is None
