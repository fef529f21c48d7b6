"""One training in a process of its own, that does an update whenever it is asked to: `python -m benchmarks.worker`."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Where each training is: a function `NAME(setting, turns)` that trains until the process ends.
MODULES = {
    "ours": "benchmarks.ours",
    "accumulation": "benchmarks.ours",
    "costs": "benchmarks.ours",
    "matrix_products": "benchmarks.limit",
}
PEERS = "benchmarks.peers"


@dataclass(frozen=True)
class Setting:
    """What all trainings of a comparison have in common.

    Args:
        n_layer: transformer blocks.
        n_embd: width.
        n_head: attention heads.
        vocabulary: tokens, and rows of the tied embedding.
        sequence_length: tokens of a block.
        micro_batch_size: blocks in one forward and backward.
        steps: micro-batches of an update, over all ranks.
        threads: of the process.
        compile: whether to compile the model.
        nanogpt: path of nanoGPT's model.py.
    """

    n_layer: int = 6
    n_embd: int = 384
    n_head: int = 6
    vocabulary: int = 4096
    sequence_length: int = 256
    micro_batch_size: int = 8
    steps: int = 4
    threads: int = 1
    compile: bool = False
    nanogpt: str = ""

    @property
    def blocks(self) -> int:
        """Of an update."""
        return self.micro_batch_size * self.steps

    @property
    def tokens(self) -> int:
        """Of an update."""
        return self.blocks * self.sequence_length

    def block(self, number: int) -> np.ndarray:
        """Tokens of block `number` of the text that all train on, int32 [sequence_length + 1]."""
        generator = np.random.default_rng(number)
        return generator.integers(self.vocabulary, size=self.sequence_length + 1, dtype=np.int32)

    def as_argument(self) -> str:
        """For the command line of a worker."""
        return json.dumps(asdict(self))


class Turns:
    """The worker's end of its pipes. A training calls `tick` after each update, and is held there until its next turn.

    Args:
        answers: file descriptor that the answers go to.
    """

    def __init__(self, answers: int) -> None:
        self.facts: dict[str, Any] = {}
        self._answers = os.fdopen(answers, "w")
        self._began = time.perf_counter()

    def tick(self, **parts: Any) -> None:
        """Answer with the seconds of the turn, and of its parts; wait. Ends the process when nobody asks any more."""
        seconds = time.perf_counter() - self._began
        self.answer({"seconds": seconds, **parts, "facts": {**self.facts, "peak_memory_bytes": peak_memory_bytes()}})
        if not sys.stdin.readline():
            os._exit(0)
        self._began = time.perf_counter()

    def answer(self, values: dict[str, Any]) -> None:
        """One line of JSON."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def peak_memory_bytes() -> int:
    """Peak of this program's resident set. `ru_maxrss` would count the parent too, from which the process was forked."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import torch

    import recipe.run.ledger

    return recipe.run.ledger.peak_memory_bytes(torch.device("cpu"))


def main() -> None:
    """`NAME SETTING`: the training, and `Setting.as_argument`."""
    turns = Turns(os.dup(1))
    os.dup2(2, 1)  # whatever a library prints is no answer
    name, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    try:
        import torch

        torch.set_num_threads(setting.threads)
        getattr(importlib.import_module(MODULES.get(name, PEERS)), name)(setting, turns)
    except ImportError as error:
        turns.answer({"missing": str(error)})


if __name__ == "__main__":
    main()
