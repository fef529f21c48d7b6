"""What a checkpoint costs, against three peers and the machine's limits in one run: `python -m benchmarks.checkpoint`."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.results import command_line, ratio, spread, table, timed, write_result
from benchmarks.rounds import in_turn
from benchmarks.savers import UPDATE_TOKENS, Accelerate, HuggingFaceTrainer, Ours, SavedTraining, TorchAsync
from recipe.errors import run_command

FULL = ("configs/gpt2-124m.yaml", dict[str, Any]())
QUICK = ("benchmarks/plain.yaml", {"model.n_layer": 2, "model.n_embd": 64, "model.n_head": 2})
SYNCHRONOUS = "this recipe, waited for"
BOTH = "this recipe, with what the writer takes from the updates beside it"
MEMORY, DISK = "limit: copy those bytes in memory", "limit: write and sync those bytes"


@contextmanager
def watched(final: Path) -> Iterator[set[tuple[tuple[str, int], ...]]]:
    """Look every two milliseconds, and collect which files there were under a checkpoint's final name."""
    seen, is_over = set(), threading.Event()

    def look() -> None:
        while not is_over.wait(0.002):
            if final.is_dir():
                seen.add(_files(final))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield seen
    is_over.set()
    thread.join()


def measure(training: SavedTraining, rounds: int, root: Path) -> dict[str, Any]:
    """Save one training in every way in turn and bring it back, in `rounds` rounds after a first one that is kept apart.

    Returns: seconds of each round (what -> way -> values), those of the first round, and facts that are no times.
    """
    ours = Ours(training, root)
    ways: list[Any] = [ours, *(way(training, root) for way in (Accelerate, HuggingFaceTrainer, TorchAsync))]
    state_bytes = sum(tensor.nbytes for tensor in training.tensors())
    source, target = torch.ones(state_bytes // 4), torch.ones(state_bytes // 4)
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    facts: dict[str, dict[str, Any]] = {}
    load = []
    for number in range(1, rounds + 2):
        load.append(os.getloadavg()[0])
        for way in in_turn(ways, number):
            path = way.path(number)
            with watched(path) as seen:
                stall, written = way.save(number)
            was_half = bool(seen - {_files(path)}) or facts.get(way.name, {}).get("was_half", False)
            sync = timed(partial(_sync, path))
            seconds["stall"][way.name].append(stall)
            seconds["durable"][way.name].append(written + sync)
            saved = training.fingerprint()
            training.forget()
            seconds["resume"][way.name].append(way.load(number))
            assert training.fingerprint() == saved, f"{way.name} brought back something else"
            facts[way.name] = {**_describe(path), "was_half": was_half, "sync_seconds_left": sync}
            shutil.rmtree(path)
        seconds["stall"][SYNCHRONOUS].append(seconds["durable"][ours.name][-1])
        seconds["stall"][MEMORY].append(timed(partial(target.copy_, source)))
        seconds["durable"][DISK].append(timed(partial(_write, root / "bytes", source)))

        alone = [timed(training.update) for _ in range(3)]
        stall, path = ours.begin(number + rounds + 1), ours.path(number + rounds + 1)
        beside = [timed(training.update)]
        while not path.is_dir() and len(beside) < 1000:
            beside.append(timed(training.update))
        ours.saver.finish()
        shutil.rmtree(path)
        alone += [timed(training.update) for _ in range(3)]
        seconds["update"]["alone"].append(median(alone))
        seconds["update"]["while a checkpoint is written"].append(median(beside))
        seconds["stall"][BOTH].append(stall + sum(beside) - len(beside) * median(alone))
        print(f"round {number - 1} of {rounds} done", flush=True)
    first = {what: {way: values.pop(0) for way, values in ways.items()} for what, ways in seconds.items()}
    return {
        "state_bytes": state_bytes,
        "load": load,
        "seconds": seconds,
        "seconds_of_the_first_round": first,
        "facts": facts,
    }


def report(result: dict[str, Any], shape: str) -> str:
    """Markdown, for `benchmarks.results.write_result`."""
    seconds, first = result["seconds"], result["seconds_of_the_first_round"]["stall"]

    def compared(what: str) -> str:
        ways, ours = seconds[what], seconds[what][Ours.name]
        order = sorted(ways, key=lambda way: (way != Ours.name, way.startswith("limit"), median(ways[way])))
        return table([{"": n, "ratio to this recipe": ratio(ways[n], ours), "seconds": spread(ways[n])} for n in order])

    slower = ratio(seconds["update"]["while a checkpoint is written"], seconds["update"]["alone"])
    described = [
        {
            "": name,
            "size": f"{fact['bytes'] / 1e9:.3f} GB",
            "pickles": ", ".join(fact["pickles"]) or "none",
            "half written under its final name": "yes" if fact["was_half"] else "not seen",
            "seconds of fsync left": f"{fact['sync_seconds_left']:.3f}",
        }
        for name, fact in result["facts"].items()
    ]
    return f"""What a checkpoint costs
Load average before a round, this command's own included: {spread(result["load"])}.

{shape}: {result["state_bytes"] / 1e9:.3f} GB of fp32 weights and AdamW moments, one model and one optimizer for all.
Medians (smallest..largest) of {len(seconds["update"]["alone"])} rounds; a first one is left out. The ways take turns in
every round, and ratios are taken within a round. In every round every way brought back the same bits.

## Training stands still

{compared("stall")}
Beside the copy of the state, this recipe's stall holds the loss that verifies a resume, and the ledger's line. In the first
round, whose memory was new to the process, it was {first[Ours.name]:.2f} s, accelerate's {first[Accelerate.name]:.2f} s, \
Trainer's {first[HuggingFaceTrainer.name]:.2f} s.
While a checkpoint is written, an update of {UPDATE_TOKENS} tokens on the same cores takes {slower} times as long.

## From the start of a save until it is on the disk

{compared("durable")}
With an fsync of every file after the save has returned. This recipe has by then synced and hashed every file itself.

## Resume

From a model just built until the next update can begin, with the files in the page cache. This recipe verifies the hash of
every file, reads the last update's blocks again and compares the loss. The others do nothing like it.

{compared("resume")}
## What is there

{table(described)}
Half written: looked at every 2 ms, the files under the checkpoint's final name were others or shorter than at the end; a
process killed then leaves them so.
"""


def main() -> None:
    parser = command_line("checkpoint", __doc__)
    parser.add_argument("--rounds", type=int, help="how often each way saves and resumes (7; with --quick 1)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs", prefix="benchmark-") as root:  # on the disk that runs are on
        directory = Path(root).resolve()
        preset, settings = QUICK if options.quick else FULL
        training = SavedTraining(preset, settings, directory)
        result = measure(training, options.rounds or (1 if options.quick else 7), directory)
    text = report(result, "A tiny shape" if options.quick else "`configs/gpt2-124m.yaml`")
    write_result("checkpoint", options, result, text)


def _write(path: Path, values: torch.Tensor) -> None:
    path.write_bytes(values.numpy().data)
    _sync(path)


def _sync(top: Path) -> None:
    for path in [*(path for path in top.rglob("*") if path.is_file()), top]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _files(directory: Path) -> tuple[tuple[str, int], ...]:
    found = []
    for path in sorted(directory.rglob("*")):
        with suppress(FileNotFoundError):  # renamed since it was listed
            found.append((path.name, path.stat().st_size))
    return tuple(found)


def _describe(directory: Path) -> dict[str, Any]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    pickles = [path.name for path in files if zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80"]
    return {"bytes": sum(path.stat().st_size for path in files), "pickles": pickles}


if __name__ == "__main__":
    run_command(main)
