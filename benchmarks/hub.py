"""What it costs to train on text of the Hub: `HF_ENDPOINT=... python -m benchmarks.hub --dataset NAME`. Linux.

Every process begins with an empty HF_HOME. Where a server stands in for the Hub, `--counts URL` of it answers with the totals
since it began, `{"counts": N or {KIND: N, ...}, "bytes": N or {KIND: N, ...}}`: requests, and bytes of answers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from benchmarks.reading import Limits, Reading, read_in_a_process, watch
from benchmarks.results import command_line, table, write_result
from recipe.errors import RecipeError, run_command
from recipe.run.ledger import EVENTS, LEDGER, read_lines

# As little is computed as GPT-2's vocabulary allows, so that time is that of the text. Of the data's settings only the length
# of a block is not the default: a lane's first documents cost as much for a short block as for a long one.
TRAINED_LENGTH = 128
TINY = {
    **{"model.n_layer": 1, "model.n_embd": 16, "model.n_head": 1, "schedule.warmup_tokens": 0, "precision": "fp32"},
    **{"evaluation.sample_tokens": "null", "data.sequence_length": TRAINED_LENGTH},
}


@dataclass
class Counts:
    """Requests and bytes since the last look, of the server that `--counts` names; None without one."""

    url: str | None
    before: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.before = self._totals()

    def _totals(self) -> tuple[int, int]:
        if self.url is None:
            return 0, 0
        with urlopen(self.url) as answer:
            found = json.load(answer)
        requests, size = (
            sum(value.values()) if isinstance(value := found[name], dict) else value for name in ("counts", "bytes")
        )
        return requests, size

    def since(self) -> dict[str, int | None]:
        """`requests` and `bytes` since this was made."""
        if self.url is None:
            return {"requests": None, "bytes": None}
        return {n: now - then for n, now, then in zip(("requests", "bytes"), self._totals(), self.before, strict=True)}


@dataclass
class Progress:
    """When a run came how far, and what had been asked for until then, by looking at its ledger and at the server."""

    directory: Path
    updates: int
    counts: Counts
    began: float = field(default_factory=time.perf_counter)
    reached: dict[str, dict[str, Any]] = field(default_factory=dict)
    _asked: dict[str, Any] = field(default_factory=dict)
    _next_look: float = 0.0

    def is_complete(self) -> bool:
        """Look twice a second whether all updates are done."""
        seconds = time.perf_counter() - self.began
        if seconds >= self._next_look:
            self._next_look = seconds + 0.5
            if (now := self.counts.since()) != {name: self._asked.get(name) for name in now}:
                self._asked = {**now, "last_request_seconds": seconds}
            updates = {f"update {line['update']}" for line in read_lines(self.directory / LEDGER)}
            begun = {"begun" for line in read_lines(self.directory / EVENTS) if line["event"] == "start"}
            for what in sorted((updates | begun) - self.reached.keys()):
                self.reached[what] = {"seconds": seconds, **now, **self._asked}
        return f"update {self.updates}" in self.reached


def train(options: argparse.Namespace, ranks: int, directory: Path) -> dict[str, Any]:
    """The first updates of a training, in processes over gloo, which are then killed.

    Raises:
        RecipeError: it fails, or takes longer than `--most_minutes`.
    """
    settings = {
        **{**TINY, "data.dataset": options.dataset, "run.directory": directory / "run", "batch.lanes": options.lanes},
        **{"batch.tokens_per_update": options.lanes * TRAINED_LENGTH},
        **({"data.tokenizer": options.tokenizer} if options.tokenizer else {}),
    }
    command = [sys.executable, "recipe/train.py", *[word for n, v in settings.items() for word in (f"--{n}", str(v))]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    processes, threads = [], str(max(1, (os.cpu_count() or 1) // ranks))
    progress = Progress(directory / "run", options.updates, Counts(options.counts))
    with open(directory / "output.txt", "w+", encoding="utf-8") as output:
        for rank in range(ranks):
            its_own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            variables = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HOME": str(directory / "home"), **its_own}
            processes.append(subprocess.Popen(command, env=variables, stdout=output, stderr=output, text=True))
        peaks, killed = watch(processes, Limits(seconds=options.most_minutes * 60), progress.is_complete)
    if not progress.is_complete():
        words = (directory / "output.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RecipeError(f"training on {ranks} ranks: {killed or words}")
    # It trains on until it is killed.
    ledger = [line for line in read_lines(directory / "run" / LEDGER) if 0 < line["update"] <= options.updates]
    return {
        "ranks": ranks,
        "peak_bytes": peaks,
        "reached": progress.reached,
        "data_wait_seconds": [line["data_wait_seconds"] for line in ledger],
        "update_seconds": [line["update_seconds"] for line in ledger],
        "blocks_sha256": [line["blocks_sha256"] for line in ledger],
    }


def read(options: argparse.Namespace, reading: Reading, directory: Path) -> dict[str, Any]:
    """Read without a model."""
    its_own = {"run.directory": str(directory / "run"), "batch.lanes": options.lanes}
    reading = replace(reading, settings={"data.dataset": options.dataset, **reading.settings, **its_own})
    counts, limits = Counts(options.counts), Limits(seconds=options.most_minutes * 60)
    answer = read_in_a_process(reading, limits, HF_HOME=str(directory / "home"))
    return {"dataset": reading.settings["data.dataset"], **answer, **counts.since()}


def report(result: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    text = f"""Training on text of the Hub
{options.dataset}, {options.lanes} lanes, from an empty cache.
Seconds are from the start of the processes, or without a model from before the text is opened. `begun`: the text is open, the
validation set is read. The evaluation before update 1 runs while that is read; `its text`: until its last request.
"""
    if result["trainings"]:
        rows = [_training_row(training) for training in result["trainings"]]
        text += f"\n## A tiny model, {TRAINED_LENGTH} tokens of each lane for an update\n\n{table(rows)}"
    titles = {"first": "The default update, without a model", "burst": "All lanes, 1,024 documents of each at a time"}
    titles["growth"] = "One lane of whole files, 1,024 documents at a time"
    for name, title in titles.items():
        if found := result.get(name):
            asked = "".join(f", {what} {value}" for what, value in _asked(found).items())
            text += f"\n## {title}\n\n{found['dataset']}: peak {found['peak_bytes'] / 1e6:,.0f} MB{asked}.\n\n"
            text += found["refused"] + "\n" if "refused" in found else table(_some_updates(found))
    return text


def _training_row(training: Mapping[str, Any]) -> dict[str, str]:
    row = {"ranks": str(training["ranks"])}
    for what in ("begun", "update 1"):
        reached = training["reached"][what]
        row[f"{what}: s"] = f"{reached['seconds']:.0f}"
        row |= {f"{what}: {column}": value for column, value in _asked(reached).items()}
    if "last_request_seconds" in training["reached"]["update 1"]:
        row["its text: s"] = f"{training['reached']['update 1']['last_request_seconds']:.0f}"
    row["peak of each rank, MB"] = ", ".join(f"{peak / 1e6:,.0f}" for peak in training["peak_bytes"])
    return row


def _some_updates(found: Mapping[str, Any]) -> list[dict[str, str]]:
    last = len(found["seconds"]) - 1
    return [
        {"update": str(number + 1), "s": f"{seconds:.1f}", "resident set, MB": f"{size / 1e6:,.0f}"}
        for number, (seconds, size) in enumerate(zip(found["seconds"], found["resident_bytes"], strict=True))
        if number < 3 or number % 10 == 9 or number == last
    ]


def _asked(found: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for, if the server counts."""
    if found["requests"] is None:
        return {}
    return {"requests": f"{found['requests']:,}", "MB": f"{found['bytes'] / 1e6:,.0f}"}


