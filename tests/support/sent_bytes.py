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

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipe.config.command_line import load_config
from recipe.errors import run_command
from tests.support.sharded_training import sharded_training

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
    run, _, _, update = sharded_training(load_config(sys.argv[2:]))
    with SentBytes() as tracker:
        update()
    if run.is_main:
        Path(sys.argv[1]).write_text(json.dumps(tracker.sums), encoding="utf-8")
    run.accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
