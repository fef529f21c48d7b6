"""beta2 as a function of the tokens of an update reaches AdamW's step, and a step that is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from recipe.config.settings import BatchConfig, Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from recipe.model.optimizer import build_optimizer, set_learning_rate
from tests.support.runs import make_run


def second_moment(optimizer_config: OptimizerConfig, dtype: torch.dtype) -> torch.Tensor:
    """Of one weight, after three updates of 1,024 tokens whose gradients are 1, 2 and 3."""
    batch, data = BatchConfig(tokens_per_update=1024, lanes=8), DataConfig(sequence_length=64)
    model, schedule = ModelConfig(n_layer=1, n_embd=8, n_head=1), ScheduleConfig(total_tokens=10_240, warmup_tokens=0)
    run = make_run(Config(batch=batch, data=data, model=model, optimizer=optimizer_config, schedule=schedule))
    layer = nn.Linear(1, 1, bias=False).to(dtype)
    optimizer: Any = build_optimizer(layer, optimizer_config)
    for update in (1, 2, 3):
        set_learning_rate(run, optimizer, update)
        layer.weight.grad = torch.full_like(layer.weight, update)
        optimizer.step()
    moment: torch.Tensor = optimizer.state[layer.weight]["exp_avg_sq"]
    return moment.float()


@pytest.mark.parametrize("state", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_step_forgets_by_half_life(state: Any) -> None:
    if state == "bf16":
        pytest.importorskip("torchao", reason="pip install --editable '.[bf16-state]'")
    settings = OptimizerConfig(state=state, beta2=0.95, beta2_half_life_tokens=4096, learning_rate=1e-3)
    beta2 = 0.5 ** (1024 / 4096)
    expected = (1 - beta2) * (beta2**2 * 1 + beta2 * 4 + 9)
    found = second_moment(settings, torch.bfloat16 if state == "bf16" else torch.float32).item()
    assert found == pytest.approx(expected, rel=1e-2 if state == "bf16" else 1e-6)
