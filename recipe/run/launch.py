"""The launch: what launchers have put into the environment, and what becomes of the training when its launcher ends."""

import ctypes
import os
import re
import signal
import sys
from dataclasses import replace

from recipe.config.checks import validate
from recipe.config.settings import Config, Sharding
from recipe.errors import RecipeError

_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torch needs to form a group
_SIZES_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate reads these too
_UNSUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
_FSDP, _PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def check_launch() -> None:
    """Check that this process is alone, or one of a group whose launcher has said all that a group needs.

    Raises:
        RecipeError: variables that are damaged, incomplete or left over, a launcher that forms no group, or another trainer.
    """
    environment = os.environ
    for name in (*_GROUP, "LOCAL_WORLD_SIZE", *_SIZES_OF_MPI):
        value = environment.get(name)
        pattern, what = (r"\S+", "address") if name == "MASTER_ADDR" else (r"[0-9]{1,9}", "number")
        if value is not None and not re.fullmatch(pattern, value):
            raise _wrong_launch(f"{name} = {value!r} is no {what}", name)
    ranks = int(environment.get("WORLD_SIZE", "1"))
    for name in (*_SIZES_OF_MPI, "SLURM_STEP_NUM_TASKS"):
        tasks = environment.get(name, "")
        if "WORLD_SIZE" not in environment and tasks.isdigit() and int(tasks) > 1:
            starter = "srun" if "SLURM" in name else "mpirun"
            raise RecipeError(
                f"{name} = {tasks}: {starter} has started {tasks} processes, and each would train alone: give each its RANK "
                "and WORLD_SIZE, as slurm/train.sbatch does, or let it start accelerate launch or torchrun on each machine",
                on_this_rank_only=True,
            )
    given = [name for name in _GROUP if name in environment]
    missing = [name for name in _GROUP if name not in environment]
    if missing and (ranks > 1 or "RANK" in given or "LOCAL_RANK" in given):
        shown = ", ".join(f"{name} = {environment[name]}" for name in given)
        raise _wrong_launch(f"{shown} without {', '.join(missing)} is half of a launch", *given)
    for name, most in (("RANK", ranks), ("LOCAL_RANK", int(environment.get("LOCAL_WORLD_SIZE", ranks)))):
        if name in given and int(environment[name]) >= max(most, 1):
            raise _wrong_launch(f"{name} = {environment[name]} of {most} ranks, which are counted from 0", *given)
    for name, what in _UNSUPPORTED.items():
        if _is_true(name):
            raise RecipeError(
                f"{what} is not supported: launch with a file of accelerate_configs/, such as fsdp2_8.yaml"
            )
    if device := environment.get("ACCELERATE_TORCH_DEVICE"):
        raise RecipeError(
            f"ACCELERATE_TORCH_DEVICE = {device}: unset it; ACCELERATE_USE_CPU=true or CUDA_VISIBLE_DEVICES choose the device"
        )


def _wrong_launch(what: str, *names: str) -> RecipeError:
    unset = f"unset {' '.join(names)} (left over from another launch?)"
    return RecipeError(f"{what}: {unset}, or launch with accelerate or torchrun", on_this_rank_only=True)


def with_sharding_of_launch(config: Config) -> Config:
    """The settings with `performance.sharding` as accelerate's launch file has it, if it says FSDP or HSDP.

    accelerate is left without a word of it: the recipe shards the model itself.

    Raises:
        RecipeError: FSDP's version 1, what the recipe cannot do, or another `performance.sharding` than full or hybrid as said.
    """
    if not _is_true(_FSDP):
        return config
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise RecipeError(
            f"FSDP_VERSION = {version}: set fsdp_version: 2 in the launch file, as accelerate_configs/fsdp2_8.yaml"
        )
    if _is_true("FSDP_OFFLOAD_PARAMS"):
        raise RecipeError(
            "FSDP_OFFLOAD_PARAMS = true is not supported: set fsdp_offload_params: false in the launch file"
        )
    replicas = 1
    if _is_true(_PARALLELISM):
        sizes = {
            name: int(os.environ.get(f"PARALLELISM_CONFIG_{name}", "1"))
            for name in ("DP_REPLICATE_SIZE", "TP_SIZE", "CP_SIZE", "SP_SIZE")
        }
        replicas = sizes.pop("DP_REPLICATE_SIZE")
        for name, size in sizes.items():
            if size > 1:
                raise RecipeError(
                    f"PARALLELISM_CONFIG_{name} = {size} is not supported: take it out of the launch file"
                )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    hosts = ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if replicas not in (1, hosts):
        raise RecipeError(
            f"PARALLELISM_CONFIG_DP_REPLICATE_SIZE = {replicas}, and {hosts} machines hold a replica each: set "
            f"parallelism_config_dp_replicate_size: {hosts} in the launch file"
        )
    launched: Sharding = "hybrid" if replicas > 1 else "full"
    if (given := config.performance.sharding) not in ("none", launched):
        raise RecipeError(
            f"performance.sharding = {given}, and the launch file says {launched}: change one of them, or launch with a file "
            "of DDP, such as gpu_8.yaml"
        )
    for name in (_FSDP, _PARALLELISM):
        os.environ.pop(name, None)
    config = replace(config, performance=replace(config.performance, sharding=launched))
    validate(config)
    return config


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def ignored_settings(precision: str) -> list[str]:
    """A line for each value of accelerate's own configuration that contradicts what the recipe decides itself."""
    deciders = (
        ("ACCELERATE_DYNAMO_BACKEND", ("no",), "performance.compile"),
        ("ACCELERATE_MIXED_PRECISION", ("no", precision), "precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "batch.tokens_per_update"),
    )
    given = [(name, os.environ.get(name, fine[0]), fine, setting) for name, fine, setting in deciders]
    if "FSDP_VERSION" in os.environ:
        deciders_of_fsdp = (
            ("FSDP_ACTIVATION_CHECKPOINTING", ("false",), "performance.activation_checkpointing"),
            ("FSDP_AUTO_WRAP_POLICY", ("transformer_based_wrap",), "the recipe, a unit for each block,"),
            ("FSDP_RESHARD_AFTER_FORWARD", ("true", "full_shard"), "the recipe, which reshards,"),
            (
                "FSDP_CPU_RAM_EFFICIENT_LOADING",
                ("false",),
                "the recipe, by which every rank makes the whole model first,",
            ),
            ("FSDP_STATE_DICT_TYPE", ("sharded_state_dict",), "the recipe, each of whose ranks writes its part,"),
        )
        given += [(name, os.environ.get(name, fine[0]), fine, setting) for name, fine, setting in deciders_of_fsdp]
    return [
        f"{name} = {value}, from accelerate's configuration, has no effect here: {setting} decides"
        for name, value, fine, setting in given
        if value.lower() not in fine
    ]


def stop_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher ends, so that the run is saved. On Linux; alone, without one, nothing.

    The shell that started a process without a launcher may end: that is what `nohup` is for.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if is_launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
