"""The gradient of an update does not depend on how it is cut up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.plan.budget import UpdatePlan
from recipe.step.update import Scaling, accumulate_gradient, run_update
from tests.helpers import run_ranks
from tests.support.gradients import (
    LENGTH,
    big_batch,
    differences,
    flat_gradient,
    make_accelerator,
    make_blocks,
    make_mask,
    make_model,
    micro_batches_of,
)

# float64 rounds at 1e-16 and these sums have some thousand terms; float32 at 6e-8.
BOUND = {"torch.float64": 1e-12, "torch.float32": 1e-6}


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield make_accelerator()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradient_equals_one_big_batch(world_size: int, tmp_path: Path) -> None:
    """Micro-batch 1 to 16, both paths, float64 and float32, packed and unevenly masked; ranks are gloo processes."""
    result = tmp_path / "differences.json"
    run_ranks(world_size, ["-m", "tests.support.gradients", str(result)])
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found.pop("world_size") == world_size
    assert len(found) == 4
    for case, by_way in found.items():
        assert len(by_way) == 24
        for way, difference in by_way.items():
            assert difference < BOUND[case.split(",")[0]], f"{case}, {way}: {difference}"


@pytest.mark.parametrize("scaling", ["accumulate", "manual"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_sgd_update_equals_one_big_batch(accelerator: Any, scaling: Scaling, max_grad_norm: float | None) -> None:
    """Parameters after one step, where a wrong scale cannot hide; clipped once, on the whole gradient."""
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
        result = run_update(
            model,
            optimizer,
            micro_batches_of(plan, 0, blocks, mask),
            accelerator=accelerator,
            scaling=scaling,
            max_grad_norm=max_grad_norm,
        )
        assert result is not None
        after = torch.cat([p.detach().flatten() for p in plain.parameters()])
        torch.testing.assert_close(
            after, before - 0.1 * factor * gradient, rtol=0, atol=1e-7
        )  # clip adds 1e-6 to the norm
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-12), "the norm before clipping"
        assert result.loss.item() == pytest.approx(expected_loss, rel=1e-12)
        assert result.target_tokens.item() == (~mask).sum().item()
        assert all(p.grad is None for p in plain.parameters())


def test_steps_may_change_between_updates(accelerator: Any) -> None:
    """A counter left over from another number of steps must not cut the next update short."""
    blocks, mask = make_blocks(12), make_mask(12, masked=False)
    _, expected = big_batch(make_model(torch.float64), blocks, mask)
    model = accelerator.prepare(make_model(torch.float64))
    for size in (5, 1, 12, 4):
        plan = UpdatePlan(12 * LENGTH, LENGTH, 1, 1, size)
        micro_batches = micro_batches_of(plan, 0, blocks, mask)
        accelerator.step += 1  # what a broken-off update would leave behind
        accumulate_gradient(model, micro_batches, accelerator=accelerator, scaling="accumulate")
        assert (flat_gradient(model) - expected).norm() / expected.norm() < 1e-12


def test_the_environment_cannot_change_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    largest = max(differences(make_accelerator(), torch.float64, masked=False).values())
    assert largest < 1e-12


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

    def operations(size: int) -> Counter[str]:
        micro_batches = micro_batches_of(UpdatePlan(16 * LENGTH, LENGTH, 16, 1, size), 0, blocks, mask)
        with _Operations() as seen:
            run_update(model, optimizer, micro_batches, accelerator=accelerator, scaling=scaling, max_grad_norm=1.0)
        return seen.counts

    few, many = operations(16), operations(1)
    assert many["aten.mm.default"] + many["aten.addmm.default"] >= 16 * 8, "the counter sees the work"
    assert few["aten._local_scalar_dense.default"] == many["aten._local_scalar_dense.default"] <= 1
    with _Operations() as seen:
        torch.ones(()).item()
    assert seen.counts["aten._local_scalar_dense.default"] == 1, "the counter sees a synchronisation"
