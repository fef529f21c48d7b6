"""What goes wrong without a word when FSDP2 shards a model, looked for on the ranks of a launch:
`python -m tests.support.sharding_traps RESULT.json full|hybrid`. Every rank has to be started; rank 0 writes what it found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from recipe.checkpoint.files import take_snapshot
from recipe.checkpoint.resume import verification_loss
from recipe.config.settings import OptimizerConfig
from recipe.data.blocks import UpdateBlocks
from recipe.errors import run_command
from recipe.model.optimizer import build_optimizer
from recipe.model.sharding import local, prepare_model, whole
from recipe.plan.budget import UpdatePlan
from recipe.run.run import Run
from recipe.run.stop import Stopped
from recipe.step.update import accumulate_gradient, run_update
from tests.support.gradients import (
    LENGTH,
    big_batch,
    flat_gradient,
    make_accelerator,
    make_blocks,
    make_mask,
    make_model,
    micro_batches_of,
    relative,
    run_of,
)

BLOCKS, MICRO_BATCH = 32, 4


def sharded(accelerator: Any, dtype: torch.dtype = torch.float64) -> tuple[Run, Any, list[Any]]:
    """A run, its model, and this rank's micro-batches."""
    plan = UpdatePlan(BLOCKS * LENGTH, LENGTH, 16, accelerator.num_processes, MICRO_BATCH)
    run = run_of(accelerator, plan, sharding="hybrid" if sys.argv[2] == "hybrid" else "full")
    run.stop.connect(accelerator.num_processes)
    model = prepare_model(run, make_model(dtype))
    batches = micro_batches_of(plan, run.rank, make_blocks(BLOCKS), make_mask(BLOCKS, masked=False))
    return run, model, batches


def abandoned_update(accelerator: Any) -> float:
    """How far the gradient behind an update that was abandoned is from that of one big batch."""
    run, model, batches = sharded(accelerator)
    optimizer = accelerator.prepare(build_optimizer(model, OptimizerConfig(name="sgd")))

    def ask_to_stop(*_: Any) -> None:
        run.stop.signal = 15

    hook = model.register_forward_hook(ask_to_stop)
    try:
        run_update(run, model, optimizer, batches, BLOCKS * LENGTH)
    except Stopped:
        hook.remove()
        run.stop.signal = 0
        accumulate_gradient(run, model, batches, BLOCKS * LENGTH)
        return relative(flat_gradient(model), expected_gradient())
    raise AssertionError("the update was not abandoned")


def expected_gradient() -> Tensor:
    return big_batch(make_model(torch.float64), make_blocks(BLOCKS), make_mask(BLOCKS, masked=False))[1]


def what_a_forward_leaves(accelerator: Any) -> list[bool]:
    """Whether a forward without backward leaves parameters cut, and the optimizer's state readable."""
    run, model, batches = sharded(accelerator)
    optimizer = accelerator.prepare(build_optimizer(model, OptimizerConfig()))
    run_update(run, model, optimizer, batches, BLOCKS * LENGTH)
    blocks = make_blocks(1)
    verification_loss(model, UpdateBlocks(blocks, batches[0], np.zeros((1, 32), np.uint8), []))
    is_cut = all(isinstance(p, DTensor) and local(p).numel() < p.numel() for p in model.parameters())
    snapshot = take_snapshot(model, optimizer.optimizer)
    return [is_cut, len(snapshot.optimizer) == 3 * len(list(model.parameters()))]


def ties_and_first_weights(accelerator: Any) -> list[bool]:
    """Whether embedding and output layer are one parameter, before and behind an update, and the weights those of one rank."""
    run, model, batches = sharded(accelerator)
    first = dict(make_model(torch.float64).named_parameters())
    same = all(whole(p.detach()).equal(first[name].detach()) for name, p in model.named_parameters())
    before = model.gpt2.lm_head.weight is model.gpt2.transformer.wte.weight
    optimizer = accelerator.prepare(build_optimizer(model, OptimizerConfig()))
    run_update(run, model, optimizer, batches, BLOCKS * LENGTH)
    return [same, before, model.gpt2.lm_head.weight is model.gpt2.transformer.wte.weight]


def bf16(accelerator: Any) -> dict[str, Any]:
    """Under autocast: types, and how far the gradient is from the sum of the same micro-batches' without sharding."""
    run, model, batches = sharded(accelerator, torch.float32)
    loss, _ = accumulate_gradient(run, model, batches, BLOCKS * LENGTH)
    kinds = {str(p.grad.dtype) for p in model.parameters() if p.grad is not None} | {str(loss.dtype)}
    found = flat_gradient(model)
    plain, plan = make_model(torch.float32), run.plan.update
    for rank in range(plan.world_size):
        for batch in micro_batches_of(plan, rank, make_blocks(BLOCKS), make_mask(BLOCKS, masked=False)):
            with torch.autocast("cpu", torch.bfloat16):
                of_batch = plain(*batch)
            (of_batch.float() / (BLOCKS * LENGTH)).backward()
    return {"kinds": sorted(kinds), "difference": relative(found, flat_gradient(plain))}


def main() -> None:
    accelerator = make_accelerator()
    found: dict[str, Any] = {
        "abandoned": abandoned_update(accelerator),
        "forward": what_a_forward_leaves(accelerator),
        "ties": ties_and_first_weights(accelerator),
    }
    accelerator.state._reset_state()
    found["bf16"] = bf16(Accelerator(cpu=True, mixed_precision="bf16"))
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
