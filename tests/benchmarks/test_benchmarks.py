"""The benchmarks run and write down what they measured."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.step.__main__ import QUICK
from benchmarks.step.ours import Loop
from recipe.data.blocks import combine_hashes, hash_blocks
from recipe.run.ledger import LEDGER, read_lines
from tests.helpers import run


@pytest.mark.slow
def test_checkpoint_benchmark_writes_its_numbers(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "benchmarks.checkpoint", "--quick", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    (text,) = tmp_path.glob("*-checkpoint.md")
    values = json.loads(text.with_suffix(".json").read_text(encoding="utf-8"))
    ways = {"this recipe", "accelerate.save_state", "transformers.Trainer", "torch async_save"}
    for what in ("stall", "durable", "resume"):
        assert ways <= set(values["seconds"][what])
        assert all(seconds > 0 for way in ways for seconds in values["seconds"][what][way])
    pickles = {way: facts["pickles"] for way, facts in values["facts"].items()}
    assert [way for way, names in pickles.items() if not names] == ["this recipe"]
    assert not values["facts"]["this recipe"]["was_half"]
    assert all(way in text.read_text(encoding="utf-8") for way in ways)


@pytest.mark.slow
def test_step_benchmark_compares_the_recipe_with_its_peers(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "benchmarks.step", "--quick", "--out", str(tmp_path)], timeout=900)
    assert done.returncode == 0, done.stderr
    (text,) = tmp_path.glob("*-step.md")
    sections = json.loads(text.with_suffix(".json").read_text(encoding="utf-8"))["sections"]
    trainings = sections["peers"]["trainings"]
    assert {"this recipe", "transformers.Trainer", "accelerate's loop"} <= set(trainings)
    assert len({training.get("parameters") for training in trainings.values()} - {None}) == 1  # litgpt is not installed
    for training in trainings.values():
        assert len(training["seconds"]) == 2
        assert min(training["seconds"]) > 0
    assert "nanoGPT" in sections["peers"]["missing"]
    parts = sections["accumulation"]["trainings"]["this recipe"]["parts"][0]
    assert all(parts[count]["update"] > 0 for count in ("1", "4", "16", "64"))
    assert {name: len(seconds) for name, seconds in sections["start"].items()} == {
        "not compiled, cold": 1,
        "not compiled, warm": 1,
    }
    for comparison in sections["noise"].values():
        assert all(seconds > 0 for seconds in comparison["trainings"]["this recipe"]["parts"][0].values())
    assert sections["costs"]["trainings"]["this recipe"]["parts"][0]["checkpoint, training stands still"] > 0


def test_the_recipe_trains_on_the_text_of_its_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loop = Loop(QUICK)
    loop.next()
    loop.next()
    loop.reader.close()
    for update, line in enumerate(read_lines(loop.run.directory / LEDGER)):
        blocks = [QUICK.block(number) for number in range(update * QUICK.blocks, (update + 1) * QUICK.blocks)]
        assert line["blocks_sha256"] == combine_hashes(hash_blocks(np.stack(blocks)))
        assert line["update"] == update + 1
