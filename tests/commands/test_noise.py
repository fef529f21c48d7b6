"""`recipe noise`: the gradient noise scale at a checkpoint, from the run's own text; mistakes are one line."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from recipe.commands.noise import as_text, noise_at
from recipe.run.directory import list_checkpoints
from tests.helpers import assert_one_line, expect_error, read_ledger, run

RECIPE = [sys.executable, "-m", "recipe", "noise"]


@pytest.mark.usefixtures("accelerate_state")
def test_the_scale_at_a_checkpoint_is_that_of_the_updates_around_it(finished: Path) -> None:
    """Of a run of eight updates, whose own interval is wide; the blocks are the next ones, the same each time."""
    newest, *_ = list_checkpoints(finished / "checkpoints")
    found = noise_at(newest, 64)
    assert (found["update"], found["blocks"], found["sequence_length"], found["tokens_per_update"]) == (8, 64, 64, 1536)
    value, low, high = (found[f"gradient_noise_scale_tokens{end}"] for end in ("", "_low", "_high"))
    assert value == pytest.approx(found["noise_s2"] / found["noise_g2"])
    assert low < value < high
    assert found["gradient_snr"] == pytest.approx(1536 / value)
    last = read_ledger(finished)[-1]
    assert low < (last["gradient_noise_scale_tokens_high"] or math.inf)
    assert last["gradient_noise_scale_tokens_low"] < high
    assert f"{value:,.4g} tokens (95 %: {low:,.4g} to {high:,.4g})" in as_text(found)
    open_ended = found | {"gradient_noise_scale_tokens_high": None}
    assert f"above {low:,.4g} tokens, not determined yet" in as_text(open_ended)


def test_mistakes_are_one_line(finished: Path, tmp_path: Path) -> None:
    newest, *_ = list_checkpoints(finished / "checkpoints")
    expect_error(["final", "no manifest", "runs/NAME/checkpoints"], lambda: noise_at(finished / "final", 64))
    expect_error(["nowhere"], lambda: noise_at(Path("nowhere"), 64))
    shutil.copytree(newest, tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"short")
    expect_error(["damaged", "model.safetensors has 5 bytes"], lambda: noise_at(tmp_path / "damaged", 64))


@pytest.mark.slow
def test_the_command_prints_json_and_nothing_else(finished: Path) -> None:
    newest, *_ = list_checkpoints(finished / "checkpoints")
    done = run([*RECIPE, str(newest), "--blocks", "16", "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks"] == 16
    assert_one_line(run([*RECIPE, str(newest), "--blocks", "7"]), ["blocks = 7", "at least 8"])
    assert_one_line(run([*RECIPE, str(finished)]), ["no manifest"])
