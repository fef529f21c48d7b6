"""What is measured of micro-batches' gradients: it changes nothing, and gives the noise scale of the blocks one by one."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipe.config.settings import Config, Scaling
from recipe.data.blocks import IGNORED_TARGET, split_into_micro_batches, to_tensors
from recipe.model.gpt2 import CausalLanguageModel, checkpoint_activations
from recipe.model.kernels import compile_model
from recipe.plan.budget import UpdatePlan
from recipe.run.noise_scale import GroupSums, NoiseScale, Smoothed
from recipe.step.frozen_noise import measure_frozen
from recipe.step.noise import GROUPS_PER_UPDATE, GradientNoise, squared_norm
from recipe.step.update import accumulate_gradient, run_update
from tests.helpers import SCRIPT, TINY, read_ledger, run_ranks
from tests.support.gradients import LENGTH, make_blocks, make_mask, make_model, micro_batches_of, run_of
from tests.support.runs import make_run


@pytest.mark.parametrize(("steps", "ranks"), [(1, 1), (4, 1), (64, 1), (65, 1), (7, 3), (8, 8), (5, 64)])
def test_a_sample_is_evenly_spread_and_every_micro_batch_has_its_turn(steps: int, ranks: int) -> None:
    plan = UpdatePlan(steps * ranks * LENGTH, LENGTH, ranks, ranks, 1)
    assert plan.gradient_accumulation_steps == steps
    noise, seen, alone = GradientNoise(torch.nn.Linear(1, 1)), Counter[int](), Counter[tuple[int, int]]()
    for update in range(steps * ranks):
        noise.update = update
        sample, _ = noise.steps(plan, 0)
        alone.update((rank, step) for rank in range(ranks) if (step := noise.steps(plan, rank)[1]))
        assert len(sample) == min(steps, math.ceil(GROUPS_PER_UPDATE / ranks))
        assert set(sample) <= set(range(1, steps + 1))
        gaps = np.diff([*sample, sample[0] + steps])
        assert gaps.max() - gaps.min() <= 1
        seen.update(sample)
    assert set(seen.values()) == {len(sample) * ranks}
    assert alone.total() == steps * ranks, "one in each update"
    assert {rank for rank, _ in alone} == set(range(ranks))
    assert len({step for _, step in alone}) > 0.9 * steps


def train(accelerator: Any, scaling: Scaling, model: CausalLanguageModel, every: int | None) -> list[Tensor]:
    """Parameters and optimizer state after six updates of ragged, masked micro-batches; every `every`-th is measured."""
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    blocks, mask = make_blocks(14), make_mask(14, masked=True)
    run = run_of(accelerator, UpdatePlan(14 * LENGTH, LENGTH, 14, 1, 4), scaling, max_grad_norm=0.5)
    run.noise = GradientNoise(prepared, every) if every else None
    micro_batches, measured = micro_batches_of(run.plan.update, 0, blocks, mask), []
    for update in range(6):
        if run.noise:
            run.noise.update = update
        result = run_update(run, prepared, optimizer, micro_batches)
        measured.append(result.noise is not None and float(result.noise[2]))
    assert measured == [[4.0, 0.0][update % (every or 1) > 0] if every else False for update in range(6)]
    state = [value for of in optimizer.state.values() for value in of.values()]
    return [parameter.detach().clone() for parameter in model.parameters()] + state


@pytest.mark.parametrize(("scaling", "every_block"), [("accumulate", None), ("manual", 1)])
def test_hooks_change_no_bit_of_the_training(accelerator: Any, scaling: Scaling, every_block: int | None) -> None:
    found = []
    for every in (None, 1, 3):
        model = make_model(torch.float32)
        checkpoint_activations(model.gpt2, every_block)
        model.train()
        found.append(train(accelerator, scaling, model, every))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.equal(b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compiled", "bf16 parameters"])
def test_hooks_change_no_bit_of_compiled_and_bf16_training(accelerator: Any, kind: str) -> None:
    found = []
    for every in (None, 1):
        model = make_model(torch.bfloat16 if kind == "bf16 parameters" else torch.float32)
        if kind == "compiled":
            torch._dynamo.reset()
            compile_model(model, backend="aot_eager")
        found.append(train(accelerator, "accumulate", model, every))
    for a, b in zip(*found, strict=True):
        assert a.equal(b)


def columns_of(accelerator: Any, model: CausalLanguageModel, mask: Tensor) -> dict[str, Any]:
    """Of an update of 14 blocks at frozen weights, all groups of four measured."""
    prepared = accelerator.prepare(model)
    run = run_of(accelerator, UpdatePlan(14 * LENGTH, LENGTH, 14, 1, 4))
    run.noise = GradientNoise(prepared)
    _, targets = accumulate_gradient(run, prepared, micro_batches_of(run.plan.update, 0, make_blocks(14), mask))
    norm = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    return GroupSums(*run.noise.sums.tolist()).columns(norm.item(), int(targets), 1)


def test_the_estimates_are_those_of_each_groups_own_gradient(accelerator: Any) -> None:
    """By autograd, group by group: sum |s_k|^2 / t_k, less |sum s_k|^2 / t, over K - 1."""
    mask = make_mask(14, masked=True)
    mask[4:8] = True  # the second of 4, 4, 3 and 3 blocks has no target
    found = columns_of(accelerator, make_model(torch.float64), mask)
    model, plan = make_model(torch.float64), UpdatePlan(14 * LENGTH, LENGTH, 14, 1, 4)
    total, squares, targets = torch.zeros(()), torch.zeros(()), 0
    first = None
    groups = 0
    for micro_batch in micro_batches_of(plan, 0, make_blocks(14), mask):
        count = int((micro_batch[1] != IGNORED_TARGET).sum())
        if not count:
            continue
        gradients = torch.autograd.grad(model(*micro_batch), list(model.parameters()))
        flat = torch.cat([g.flatten() for g in gradients])
        total, squares, targets, groups = (
            total + flat,
            squares + flat.square().sum() / count,
            targets + count,
            groups + 1,
        )
        first = (flat, count) if first is None else first
    assert first is not None
    whole = total.square().sum()
    s2 = float((squares - whole / targets) / (groups - 1))
    assert (found["noise_groups"], groups) == (3, 3)
    assert found["noise_s2"] == pytest.approx(s2, rel=1e-10)
    assert found["noise_g2"] == pytest.approx(float(whole) / targets**2 - s2 / targets, rel=1e-10)
    of_first = (first[0].square().sum() / first[1] ** 2 - whole / targets**2) / (1 / first[1] - 1 / targets)
    assert found["noise_first_s2"] == pytest.approx(float(of_first), rel=1e-10)


@pytest.mark.slow
def test_compiled_checkpointed_and_rounded_gradients_are_as_noisy(accelerator: Any) -> None:
    """In float32 to its rounding; bf16 keeps 8 bits of each number, and adds its rounding to the noise."""
    mask = make_mask(14, masked=True)
    expected = columns_of(accelerator, make_model(torch.float64), mask)
    compiled, checkpointed, rounded = make_model(torch.float32), make_model(torch.float32), make_model(torch.bfloat16)
    torch._dynamo.reset()
    compile_model(compiled, backend="aot_eager")
    checkpoint_activations(checkpointed.gpt2, 1)
    checkpointed.train()
    autocast = make_model(torch.float32)
    autocast.forward = torch.autocast("cpu", torch.bfloat16)(autocast.forward)  # type: ignore[method-assign]
    for model, bound in ((compiled, 1e-4), (checkpointed, 1e-4), (autocast, 0.05), (rounded, 0.05)):
        found = columns_of(accelerator, model, mask)
        for name in ("noise_s2", "noise_first_s2"):
            assert found[name] == pytest.approx(expected[name], rel=bound)


def scale_of_updates(accelerator: Any, model: CausalLanguageModel, blocks: np.ndarray, plan: UpdatePlan) -> NoiseScale:
    """Measured in updates at frozen weights, which have these blocks one after the other."""
    prepared, smoothed = accelerator.prepare(model), Smoothed()
    run = run_of(accelerator, plan)
    run.noise = GradientNoise(prepared)
    for update, held in enumerate(np.split(blocks, len(blocks) // plan.blocks_per_update), start=1):
        mask = make_mask(len(held), masked=False)
        _, targets = accumulate_gradient(run, prepared, micro_batches_of(plan, 0, held, mask), plan.tokens_per_update)
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
        columns = GroupSums(*run.noise.sums.tolist()).columns(norm.item(), int(targets), 1)
        smoothed = smoothed.add(update, columns["noise_s2"], columns["noise_g2"])
        model.zero_grad()
    scale = smoothed.scale()
    assert scale is not None
    return scale


@pytest.mark.slow
@pytest.mark.parametrize(("count", "sizes"), [(256, (4,)), (2048, (1, 2, 3, 8))])
def test_the_scale_of_updates_is_that_of_single_blocks(accelerator: Any, count: int, sizes: tuple[int, ...]) -> None:
    """Real text, shuffled; updates of 16 blocks in micro-batches of any size, against the gradient of each block alone."""
    blocks = make_blocks(count)[np.random.default_rng(0).permutation(count)]
    model = make_model(torch.float32)
    brute = measure_frozen(model, [to_tensors(block[None], torch.device("cpu")) for block in blocks]).scale
    assert brute.tokens is not None
    assert brute.low is not None
    for size in sizes:
        scale = scale_of_updates(accelerator, model, blocks, UpdatePlan(16 * LENGTH, LENGTH, 16, 1, size))
        assert scale.low is not None
        assert scale.high is not None
        assert scale.low < brute.tokens < scale.high, size
        assert brute.low < scale.high


def test_neighbouring_blocks_that_are_alike_are_noticed(accelerator: Any) -> None:
    """What the check of brute force is for: each block four times in a row, in one micro-batch, has four times the noise."""
    blocks = make_blocks(60)[np.random.default_rng(0).permutation(60)].repeat(4, axis=0)
    model, plan = make_model(torch.float32), UpdatePlan(16 * LENGTH, LENGTH, 16, 1, 4)
    alike = scale_of_updates(accelerator, model, blocks, plan).tokens
    mixed = scale_of_updates(accelerator, model, blocks[np.random.default_rng(1).permutation(240)], plan).tokens
    assert alike is not None
    assert mixed is not None
    assert alike > 2 * mixed


def test_the_masked_row_of_a_trial_is_no_group(accelerator: Any) -> None:
    """Nor does it change which micro-batches are measured: a resumed run tries its size again, and has the same columns."""
    model = accelerator.prepare(make_model(torch.float32))
    found = []
    for is_on_trial in (False, True):
        plan, rows = UpdatePlan(20 * LENGTH, LENGTH, 20, 1, 1), make_blocks(20)
        run = make_run(Config(), accelerator, plan)
        run.noise = GradientNoise(model)
        run.noise.update = 3
        batch = to_tensors(rows, torch.device("cpu"))
        micro_batches = split_into_micro_batches(batch, plan, 0, masked_row_last=is_on_trial)
        accumulate_gradient(run, model, micro_batches, plan.tokens_per_update)
        model.zero_grad()
        found.append(run.noise.sums.tolist())
    assert found[0] == found[1]
    assert found[0][2] == 16


@pytest.mark.slow
def test_ranks_and_micro_batches_agree_on_the_scale_of_a_run(texts: Path, tmp_path: Path) -> None:
    """The same forty updates, divided in eight ways: each scale is inside the interval of all others.

    Each block of an update is of another lane. Several of one lane are a little alike while its windows are small, and of this
    little text: with three of each, micro-batches of one block find 0.85 of the noise (docs/batch.md).
    """
    found = {}
    for ranks, size in ((1, 1), (1, 2), (1, 3), (1, 8), (2, 1), (2, 4), (3, 1), (3, 5)):
        directory = tmp_path / f"{ranks}-{size}"
        settings = ["--run.directory", str(directory), "--data.text_files", f"{texts}/*.txt"]
        settings += [
            "--batch.lanes",
            "24",
            "--batch.micro_batch_size",
            str(size),
            "--data.cache_directory",
            str(tmp_path / "cache"),
        ]
        run_ranks(ranks, [SCRIPT, *TINY, *settings])
        last = read_ledger(directory)[-1]
        found[ranks, size] = [last[f"gradient_noise_scale_tokens{end}"] for end in ("", "_low", "_high")]
    for value, _, _ in found.values():
        for _, low, high in found.values():
            assert low < value < high, found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_squared_norm_is_added_up_in_32_bits_at_least(dtype: torch.dtype) -> None:
    """Of a gradient that is contiguous, transposed, or a number; bf16 itself would stop adding at 256."""
    numbers = torch.rand((300, 700), generator=torch.Generator().manual_seed(0)).to(dtype)
    for gradient in (numbers, numbers.t(), numbers[:, 3], numbers[0, 0]):
        found = squared_norm(gradient)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.item() == pytest.approx(gradient.double().square().sum().item(), rel=1e-5)
