"""The update at which the budget changes, computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipe.config.settings import (
    BatchConfig,
    BudgetChange,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StabilityConfig,
)
from recipe.data.blocks import UpdateBlocks, hash_blocks, to_tensors
from recipe.model.optimizer import build_optimizer, set_learning_rate
from recipe.run.ledger import LedgerEntry
from recipe.step.micro_batches import MicroBatches
from recipe.step.spikes import SpikeDetector
from tests.support.gradients import LENGTH, big_batch, make_blocks, make_mask, make_model
from tests.support.runs import make_run

BLOCKS = (8, 8, 24, 24, 16)  # of each update


def configured(optimizer: str, **more: Any) -> Config:
    """Two updates of 8 blocks, two of 24, then one of 16: with two changes that both fall into the second."""
    changes = tuple(BudgetChange(start * LENGTH, size * LENGTH) for start, size in ((9, 32), (16, 24), (60, 16)))
    batch = BatchConfig(tokens_per_update=8 * LENGTH, lanes=8, schedule=changes, micro_batch_size=5)
    schedule = ScheduleConfig(total_tokens=400 * LENGTH, warmup_tokens=0, shape="wsd")
    settings = OptimizerConfig(name=optimizer, learning_rate=0.1, max_grad_norm=None, weight_decay=0.0, **more)  # type: ignore[arg-type]
    shape = ModelConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=320)
    return Config(
        batch=batch, data=DataConfig(sequence_length=LENGTH), model=shape, optimizer=settings, schedule=schedule
    )


@pytest.mark.parametrize("scaling", ["accumulate", "manual"])
def test_each_sgd_update_is_that_of_one_big_batch_of_its_own_size(accelerator: Any, scaling: Any) -> None:
    """Rate times the root of the budget's ratio, gradient the mean over all targets of this update; to 1e-12, in float64."""
    config = configured("sgd")
    run = make_run(replace(config, batch=replace(config.batch, scaling=scaling)), accelerator)
    plain = make_model(torch.float64)
    model, optimizer = accelerator.prepare(plain, build_optimizer(plain, config.optimizer))
    micro_batches, blocks, seen = MicroBatches(run, model), make_blocks(sum(BLOCKS)), 0
    for update, count in enumerate(BLOCKS, start=1):
        own, seen = blocks[seen : seen + count], seen + count
        before = torch.cat([p.detach().flatten() for p in plain.parameters()])
        loss, gradient = big_batch(plain, own, make_mask(count, masked=False))
        rate = set_learning_rate(run, optimizer, update)
        assert rate == pytest.approx(0.1 * math.sqrt(count / 8), rel=1e-12)
        held = UpdateBlocks(own, to_tensors(own, torch.device("cpu")), hash_blocks(own), [], update)
        result = micro_batches.run_update(optimizer, held)
        after = torch.cat([p.detach().flatten() for p in plain.parameters()])
        torch.testing.assert_close(after, before - 0.1 * math.sqrt(count / 8) * gradient, rtol=0, atol=1e-12)
        assert result.loss.item() == pytest.approx(loss, rel=1e-12)
        assert result.target_tokens.item() == count * LENGTH == run.plan.update_at(update).tokens_per_update
    assert run.plan.tokens_after(len(BLOCKS)) == seen * LENGTH


@pytest.mark.parametrize("state", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_second_moment_keeps_its_memory_in_tokens(state: Any) -> None:
    """Of a weight whose gradient is 1, then 2, ...; the step that is compiled sees the change too."""
    if state == "bf16":
        pytest.importorskip("torchao", reason="pip install --editable '.[bf16-state]'")
    config = configured("adamw", state=state)
    run, dtype = make_run(config), torch.bfloat16 if state == "bf16" else torch.float32
    layer, expected = torch.nn.Linear(1, 1, bias=False).to(dtype), 0.0
    optimizer: Any = build_optimizer(layer, config.optimizer)
    for update, count in enumerate(BLOCKS, start=1):
        set_learning_rate(run, optimizer, update)
        layer.weight.grad = torch.full_like(layer.weight, update)
        optimizer.step()
        beta2 = 0.95 ** (count / 8)
        expected = beta2 * expected + (1 - beta2) * update**2
    found = optimizer.state[layer.weight]["exp_avg_sq"].item()
    assert found == pytest.approx(expected, rel=1e-2 if state == "bf16" else 1e-6)


def test_a_smaller_budget_is_no_spike(tmp_path: Path) -> None:
    """Its gradients are noisier: they are compared with one another."""
    config = replace(
        configured("sgd"), run=RunConfig(directory=str(tmp_path)), stability=StabilityConfig(spike_window=4)
    )
    detector = SpikeDetector(make_run(config))
    entry = LedgerEntry(5, 0, loss=9.0, grad_norm=9.0)
    detector.recent.extend([[1.0, 1.0]] * 4)
    assert detector.find(9.0, 9.0) is not None
    assert detector.check(entry) is None
    assert [*detector.recent] == [[9.0, 9.0]]
    detector.recent.extend([[1.0, 1.0]] * 4)
    assert detector.check(replace(entry, update=6)) is not None
