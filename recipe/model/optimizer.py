"""The optimizer: its parameter groups, its learning rate, and random numbers as a function of what they are for."""

from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from recipe.config.settings import OptimizerConfig
from recipe.model.muon import Muon
from recipe.plan.schedule import learning_rate
from recipe.run.run import Run


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings with `weight_decay`; biases and layer norms without."""
    parameters: list[nn.Parameter] = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def matrices_of_blocks(model: nn.Module) -> dict[nn.Parameter, int]:
    """The blocks' matrices, and of how many each consists: query, key and value are one parameter, [d, 3 d]."""
    names = {p: name for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    return {p: 3 if name.endswith(".c_attn.weight") else 1 for p, name in names.items()}


def build_optimizer(
    model: nn.Module, optimizer: OptimizerConfig, seed: int = 0, precision: str = "fp32"
) -> torch.optim.Optimizer:
    """AdamW (fused, also on a CPU: 8 times faster there than the loop), with bf16 state or with Muon, or SGD without momentum.

    `precision` is that of Muon's matrix products.
    """
    groups = parameter_groups(model, optimizer.weight_decay)
    if optimizer.name == "sgd":
        return torch.optim.SGD(groups, lr=optimizer.learning_rate)
    betas = (optimizer.beta1, optimizer.beta2)
    options: dict[str, Any] = {"lr": optimizer.learning_rate, "betas": betas, "eps": optimizer.epsilon}
    if optimizer.state == "bf16":
        from recipe.model.bf16_adamw import Bf16AdamW

        return Bf16AdamW(groups, seed_rounding=partial(seed_rounding, seed), **options)
    if optimizer.name == "muon":
        matrices = matrices_of_blocks(model)
        groups[0]["params"] = [p for p in groups[0]["params"] if p not in matrices]
        shared = {"lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay}
        muon = [{"params": [p for p in matrices if matrices[p] == parts], "parts": parts, **shared} for parts in (1, 3)]
        adamw = torch.optim.AdamW(groups, fused=True, **options)
        return Muon(muon, adamw, torch.bfloat16 if precision == "bf16" else torch.float32)
    return torch.optim.AdamW(groups, fused=True, **options)


def set_learning_rate(run: Run, optimizer: Any, update: int) -> float:
    """Set rate and beta2 of this update's step, functions of its tokens, and return the rate."""
    plan, settings, phase = run.plan, run.config.optimizer, run.plan.phase_at(update)
    rate = (
        learning_rate(plan.tokens_after(update), plan.total_tokens, settings, run.config.schedule) * phase.rate_factor
    )
    for group in optimizer.param_groups:
        if "betas" in group:  # numbers also where the step is compiled, which is done again when they change
            group["betas"] = (settings.beta1, phase.beta2)
        if isinstance(group["lr"], Tensor):  # AdamW with bf16 state keeps a tensor, which compiled code reads
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return rate


def seed_dropout(seed: int, update: int, rank: int) -> None:
    """Seed dropout, differently on each rank, since each has other blocks."""
    _seed_torch("dropout", seed, update, rank)


def seed_rounding(seed: int, steps: int) -> None:
    """Seed the rounding to bf16, alike on all ranks, since all have the same parameters."""
    _seed_torch("rounding", seed, steps)


def _seed_torch(*key: str | int) -> None:
    """Seed torch's generators, on all devices, by a hash of the key."""
    torch.manual_seed(int.from_bytes(sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1)
