"""What tensors take at most in an update, on ranks that hold a model together:
`python -m tests.support.sharded_memory RESULT SETTINGS...`.

The profiler does not see what gloo's threads let go of, so tensors are looked at themselves, behind each operation. What gloo
copies is not among them. Rank 0 writes the bytes of the rank with most.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipe.config.command_line import load_config
from recipe.errors import run_command
from recipe.model.sharding import local
from tests.support.sharded_training import sharded_training


class LiveBytes(TorchDispatchMode):
    """The storages that are alive, and the most bytes that they had behind an operation."""

    def __init__(self, *there: Any) -> None:
        super().__init__()
        self.live: weakref.WeakSet[Any] = weakref.WeakSet()
        self.peak = 0
        self.add(there)

    def add(self, values: Any) -> None:
        """Those of the tensors in `values`, and what there is now."""
        tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
        self.live.update(local(tensor).untyped_storage() for tensor in tensors)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.live))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its parts come by themselves
        result = function(*args, **(kwargs or {}))
        self.add(result)
        return result


def main() -> None:
    run, model, optimizer, update = sharded_training(load_config(sys.argv[2:]))
    update()  # after which the optimizer has its state
    with LiveBytes(
        list(model.parameters()), [list(of.values()) for of in optimizer.optimizer.state.values()]
    ) as tracker:
        update()
    largest = int(run.accelerator.gather(torch.tensor([tracker.peak])).max())
    if run.is_main:
        Path(sys.argv[1]).write_text(str(largest), encoding="utf-8")
    run.accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
