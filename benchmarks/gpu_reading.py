"""What a GPU loses to the reader beside it: `python -m benchmarks.gpu_reading`. Needs no network.

gpt2-124m, the preset that takes the most tokens a second, trains on blocks that were read before, on token ids from files, and
on text that is tokenized meanwhile; they take turns on one compiled model. What is slower than the first is the reader's doing.
"""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.data.corpus import tokenizer_of, write_text, write_tokens
from benchmarks.data.experiments import GPU_TOKENS_PER_SECOND
from benchmarks.data.readers import Job, settings_of
from benchmarks.gpu.machine import describe_machine
from benchmarks.reading import open_lanes
from benchmarks.results import command_line, ratio, spread, table, write_result
from benchmarks.rounds import in_turn
from benchmarks.text_memory import gpt2_tokenizer
from benchmarks.training import RandomLane, Training, read_preset, with_settings
from recipe.data.blocks import UpdateReader
from recipe.errors import run_command

PRESET = "configs/gpt2-124m.yaml"
VOCABULARY = 50_257  # GPT-2's
HELD = "blocks read before"
FIRST_UPDATES = 3  # of a turn, which still use what was read ahead of it
SMALL = {
    "model": {"n_layer": 2, "n_embd": 64, "n_head": 2},
    "data.sequence_length": 128,
    "batch": {"tokens_per_update": 16 * 128, "lanes": 4, "micro_batch_size": 4},
    "performance.compile": False,
}


class HeldLane(RandomLane):
    """Gives the same blocks again and again, which cost nothing to read."""

    @cache  # noqa: B019, the lanes live as long as the process
    def next_blocks(self, count: int) -> np.ndarray:
        """int32 [count, sequence_length + 1]"""
        return super().next_blocks(count)


def measure(options: Namespace, root: Path) -> dict[str, Any]:
    """Seconds of each update, of which it waited for blocks, by source and round."""
    small, megabytes = (SMALL, 2.0) if options.quick else ({}, options.megabytes)
    tokenizer = tokenizer_of(Path(gpt2_tokenizer(root / "tokenizer")))
    write_text(root / "text", megabytes * 1e6)
    write_tokens(root / "tokens", megabytes * 1e6, tokenizer)
    settings = {"run.directory": str(root / "run"), "schedule.total_tokens": 10**12, **small}
    training = Training(read_preset(PRESET, settings), VOCABULARY)
    plan = training.run.plan.update
    job = Job(
        str(root), lanes=plan.lanes, blocks=plan.tokens_per_update // plan.sequence_length, length=plan.sequence_length
    )

    def lanes_of(source: str) -> Any:
        run = copy.copy(training.run)
        run.config = with_settings(run.config, settings_of(job, source))
        return open_lanes(run)

    held = [HeldLane(lane.index, plan.lanes, lane._block) for lane in training.make_lanes()]
    sources: dict[str, Callable[[], Any]] = {HELD: lambda: held}
    for source, name in {"flat": "a flat file of ids", "parquet": "Parquet of ids", "text": "text"}.items():
        sources[name] = partial(lanes_of, source)
    found: dict[str, Any] = {name: {"update_seconds": [], "data_wait_seconds": []} for name in sources}
    for number in range(options.rounds):
        for name in in_turn(sources, number):
            training.reader = UpdateReader(training.run, sources[name]())
            entries = [training.update()[1] for _ in range(FIRST_UPDATES + options.updates)][FIRST_UPDATES:]
            training.reader.close()
            for column, rows in found[name].items():
                rows.append([getattr(entry, column) for entry in entries])
    return {
        "machine": describe_machine(training.run),
        "tokens_per_update": plan.tokens_per_update,
        "lanes": plan.lanes,
        "sources": found,
    }


def report(result: Mapping[str, Any]) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    machine, tokens, rows = result["machine"], result["tokens_per_update"], []
    reference = [median(seconds) for seconds in result["sources"][HELD]["update_seconds"]]
    for name, found in result["sources"].items():
        seconds = [median(turn) for turn in found["update_seconds"]]
        waited = [
            100 * sum(w) / sum(u) for w, u in zip(found["data_wait_seconds"], found["update_seconds"], strict=True)
        ]
        rows.append(
            {
                "": name,
                "ms an update": spread([1e3 * value for value in seconds]),
                "thousand tokens/s": spread([tokens / value / 1e3 for value in seconds]),
                "seconds over the first row's": ratio(seconds, reference),
                "waited, % of the time": spread(waited),
            }
        )
    count = len(result["sources"][HELD]["update_seconds"][0])
    return f"""A GPU beside the reader
{machine["device"]}, {machine["cpu_cores"]} cores. `{PRESET}`: updates of {tokens:,} tokens from {result["lanes"]} lanes.
{count} updates of each turn, behind {FIRST_UPDATES} others; medians of a turn, and their median (smallest..largest) over turns.
One H100 takes {GPU_TOKENS_PER_SECOND:,} tokens/s of `gpt2-1.3b`: a share of what is read here.

{table(rows)}"""


def main() -> None:
    parser = command_line("gpu_reading", __doc__)
    parser.add_argument("--megabytes", type=float, default=60.0, help="of text")
    parser.add_argument("--updates", type=int, default=15, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        options.updates, options.rounds = 3, 1
    with tempfile.TemporaryDirectory(prefix="benchmark-gpu-reading-") as root:
        result = measure(options, Path(root))
    write_result("gpu_reading", options, result, report(result))


if __name__ == "__main__":
    run_command(main)
