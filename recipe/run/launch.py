"""Start accelerate for this recipe, and refuse a launch that would not do what it says."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.model.kernels import eager
from recipe.model.loss import IGNORED_TARGET
from recipe.plan.run_plan import world_size_of_launcher

Result = TypeVar("Result")


def announced_world_size() -> int:
    """Ranks that the launcher announced; 1 without a launcher.

    Raises:
        RecipeError: `accelerate launch` was asked for several processes but started one, as it does with
            `--cpu --num_processes 2` (huggingface/accelerate#2741): each would train alone on all of the data.
    """
    world_size = world_size_of_launcher()
    asked = _processes_asked_for(_parent_command_line())
    if world_size == 1 and asked > 1:
        raise RecipeError(
            f"accelerate launch was asked for {asked} processes but started 1: on a CPU use "
            "--config_file accelerate_configs/cpu_2.yaml (distributed_type: MULTI_GPU with use_cpu: true), or torchrun"
        )
    return world_size


def start_accelerator(config: Config, precision: str) -> Any:
    """An Accelerator on the device at hand, whose accumulation steps belong to `recipe.step.update`.

    Raises:
        RecipeError: the ranks do not see each other, or a tracker is not installed.
    """
    missing = [tracker for tracker in config.log.trackers if importlib.util.find_spec(tracker) is None]
    if missing:
        raise RecipeError(f"log.trackers: {missing[0]} is not installed: pip install {missing[0]}, or leave it out")
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise RecipeError(
                f"{name} is not supported yet: launch with a DDP file of accelerate_configs/, such as gpu_8.yaml"
            )
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=device_type() == "cpu",
        mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
        # The plugin, since ACCELERATE_GRADIENT_ACCUMULATION_STEPS overrides the plain argument; no dataloader is prepared.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # As long as gloo waits: NCCL's 10 minutes would be over while one rank tries again to read (data.retry_seconds).
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=30))],
        log_with=list(config.log.trackers) or None,
        project_dir=config.run.directory,
    )
    announced = announced_world_size()
    if accelerator.num_processes != announced:
        raise RecipeError(
            f"the launcher started {announced} ranks but this one sees {accelerator.num_processes}: they would train alone; "
            "launch with a file of accelerate_configs/ or with torchrun",
            on_this_rank_only=True,
        )
    return accelerator


def on_main(accelerator: Any, action: Callable[[], Result]) -> Result:
    """Do something on rank 0 and give its result, or its error, to all ranks, so that none is left waiting. Collective."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except RecipeError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def warm_up_ddp(model: Any, accelerator: Any, sequence_length: int) -> None:
    """Let DDP do now what it does once: in its second forward the ranks agree on the buckets of the gradient. Collective.

    Afterwards no forward waits for other ranks, so a rank that stops before one holds nobody up; and a resumed run reduces its
    first gradient in the same order as the run that was not stopped. A fully masked row adds nothing.
    """
    if accelerator.num_processes == 1:
        return
    inputs = torch.zeros((1, sequence_length), dtype=torch.int64, device=accelerator.device)
    with eager(model):
        for _ in range(2):
            model(inputs, torch.full_like(inputs, IGNORED_TARGET)).backward()
    model.zero_grad(set_to_none=True)


def device_type() -> str:
    """`cpu` where accelerate was told so or torch finds no accelerator, else the accelerator's type (`cuda`, `mps`, ...)."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes") or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def choose_precision(requested: str, device: str) -> tuple[str, str]:
    """(`bf16` or `fp32`, the reason) for `precision: auto|bf16|fp32` on a device type.

    Raises:
        RecipeError: bf16 on a CUDA device that has none.
    """
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if requested == "bf16" and not has_bf16:
            raise RecipeError(f"precision = bf16: {torch.cuda.get_device_name()} has no bf16; use --precision fp32")
        reason = "the GPU has bf16 matrix units" if has_bf16 else "the GPU has no bf16 matrix units"
    elif device == "cpu":
        has_bf16 = torch.cpu._is_amx_tile_supported()
        reason = (
            "the CPU has AMX tiles"
            if has_bf16
            else "the CPU has no AMX tiles, without which bf16 gains little or loses much"
        )
    else:
        has_bf16, reason = False, f"bf16 is not tested on {device}"
    if requested == "auto":
        return ("bf16" if has_bf16 else "fp32"), reason
    return requested, "as configured"


def _parent_command_line() -> Sequence[str]:
    import psutil

    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _processes_asked_for(command: Sequence[str]) -> int:
    """Processes that an `accelerate launch` command line or its configuration file asks for; 1 where it is none."""
    import yaml

    if "launch" not in command or not any("accelerate" in part for part in command[: command.index("launch")]):
        return 1
    options: dict[str, str] = {}
    launch = list(command[command.index("launch") + 1 :])
    for position, part in enumerate(launch):
        if part.endswith(".py"):
            break  # what follows belongs to the script
        name, _, value = part.partition("=")
        options[name.lstrip("-").replace("-", "_")] = value or (
            launch[position + 1] if position + 1 < len(launch) else ""
        )
    if options.get("num_processes", "").isdigit():
        return int(options["num_processes"])
    from accelerate.commands.config.config_args import default_config_file

    try:
        settings = yaml.safe_load(Path(options.get("config_file", default_config_file)).read_text(encoding="utf-8"))
        return int(settings.get("num_processes", 1))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return 1
