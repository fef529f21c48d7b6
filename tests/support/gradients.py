"""Gradients of one update, computed in every way the recipe can, against one plain big batch.

Run by the tests as `python -m tests.support.gradients RESULT.json` on 1, 2 or 3 ranks; every rank has to be started.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn

from recipe.config.settings import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PerformanceConfig,
    Scaling,
    Sharding,
)
from recipe.data.blocks import IGNORED_TARGET, MicroBatch, split_into_micro_batches, to_tensors
from recipe.errors import run_command
from recipe.model.gpt2 import CausalLanguageModel, build_gpt2
from recipe.model.sharding import prepare_model, whole
from recipe.plan.budget import UpdatePlan
from recipe.run.run import Run
from recipe.step.noise import GradientNoise
from recipe.step.update import accumulate_gradient, run_update
from tests.support.runs import make_run

LENGTH = 16
VOCABULARY = 257
MICRO_BATCH_SIZES = (1, 2, 3, 5, 8, 16)
PATHS: tuple[Scaling, ...] = ("accumulate", "manual")
# 32 blocks in 16 lanes: shares of 10, 10 and 12 on three ranks. 4 blocks in 4 lanes on three ranks with micro-batch 1:
# two of the ranks have fewer blocks than steps, and add a fully masked row.
SHAPES = ((32, 16), (4, 4))


def make_accelerator() -> Any:
    """As `recipe.run.environment` starts one, in float32 or float64."""
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    return Accelerator(cpu=True, gradient_accumulation_plugin=plugin)


def make_model(dtype: torch.dtype, document_mask: bool = False) -> CausalLanguageModel:
    """A GPT-2 of two layers, with weights large enough for a gradient that is not nearly linear. Lines are documents."""
    data = DataConfig(document_mask=document_mask)
    shape = ModelConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=320, n_positions=LENGTH, initializer_range=0.2)
    return build_gpt2(Config(data=data, model=shape), VOCABULARY, ord("\n") + 1).to(dtype)


def run_of(
    accelerator: Any,
    plan: UpdatePlan,
    scaling: Scaling = "accumulate",
    max_grad_norm: float | None = None,
    sharding: Sharding = "none",
) -> Run:
    """A run whose updates are split by `plan`."""
    batch, optimizer = BatchConfig(scaling=scaling), OptimizerConfig(max_grad_norm=max_grad_norm)
    performance = PerformanceConfig(sharding=sharding)
    return make_run(Config(batch=batch, optimizer=optimizer, performance=performance), accelerator, plan)


def make_blocks(count: int) -> np.ndarray:
    """Real text, a byte a token: int32 [count, LENGTH + 1]."""
    text = Path(argparse.__file__).read_bytes()[: count * LENGTH + 1]
    stream = np.frombuffer(text, dtype=np.uint8).astype(np.int32) + 1
    return np.stack([stream[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])


def make_mask(count: int, masked: bool) -> Tensor:
    """bool [count, LENGTH]: about a third of the targets, from none to nearly all of a block, unevenly."""
    generator = torch.Generator().manual_seed(7)
    share = torch.rand(count, 1, generator=generator) ** 2  # mean 1/3
    return (
        (torch.rand(count, LENGTH, generator=generator) < share * masked) if masked else torch.zeros(count, LENGTH) > 0
    )


def micro_batches_of(
    plan: UpdatePlan, rank: int, blocks: np.ndarray, mask: Tensor, document_start: int | None = None
) -> list[MicroBatch]:
    """The rank's micro-batches as the recipe cuts them, with the masked targets left out."""
    share = plan.blocks_of_rank(rank)
    batch = to_tensors(blocks[share.start : share.stop], torch.device("cpu"), document_start)
    return [
        (inputs, targets.masked_fill(mask[held.start : held.stop], IGNORED_TARGET) if len(held) else targets, *starts)
        for (inputs, targets, *starts), held in zip(
            split_into_micro_batches(batch, plan, rank), plan.micro_batches(rank), strict=True
        )
    ]


