"""What the ranks of a sharded model gather and reduce in an update: `python -m tests.support.sent_bytes RESULT SETTINGS...`.

Rank 0 writes the bytes of each kind of collective, of whole tensors before they are cut or after. Sums of single numbers, such
as losses, are left out.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipe.config.command_line import load_config
from recipe.data.blocks import split_into_micro_batches, to_tensors
from recipe.errors import run_command
from recipe.model.gpt2 import build_gpt2
from recipe.model.optimizer import build_optimizer
from recipe.model.sharding import prepare_model
from recipe.step.update import run_update
from tests.support.gradients import make_accelerator
from tests.support.runs import make_run

KINDS = {
    "_allgather_base_": "gathered",
    "_reduce_scatter_base_": "reduced to shares",
    "allreduce_": "reduced between hosts",
}
SMALL_BYTES = 256


class SentBytes(TorchDispatchMode):
    """Adds up the largest tensor of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its parts come by themselves
        if function.namespace == "c10d" and (kind := KINDS.get(function._schema.name.removeprefix("c10d::"))):
            size = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.sums[kind] += size if size > SMALL_BYTES else 0
        return function(*args, **(kwargs or {}))


def main() -> None:
    config = load_config(sys.argv[2:])
    accelerator = make_accelerator()
    run = make_run(config, accelerator)
    run.stop.connect(accelerator.num_processes)
    plan, vocabulary = run.plan.update, config.model.vocab_size - 47
    model = prepare_model(run, build_gpt2(config, vocabulary, 0)).train()
    optimizer = accelerator.prepare(build_optimizer(model, config.optimizer))
    blocks = np.random.randint(vocabulary, size=(len(plan.blocks_of_rank(run.rank)), plan.sequence_length + 1))
    micro_batches = split_into_micro_batches(to_tensors(blocks, run.device, model.document_start), plan, run.rank)
    with SentBytes() as tracker:
        run_update(run, model, optimizer, micro_batches)
    if run.is_main:
        Path(sys.argv[1]).write_text(json.dumps(tracker.sums), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
