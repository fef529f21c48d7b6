"""Muon's step against the formulas in numpy and against torch's own; which parameters take it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import recipe.model.muon
import recipe.model.optimizer
from recipe.config.settings import OptimizerConfig
from recipe.model.gpt2 import CausalLanguageModel
from recipe.model.muon import Muon
from recipe.model.optimizer import build_optimizer
from tests.support.gradients import make_blocks, make_model

CONFIG = OptimizerConfig(name="muon", learning_rate=0.02, weight_decay=0.3)
WIDTH = 32  # of the model


def gradients_of(model: CausalLanguageModel) -> dict[str, Tensor]:
    """Leave the gradient of a few blocks of text in `.grad`."""
    model.zero_grad()
    blocks = torch.from_numpy(make_blocks(8)).long()
    model(blocks[:, :-1], blocks[:, 1:]).backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five steps of Newton and Schulz with Jordan's coefficients, of the matrix itself, wide or tall."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def expected_steps(model: CausalLanguageModel, steps: int, rate: float, decay: float) -> dict[str, np.ndarray]:
    """The parameters after `steps` with the gradient that is there, in float64."""
    after = {}
    for name, p in model.named_parameters():
        assert p.grad is not None
        weight, gradient = p.detach().double().numpy(), p.grad.double().numpy()
        if ".h." in name and p.dim() == 2:
            columns = [slice(n * WIDTH, (n + 1) * WIDTH) for n in range(3)] if "c_attn" in name else [slice(None)]
            momentum, weight = np.zeros_like(gradient), weight.copy()
            for _ in range(steps):
                momentum = 0.95 * momentum + 0.05 * gradient
                direction = 0.05 * gradient + 0.95 * momentum
                for part in columns:
                    longer = max(weight[:, part].shape)
                    weight[:, part] *= 1 - rate * decay
                    weight[:, part] -= rate * 0.2 * math.sqrt(longer) * orthogonalised(direction[:, part])
        else:
            for _ in range(steps):  # with one gradient AdamW's moments, made free of their start, are it and its square
                weight = weight * (1 - rate * decay * (p.dim() == 2))
                weight = weight - rate * gradient / (np.abs(gradient) + 1e-8)
        after[name] = weight
    return after


def check_steps() -> None:
    """Three steps of what `build_optimizer` gives.

    Raises:
        AssertionError: they are not those of the formulas.
    """
    model = make_model(torch.float32)
    optimizer = build_optimizer(model, CONFIG)
    gradients_of(model)
    expected = expected_steps(model, 3, CONFIG.learning_rate, CONFIG.weight_decay)
    for _ in range(3):
        optimizer.step()
    for name, p in model.named_parameters():
        # A step's elements are about 0.2 x rate = 4e-3; float32 rounds weights of 0.2 at 1e-8, and the iteration at 1e-6
        np.testing.assert_allclose(p.detach().numpy(), expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_three_steps_are_those_of_the_formulas() -> None:
    check_steps()


def unsplit(monkeypatch: pytest.MonkeyPatch) -> None:
    original = recipe.model.optimizer.matrices_of_blocks
    monkeypatch.setattr(recipe.model.optimizer, "matrices_of_blocks", lambda model: dict.fromkeys(original(model), 1))


def rows_for_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor of [out, in] for transformers' [in, out]."""
    monkeypatch.setattr(recipe.model.muon, "max", lambda shape: shape[0], raising=False)


def no_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "mul_", lambda tensor, factor: tensor)


@pytest.mark.parametrize("plant", [unsplit, rows_for_columns, no_decay])
def test_a_wrong_step_is_noticed(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_steps()


def test_in_bf16_it_is_torchs_muon_of_each_part_bit_for_bit() -> None:
    model = make_model(torch.float32)
    gradients = gradients_of(model)
    optimizer = build_optimizer(model, CONFIG, precision="bf16")
    options: dict[str, Any] = {"lr": CONFIG.learning_rate, "weight_decay": CONFIG.weight_decay}
    parts: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if ".h." in name and p.dim() == 2:
            parts[name] = [part.clone() for part in p.detach().chunk(3 if "c_attn" in name else 1, dim=1)]
            for part, gradient in zip(parts[name], gradients[name].chunk(len(parts[name]), dim=1), strict=True):
                part.grad = gradient.clone()
    muon = torch.optim.Muon(
        [part for of_one in parts.values() for part in of_one], adjust_lr_fn="match_rms_adamw", **options
    )
    for _ in range(2):
        optimizer.step()
        muon.step()
    assert len(parts) == 2 * 4
    for name, p in model.named_parameters():
        if name in parts:
            assert torch.cat(parts[name], dim=1).equal(p), name


def test_rounding_of_the_gradient_stays_rounding_of_the_step() -> None:
    """Other splits of an update give gradients that differ by rounding, and so may their steps: by 20 times as much here.

    In bf16 some matrices' steps differ by 7e-3 here.
    """

    def stepped(noise: float) -> dict[str, Tensor]:
        model = make_model(torch.float32)
        optimizer, generator = build_optimizer(model, CONFIG), torch.Generator().manual_seed(0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, gradient in gradients_of(model).items():
            model.get_parameter(name).grad = gradient * (1 + noise * torch.randn(gradient.shape, generator=generator))
        optimizer.step()
        return {
            name: p.detach() - before[name] for name, p in model.named_parameters() if ".h." in name and p.dim() > 1
        }

    plain, noisy = stepped(0), stepped(1e-6)
    for name, step in plain.items():
        assert (noisy[name] - step).norm() < 1e-4 * step.norm(), name


def test_a_matrix_has_one_moment_and_everything_else_two() -> None:
    model = make_model(torch.float32)
    optimizer = build_optimizer(model, CONFIG)
    assert isinstance(optimizer, Muon)
    gradients_of(model)
    optimizer.step()
    for name, p in model.named_parameters():
        is_matrix = ".h." in name and p.dim() == 2
        assert set(optimizer.state[p]) == ({"momentum_buffer"} if is_matrix else {"step", "exp_avg", "exp_avg_sq"}), (
            name
        )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