def main() -> None:
    parser = command_line("hub", (__doc__ or "").replace("%", "%%"))
    parser.add_argument("--dataset", default="HuggingFaceFW/fineweb-edu:sample-10BT")
    parser.add_argument("--tokenizer", help="Hub name or directory (the default of data.tokenizer)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--updates", type=int, default=4, help="of a training")
    parser.add_argument(
        "--first", type=int, default=1, help="read so many updates of the default size, without a model"
    )
    parser.add_argument("--burst", type=int, default=0, help="read so many times 1,024 documents of every lane")
    parser.add_argument("--growth", type=int, default=0, help="read so many times 1,024 documents of one lane")
    parser.add_argument("--whole_files", help="dataset for --growth (that of --dataset)")
    parser.add_argument("--counts", help="address at a server that stands in for the Hub, which says what it was asked")
    parser.add_argument("--most_minutes", type=float, default=10.0, help="give up on what takes longer")
    options = parser.parse_args()
    result: dict[str, Any] = {"trainings": []}
    with tempfile.TemporaryDirectory() as root:
        for ranks in options.ranks:
            directory = Path(root, f"{ranks}-ranks")
            directory.mkdir()
            result["trainings"].append(train(options, ranks, directory))
            print(json.dumps(result["trainings"][-1]), flush=True)
        default = {"data.tokenizer": options.tokenizer} if options.tokenizer else {}
        # Without windows of blocks, which would read more documents than are counted.
        a_block = {"batch.tokens_per_update": options.lanes * 2048, "data.shuffle_blocks": 1}
        whole_files = {"data.dataset": options.whole_files or options.dataset}
        readings = {
            "first": Reading(default, options.first),
            "burst": Reading(a_block, options.burst, counts_documents=True),
            "growth": Reading({**a_block, **whole_files}, options.growth, lanes=1, counts_documents=True),
        }
        for name, reading in readings.items():
            if reading.updates:
                result[name] = read(options, reading, Path(root, name))
                print(json.dumps(result[name]), flush=True)
    write_result("hub", options, result, report(result, options))


if __name__ == "__main__":
    run_command(main)
