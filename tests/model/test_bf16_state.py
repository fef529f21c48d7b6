"""AdamW in 8 bytes per parameter: what it holds, that small steps arrive, that ranks and resumed runs round alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from recipe.config.settings import OptimizerConfig
from recipe.model.optimizer import build_optimizer
from tests.helpers import TINY, end_of, read_ledger, start_ranks, train, write_texts

pytestmark = pytest.mark.slow
pytest.importorskip("torchao", reason="pip install --editable '.[bf16-state]'")


def test_it_holds_eight_bytes_per_parameter_and_ranks_round_alike(tmp_path: Path) -> None:
    """Rounding draws random numbers, and dropout's are another rank's: without a seed of its own the ranks drift apart."""
    compiled_once = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for ranks in (1, 2):  # one compiles the step, then two find it: at once, on two cores, they took minutes
        command = ["-m", "tests.support.bf16_state_ranks", str(tmp_path / "result.json")]
        codes, output, _ = end_of(start_ranks(ranks, command, **compiled_once), timeout=900)
        assert codes == [0] * ranks, output
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (found["parameters"], found["gradients"], found["moments"]) == (2, 2, 4)
    first, second = found["digests"]
    assert first == second


def test_steps_too_small_for_bf16_arrive_in_the_mean() -> None:
    """A weight of 1 cannot become 1 - 1e-4 in bf16: rounded to the nearest it never moves."""
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    optimizer = build_optimizer(layer, OptimizerConfig(state="bf16", weight_decay=0.0, learning_rate=1e-4), seed=1)
    for _ in range(40):
        layer.weight.grad = torch.ones_like(layer.weight)  # AdamW's step is then the learning rate
        optimizer.step()
    # Steps of 2^-8 below 1: the mean of 4,096 weights has a standard error of sqrt(0.004 x 2^-8 / 4096) = 6e-5.
    assert 1 - layer.weight.float().mean().item() == pytest.approx(40 * 1e-4, abs=4e-4)
    assert torch.tensor(1 - 1e-4).bfloat16() == 1


def test_a_resumed_run_with_bf16_state_is_bit_identical(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")

    def run(name: str, *more: str) -> None:
        given = ["--run.directory", f"{tmp_path}/{name}", "--data.text_files", f"{tmp_path}/texts/*.txt"]
        cache = ["--data.cache_directory", f"{tmp_path}/cache", "--batch.micro_batch_size", "12"]
        bf16 = ["--optimizer.state", "bf16", "--precision", "bf16"]
        done = train(*TINY, *given, *cache, *bf16, *more, TORCHINDUCTOR_CACHE_DIR=f"{tmp_path}/inductor")
        assert done.returncode == 0, done.stderr

    run("whole", "--run.max_updates", "6")
    run("parts", "--run.max_updates", "3")
    run("parts", "--run.max_updates", "6")
    whole, parts = read_ledger(tmp_path / "whole"), read_ledger(tmp_path / "parts")
    assert [entry["loss"] for entry in parts] == [entry["loss"] for entry in whole]
    weights = "final/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "parts" / weights).read_bytes()
    state = "checkpoints/step-000006/training/optimizer.safetensors"
    assert (tmp_path / "whole" / state).read_bytes() == (tmp_path / "parts" / state).read_bytes()


def test_without_torchao_it_is_one_line(tmp_path: Path) -> None:
    script = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: n != 'torchao' and f(n, *a) or None\\n"
    script += "from recipe.errors import run_command; import recipe.train; run_command(recipe.train.main)"
    bf16 = ["--optimizer.state", "bf16", "--precision", "bf16", "--run.directory", str(tmp_path)]
    done = train(*TINY, *bf16, script=("-c", script.replace("\\n", "\n")))
    assert done.returncode == 2
    assert "optimizer.state = bf16 needs torchao: pip install --editable '.[bf16-state]'" in done.stderr
