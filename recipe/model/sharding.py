"""FSDP2: parameters, gradients and the optimizer's state are cut over the ranks, a transformer block at a time.

torch's `fully_shard`, the same code on GPUs and, through gloo, on CPUs. accelerate keeps launch, accumulation, backward, reduce
and gather; DDP has no part. Every micro-batch's gradient is reduced to the ranks that hold it, so an update that is abandoned
leaves nothing behind. Every forward is a collective: all ranks run the same number of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from recipe.errors import RecipeError
from recipe.plan import memory
from recipe.run.run import Run
from recipe.run.stop import KEPT_GROUPS


def prepare_model(run: Run, model: Any) -> Any:
    """The model on this rank's device, under autocast if the precision is bf16: as `performance.sharding` says, or in DDP.

    A sharded model stays the module that it was; its parameters are others, so the optimizer has to be built behind this.

    Raises:
        RecipeError: as `ranks_with_parts`.
    """
    accelerator = run.accelerator
    if not run.is_sharded:
        return accelerator.prepare(model)
    return shard(accelerator.prepare_model(model, evaluation_mode=True), _mesh(run))  # which is all but DDP


def shard(model: Any, mesh: Any) -> Any:
    """Cut a `CausalLanguageModel` in place over the ranks of a mesh of torch's."""
    for block in model.gpt2.transformer.h:
        fully_shard(block, mesh=mesh)
    # The rest in one unit, since the embedding is the output layer too
    return fully_shard(model, mesh=mesh)


def ranks_with_parts(run: Run) -> int:
    """Over how many ranks, from 0, a model is cut: all, or those of a host, which hold then what those of each other host do.

    1 if it is not cut.

    Raises:
        RecipeError: hybrid, and hosts have not as many ranks each.
    """
    ranks = int(run.accelerator.num_processes)
    of_host = memory.ranks_with_parts(run.config, ranks)
    if ranks % of_host:
        raise RecipeError(
            f"performance.sharding = hybrid: {ranks} ranks are no whole number of hosts of {of_host}: start as many ranks on "
            "each host, or set --performance.sharding full"
        )
    return of_host


def _mesh(run: Run) -> Any:
    ranks, parts = run.accelerator.num_processes, ranks_with_parts(run)
    shape, names = ((ranks,), ("shard",)) if ranks == parts else ((ranks // parts, parts), ("replicate", "shard"))
    mesh = torch.distributed.init_device_mesh(run.device.type, shape, mesh_dim_names=names)
    KEPT_GROUPS.extend(mesh.get_all_groups())
    return mesh


def is_sharded(model: nn.Module) -> bool:
    """Whether `prepare_model` has cut it."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut. Collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int] | None:
    """Which part `local` is: its first row, and the rows of the whole; None of a tensor that is not cut."""
    if not isinstance(tensor, DTensor):
        return None
    _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return first[0], len(tensor)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor that may be cut, in place, to `values`, which are whole on every rank."""
    with torch.no_grad():
        own, part = local(tensor), rows_of(tensor)
        own.copy_(values[part[0] : part[0] + len(own)] if part else values)


def hook_gradients(model: nn.Module, see: Callable[[Tensor], None]) -> None:
    """Let `see` have every parameter's gradient in each backward, before it is added to others; whole, also if it is cut.

    Collective if the model is cut: the hooks are on what backward sees, which a unit keeps from one gathering to the next.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)] if is_sharded(model) else [model]
    for module in modules:
        if isinstance(module, FSDPModule):
            module.unshard()
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):  # of a unit inside this one
                parameter.register_hook(see)
        reshard(module)


def reshard(model: nn.Module) -> None:
    """Cut what a forward without backward has left whole: the unit of the root."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_model(run: Run, model: Any) -> Any:
    """A `CausalLanguageModel` that rank 0 can run alone: `model`, or of one that is cut a copy on the CPU. Collective.

    None on the other ranks if it is cut.
    """
    if not run.is_sharded:
        return model
    weights = {}
    for name, parameter in model.gpt2.named_parameters():
        weight = whole(parameter.detach())
        if run.is_main:
            weights[name] = weight.cpu()
    if not run.is_main:
        return None
    with torch.device("meta"):
        gpt2 = type(model.gpt2)(model.gpt2.config)
    gpt2.load_state_dict(weights, strict=False, assign=True)
    gpt2.tie_weights()
    return type(model)(gpt2, model.vocabulary)


def add_up_parts(number: Tensor, like: Tensor) -> Tensor:
    """The sum of a number over the ranks that hold the parts of `like`."""
    if isinstance(like, DTensor):
        torch.distributed.all_reduce(number, group=like.device_mesh["shard"].get_group())
    return number
