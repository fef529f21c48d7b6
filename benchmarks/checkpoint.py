"""What a checkpoint costs, against three peers and the machine's limits in one run: `python -m benchmarks.checkpoint`."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.measure import circumstances, ratio, spread, table, write_result
from benchmarks.savers import Accelerate, HuggingFaceTrainer, Ours, TorchAsync, Training, Way
from recipe.run.environment import describe_machine

FULL = ["--config", "configs/gpt2-124m.yaml", "--precision", "fp32"]
QUICK = ["--config", "configs/quickstart.yaml", "--model.n_layer", "2", "--model.n_embd", "64", "--model.n_head", "2"]
UPDATE_TOKENS = 128  # of the updates during which a checkpoint is written: one short block each
SYNCHRONOUS = "this recipe, waited for"
BOTH = "this recipe, with what the writer takes from the updates beside it"
MEMORY, DISK = "limit: copy those bytes in memory", "limit: write and sync those bytes"


class Watch(threading.Thread):
    """Looks every two milliseconds which files there are under a checkpoint's final name while it is being written."""

    def __init__(self, final: Path) -> None:
        super().__init__(daemon=True)
        self.final, self.seen, self._is_over = final, set[tuple[tuple[str, int], ...]](), threading.Event()
        self.start()

    def run(self) -> None:
        """Until `was_half` is asked."""
        while not self._is_over.wait(0.002):
            if self.final.is_dir():
                self.seen.add(_files(self.final))

    def was_half(self) -> bool:
        """Whether anything else was seen there than what is there now."""
        self._is_over.set()
        self.join()
        return bool(self.seen - {_files(self.final)})


