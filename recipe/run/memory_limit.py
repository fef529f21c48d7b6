"""The micro-batch that memory leaves room for, kept for the next start: ranks of a sharded run cannot agree on one.

Each forward waits for all ranks, so one that has run out of memory cannot tell the others, and ends. The launcher ends them.
"""

import json
from typing import Any

from recipe.run.files import new_file
from recipe.run.run import Run

FILE = "micro_batch.json"


def halve_for_next_start(run: Run, size: int) -> int:
    """Write that micro-batches of `size` blocks did not fit; what the next start takes, one at least."""
    smaller = max(1, size // 2)
    with new_file(run.directory / FILE) as file:
        file.write_text(json.dumps({**_division(run), "fits": smaller}) + "\n", encoding="utf-8")
    return smaller


def known_limit(run: Run) -> int | None:
    """What an earlier start has found to fit on as many ranks, from the same setting; None if none has. On rank 0."""
    try:
        found = json.loads((run.directory / FILE).read_text(encoding="utf-8"))
        return int(found["fits"]) if {name: found[name] for name in _division(run)} == _division(run) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _division(run: Run) -> dict[str, Any]:
    performance, batch = run.config.performance, run.config.batch
    return {
        "ranks": run.accelerator.num_processes,
        "batch.micro_batch_size": batch.micro_batch_size,
        "performance.sharding": performance.sharding,
        "performance.activation_checkpointing": performance.activation_checkpointing,
    }
