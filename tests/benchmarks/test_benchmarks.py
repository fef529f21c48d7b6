"""The benchmarks run and write down what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

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
    done = run([sys.executable, "-m", "benchmarks.step", "--quick", "--out", str(tmp_path)])
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
    updates = [parts[count]["update"] for count in ("1", "4", "16", "64")]
    assert updates == sorted(updates)
    assert sections["start"]["not compiled, warm"][0] < sections["start"]["not compiled, cold"][0]
    assert text.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