def measure(arguments: list[str], rounds: int, root: Path) -> dict[str, Any]:
    """Save one training in every way in turn and bring it back, in `rounds` rounds after a first one that is kept apart.

    Returns: seconds of each round (what -> way -> values), those of the first round, and facts that are no times.
    """
    (root / "ours").mkdir()
    training = Training(arguments, root / "ours")
    machine = describe_machine(training.accelerator, "fp32", None)
    ours = Ours(training, root)
    ways: list[Way] = [ours, Accelerate(training, root), HuggingFaceTrainer(training, root), TorchAsync(training, root)]
    state_bytes = sum(tensor.nbytes for tensor in training.tensors())
    source, target = torch.ones(state_bytes // 4), torch.ones(state_bytes // 4)
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    facts: dict[str, dict[str, Any]] = {}
    load = []
    for number in range(1, rounds + 2):
        load.append(os.getloadavg()[0])
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            path = way.path(number)
            watch = Watch(path)
            stall, written = way.save(number)
            was_half = watch.was_half() or facts.get(way.name, {}).get("was_half", False)
            sync = _timed(partial(_sync, path))
            seconds["stall"][way.name].append(stall)
            seconds["durable"][way.name].append(written + sync)
            saved = training.fingerprint()
            training.forget()
            seconds["resume"][way.name].append(way.load(number))
            assert training.fingerprint() == saved, f"{way.name} brought back something else"
            facts[way.name] = {**_describe(path), "was_half": was_half, "sync_seconds_left": sync}
            shutil.rmtree(path)
        seconds["stall"][SYNCHRONOUS].append(seconds["durable"][ours.name][-1])
        seconds["stall"][MEMORY].append(_timed(partial(target.copy_, source)))
        seconds["durable"][DISK].append(_timed(partial(_write, root / "bytes", source)))

        alone = [training.train(1, UPDATE_TOKENS) for _ in range(3)]
        stall, path = ours.begin(number + rounds + 1), ours.path(number + rounds + 1)
        beside = [training.train(1, UPDATE_TOKENS)]
        while not path.is_dir() and len(beside) < 1000:
            beside.append(training.train(1, UPDATE_TOKENS))
        ours.saver.finish()
        shutil.rmtree(path)
        alone += [training.train(1, UPDATE_TOKENS) for _ in range(3)]
        seconds["update"]["alone"].append(median(alone))
        seconds["update"]["while a checkpoint is written"].append(median(beside))
        seconds["stall"][BOTH].append(stall + sum(beside) - len(beside) * median(alone))
        print(f"round {number - 1} of {rounds} done", flush=True)
    first = {what: {way: values.pop(0) for way, values in ways.items()} for what, ways in seconds.items()}
    return {
        "machine": machine,
        "state_bytes": state_bytes,
        "load": load,
        "seconds": seconds,
        "seconds_of_the_first_round": first,
        "facts": facts,
    }


def report(result: dict[str, Any], shape: str, command: str) -> str:
    """The result as Markdown."""
    seconds, first = result["seconds"], result["seconds_of_the_first_round"]["stall"]

    def compared(what: str) -> str:
        ways = sorted(
            seconds[what].items(), key=lambda way: (way[0] != Ours.name, way[0][:5] == "limit", median(way[1]))
        )
        rows = [[name, ratio(values, seconds[what][Ours.name]), spread(values)] for name, values in ways]
        return table(["", "ratio to this recipe", "seconds"], rows)

    slower = ratio(seconds["update"]["while a checkpoint is written"], seconds["update"]["alone"])
    described = [
        [
            name,
            f"{fact['bytes'] / 1e9:.3f} GB",
            ", ".join(fact["pickles"]) or "none",
            "yes" if fact["was_half"] else "not seen",
            f"{fact['sync_seconds_left']:.3f}",
        ]
        for name, fact in result["facts"].items()
    ]
    return f"""# What a checkpoint costs ({result["machine"]["time_utc"][:10]})

`{command}` at {circumstances(result["machine"])}.
Load average before a round, this command's own included: {spread(result["load"])}.

{shape}: {result["state_bytes"] / 1e9:.3f} GB of fp32 weights and AdamW moments, one model and one optimizer for all.
Medians (smallest..largest) of {len(seconds["update"]["alone"])} rounds; a first one is left out. The ways take turns in
every round, and ratios are taken within a round. In every round every way brought back the same bits.

## Training stands still

{compared("stall")}
Beside the copy of the state, this recipe's stall holds the loss that a resume is proved with. In the first round, where
its memory was new to the process, it was {first[Ours.name]:.2f} s, accelerate's {first[Accelerate.name]:.2f} s, \
Trainer's {first[HuggingFaceTrainer.name]:.2f} s.
While a checkpoint is written, an update of {UPDATE_TOKENS} tokens on the same cores takes {slower} times as long.

## From the start of a save until it is on the disk

{compared("durable")}
With an fsync of every file after the save has returned. This recipe has by then synced and hashed every file itself.

## Resume

From a model just built until the next update can begin, with the files in the page cache. This recipe verifies the hash of
every file, reads the last update's blocks again and proves the loss. The others do nothing like it.

{compared("resume")}
## What is there

{table(["", "size", "pickles", "half written under its final name", "seconds of fsync left"], described)}
Half written: looked at every 2 ms, the files under the checkpoint's final name were others or shorter than at the end; a
process killed then leaves them so.
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to see that it works")
    parser.add_argument("--rounds", type=int, help="how often each way saves and resumes (7; with --quick 1)")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="directory of the result")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 7)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs", prefix="benchmark-") as root:  # on the disk that runs are on
        result = measure(QUICK if options.quick else FULL, rounds, Path(root).resolve())
    command = "python -m benchmarks.checkpoint" + " --quick" * options.quick + f" --rounds {rounds}"
    shape = "A tiny shape" if options.quick else "`configs/gpt2-124m.yaml`"
    text = report(result, shape, command)
    write_result(options.out / f"{result['machine']['time_utc'][:10]}-checkpoint", text, {"command": command, **result})
    print(text)


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _write(path: Path, values: torch.Tensor) -> None:
    with path.open("wb") as file:
        file.write(values.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    for path in [*(path for path in directory.rglob("*") if path.is_file()), directory]:
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
    main()
