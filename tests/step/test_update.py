"""The gradient of an update does not depend on how it is split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.config.settings import Scaling
from recipe.plan.budget import UpdatePlan
from recipe.run.environment import start_accelerator
from recipe.step.noise import GradientNoise
from recipe.step.update import accumulate_gradient, clip_and_step, run_update
from tests.helpers import run_ranks
from tests.support.gradients import (
    LENGTH,
    big_batch,
    check_sgd_update,
    differences,
    flat_gradient,
    make_blocks,
    make_mask,
    make_model,
    micro_batches_of,
    run_of,
)

# float64 rounds at 1e-16 and these sums have some thousand terms; float32 at 6e-8.
BOUND = {"torch.float64": 1e-12, "torch.float32": 1e-6}


@pytest.mark.parametrize("world_size", [*(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2)), 3])
def test_gradient_equals_one_big_batch(world_size: int, tmp_path: Path) -> None:
    """Micro-batch 1 to 16, both paths, float64 and float32, packed, unevenly masked, in documents; ranks are processes.

    The same of what is measured for the gradient noise scale, against the gradient of each block alone.
    """
    result = tmp_path / "differences.json"
    run_ranks(world_size, ["-m", "tests.support.gradients", str(result)])
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found.pop("world_size") == world_size
    assert len(found) == 5
    for case, by_way in found.items():
        assert len(by_way) == 48
        for way, difference in by_way.items():
            assert difference < BOUND[case.split(",")[0]], f"{case}, {way}: {difference}"


@pytest.mark.parametrize("scaling", ["accumulate", "manual"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_sgd_update_equals_one_big_batch(accelerator: Any, scaling: Scaling, max_grad_norm: float | None) -> None:
    check_sgd_update(accelerator, scaling, max_grad_norm)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-8), (torch.bfloat16, 1e-7), (torch.float64, 1e-12)])
def test_a_large_gradient_is_added_up_in_float64(accelerator: Any, dtype: torch.dtype, bound: float) -> None:
    """8 million positive numbers: torch's clip_grad_norm_ is 2e-4 away in float32 and in bf16, and so is the step."""
    generator = torch.Generator().manual_seed(0)
    deep, wide, bias = (torch.rand(shape, generator=generator) for shape in ((15_000, 512), (16, 8192), (700,)))
    gradients = [part.to(dtype) for part in (deep, wide, deep[:64].t(), bias, bias[0])]
    model = nn.ParameterList([torch.zeros_like(gradient) for gradient in gradients])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    run = run_of(accelerator, UpdatePlan(LENGTH, LENGTH, 1, 1, 1), max_grad_norm=norm / 4)
    grad_norm, has_stepped = clip_and_step(run, model, optimizer, torch.zeros((), dtype=torch.float64))
    assert has_stepped
    assert grad_norm.item() == pytest.approx(norm, rel=bound)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.data, -gradient / 4, rtol=1e-7, atol=0)


def test_steps_may_change_between_updates(accelerator: Any) -> None:
    """A counter left over from another number of steps must not cut the next update short."""
    blocks, mask = make_blocks(12), make_mask(12, masked=False)
    _, expected = big_batch(make_model(torch.float64), blocks, mask)
    model = accelerator.prepare(make_model(torch.float64))
    for size in (5, 1, 12, 4):
        plan = UpdatePlan(12 * LENGTH, LENGTH, 1, 1, size)
        micro_batches = micro_batches_of(plan, 0, blocks, mask)
        accelerator.step += 1  # what a broken-off update would leave behind
        accumulate_gradient(run_of(accelerator, plan), model, micro_batches)
        assert (flat_gradient(model) - expected).norm() / expected.norm() < 1e-12


@pytest.mark.usefixtures("accelerate_state")
def test_the_environment_cannot_change_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = start_accelerator("fp32")
    assert max(differences(accelerator, torch.float64, masked=False).values()) < 1e-12


class _Operations(TorchDispatchMode):
    """Counts every operation that reaches the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaling", ["accumulate", "manual"])
def test_no_device_synchronisation_per_micro_batch(accelerator: Any, scaling: Scaling) -> None:
    """Reading a tensor on the host is aten::_local_scalar_dense; its count may not grow with the micro-batches."""
    blocks, mask = make_blocks(16), make_mask(16, masked=True)
    plain = make_model(torch.float32)
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    noise = GradientNoise(model)

    def operations(size: int) -> Counter[str]:
        plan = UpdatePlan(16 * LENGTH, LENGTH, 16, 1, size)
        run, micro_batches = run_of(accelerator, plan, scaling, 1.0), micro_batches_of(plan, 0, blocks, mask)
        run.noise = noise
        with _Operations() as seen:
            run_update(run, model, optimizer, micro_batches)
        return seen.counts

    few, many = operations(16), operations(1)
    norms = many["aten.linalg_vector_norm.default"] - few["aten.linalg_vector_norm.default"]
    assert norms == 15 * 11, "the gradient of each micro-batch was measured"
    assert many["aten.mm.default"] + many["aten.addmm.default"] >= 16 * 8, "the counter sees the work"
    assert few["aten._local_scalar_dense.default"] == many["aten._local_scalar_dense.default"] <= 1
    with _Operations() as seen:
        torch.ones(()).item()
    assert seen.counts["aten._local_scalar_dense.default"] == 1, "the counter sees a synchronisation"