def flat_gradient(model: nn.Module) -> Tensor:
    """All gradients as one float64 vector; cleared afterwards."""
    flat = torch.cat([whole(p.grad).detach().double().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat


def big_batch(model: CausalLanguageModel, blocks: np.ndarray, mask: Tensor) -> tuple[float, Tensor]:
    """(mean loss, gradient) of all blocks in one forward and backward, with nothing of the recipe's scaling."""
    inputs, targets, *starts = to_tensors(blocks, torch.device("cpu"), model.document_start)
    targets = targets.masked_fill(mask, IGNORED_TARGET)
    loss = model(inputs, targets, *starts) / (targets != IGNORED_TARGET).sum()
    loss.backward()
    return loss.item(), flat_gradient(model)


def block_gradient(model: CausalLanguageModel, block: np.ndarray, mask: Tensor) -> Tensor:
    """Of the summed loss of one block alone, as one float64 vector."""
    inputs, targets, *starts = to_tensors(block[None], torch.device("cpu"), model.document_start)
    model(inputs, targets.masked_fill(mask, IGNORED_TARGET), *starts).backward()
    return flat_gradient(model)


def group_sums(noise: GradientNoise, plan: UpdatePlan, gradients: Tensor, targets: Tensor) -> Tensor:
    """What `noise` has to measure, in the order of `GroupSums`: from the gradient and the targets of each block."""
    sums, scale = torch.zeros(5, dtype=torch.float64), plan.world_size / targets.sum().double()
    for rank in range(plan.world_size):
        sample, alone = noise.steps(plan, rank)
        for step in sample:
            held = list(plan.micro_batches(rank)[step - 1])
            if (count := targets[held].sum()) == 0:
                continue
            square = (scale * gradients[held].sum(dim=0)).square().sum() / count
            sums[:3] += torch.stack([square, count, torch.ones(())])
            if step == alone:
                sums[3:] = torch.stack([square, count])
    return sums


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def differences(
    accelerator: Any, dtype: torch.dtype, masked: bool, document_mask: bool = False, sharding: Sharding = "none"
) -> dict[str, float]:
    """Largest relative difference to the big batch, of gradient or loss, by way of computing it; of noise, to `group_sums`."""
    results = {}
    plain = make_model(dtype, document_mask)
    some_plan = UpdatePlan(32 * LENGTH, LENGTH, 16, accelerator.num_processes, 1)
    model = prepare_model(run_of(accelerator, some_plan, sharding=sharding), make_model(dtype, document_mask))
    noise = GradientNoise(model)
    for count, lanes in SHAPES:
        blocks, mask = make_blocks(count), make_mask(count, masked)
        expected_loss, expected = big_batch(plain, blocks, mask)
        gradients = torch.stack(
            [block_gradient(plain, block, of_block) for block, of_block in zip(blocks, mask, strict=True)]
        )
        for size in MICRO_BATCH_SIZES:
            plan = UpdatePlan(count * LENGTH, LENGTH, lanes, accelerator.num_processes, size)
            micro_batches = micro_batches_of(plan, accelerator.process_index, blocks, mask, plain.document_start)
            for path in PATHS:
                run = run_of(accelerator, plan, path, sharding=sharding)
                known = None if masked else plan.tokens_per_update
                run.noise, noise.update = noise, size
                loss, targets = accumulate_gradient(run, model, micro_batches, known)
                assert int(targets) == int((~mask).sum())
                apart = relative(flat_gradient(model), expected)
                results[f"{count} blocks, micro-batch {size}, {path}"] = max(
                    apart, abs(loss.item() / expected_loss - 1)
                )
                assert noise.sums is not None
                wanted = group_sums(noise, plan, gradients, (~mask).sum(dim=1))
                results[f"{count} blocks, micro-batch {size}, {path}, noise"] = float(
                    (noise.sums / wanted - 1).nan_to_num().abs().max()
                )
    return results


def check_sgd_update(accelerator: Any, scaling: Scaling, max_grad_norm: float | None) -> None:
    """Parameters after one step, where a wrong scale cannot hide; clipped once, on the whole gradient.

    Raises:
        AssertionError: they are not those of one big batch.
    """
    blocks, mask = make_blocks(32), make_mask(32, masked=True)
    expected_loss, gradient = big_batch(make_model(torch.float64), blocks, mask)
    norm = gradient.norm().item()
    assert norm > 0.5, "the gradient has to be clipped for this test to say something"
    factor = min(1.0, max_grad_norm / norm) if max_grad_norm else 1.0
    for size in (1, 3, 8, 32):
        plain = make_model(torch.float64)
        before = torch.cat([p.detach().flatten() for p in plain.parameters()])
        model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        plan = UpdatePlan(32 * LENGTH, LENGTH, 16, 1, size)
        run = run_of(accelerator, plan, scaling, max_grad_norm)
        result = run_update(run, model, optimizer, micro_batches_of(plan, 0, blocks, mask))
        after = torch.cat([p.detach().flatten() for p in plain.parameters()])
        torch.testing.assert_close(
            after, before - 0.1 * factor * gradient, rtol=0, atol=1e-7
        )  # clip adds 1e-6 to the norm
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-12), "the norm before clipping"
        assert result.loss.item() == pytest.approx(expected_loss, rel=1e-12)
        assert result.target_tokens.item() == (~mask).sum().item()
        assert result.is_finite
        assert all(p.grad is None for p in plain.parameters())


def main() -> None:
    """Write every difference, as rank 0 sees it."""
    import sys

    accelerator = make_accelerator()
    sharding: Any = sys.argv[2] if len(sys.argv) > 2 else "none"
    results = {
        f"{dtype}, {'masked' if masked else 'packed'}": differences(accelerator, dtype, masked, sharding=sharding)
        for dtype in (torch.float64, torch.float32)
        for masked in (False, True)
    }
    results["torch.float64, in documents"] = differences(
        accelerator, torch.float64, masked=True, document_mask=True, sharding=sharding
    )
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps({"world_size": accelerator.num_processes, **results}), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
