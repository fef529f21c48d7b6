"""`batch.micro_batch_size: auto`: as many blocks as fit, by the plan, confirmed by a real step on every rank."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.model.kernels import eager
from recipe.model.loss import IGNORED_TARGET
from recipe.plan.memory import largest_micro_batch
from recipe.plan.run_plan import RunPlan, make_plan
from recipe.run.console import Console
from recipe.step.update import is_out_of_memory


def resolve_auto_micro_batch(plan: RunPlan, config: Config, accelerator: Any, precision: str) -> RunPlan:
    """The plan with the micro-batch that fits into the smallest memory of any rank, where it is `auto`. Collective.

    Raises:
        RecipeError: not even one block fits.
    """
    if not plan.micro_batch_is_auto:
        return plan
    ranks, device = accelerator.num_processes, accelerator.device
    memory = torch.tensor([available_bytes(device)], device=device)
    least = int(accelerator.gather(memory).min())
    return make_plan(config, ranks, largest_micro_batch(config, ranks, least, device.type, precision))


def available_bytes(device: torch.device) -> int:
    """Memory that this rank can have: of a GPU what is free, of a CPU its part of what is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    raise RecipeError(f"batch.micro_batch_size = auto does not know the memory of {device.type}: give a number")


def confirm(plan: RunPlan, config: Config, model: Any, accelerator: Any, console: Console) -> RunPlan:
    """Run forward and backward with what the plan has chosen; where a rank runs out of memory, with half of it. Collective.

    Memory for the optimizer's state, which the first step makes, is held meanwhile. The targets are masked, so the gradient is
    0; it is cleared afterwards.

    Args:
        plan: of `resolve_auto_micro_batch`.
        config: of the run; nothing is done where its micro-batch is no `auto`.
        model: prepared.
        accelerator: of the ranks.
        console: says what was found.

    Returns: the plan with the micro-batch that fits.
    Raises:
        RecipeError: not even one block fits.
    """
    if config.batch.micro_batch_size != "auto":
        return plan
    size = plan.update.largest_micro_batch
    while not _fits(size, plan, model, accelerator):
        if size == 1:
            raise RecipeError(
                "batch.micro_batch_size = auto: a rank ran out of memory with one block; set a shorter --data.sequence_length, "
                "--performance.activation_checkpointing 1, a smaller model, or take a device with more memory"
            )
        console.say(f"micro-batches of {size} blocks do not fit after all; trying {size // 2}")
        size //= 2
    console.say(f"micro-batches of {size} blocks fit: tried")
    return replace(plan, update=replace(plan.update, micro_batch_size=size))


def _fits(size: int, plan: RunPlan, model: Any, accelerator: Any) -> bool:
    from accelerate.utils.memory import clear_device_cache

    inputs = torch.zeros((size, plan.update.sequence_length), dtype=torch.int64, device=accelerator.device)
    is_out = False
    try:
        moments = torch.empty(plan.state_bytes[2], dtype=torch.uint8, device=accelerator.device)
        for _ in range(2):  # the second finds gradients there
            with accelerator.no_sync(model), eager(model):
                model(inputs, torch.full_like(inputs, IGNORED_TARGET)).backward()
        del moments
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        is_out = True
    model.zero_grad(set_to_none=True)
    clear_device_cache(garbage_collection=True)
    outcome = torch.tensor([int(is_out)], device=accelerator.device)
    return not int(accelerator.gather(outcome).max())
