"""Trainings in processes of their own take turns, update by update, so that all see the same machine: both ends of the pipes.

A process is `python -m benchmarks.step.turns NAME SETTING`. It does an update when it is asked to, and waits without work.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil

from benchmarks.random_text import random_block
from benchmarks.reading import peak_memory_bytes
from benchmarks.rounds import in_turn
from recipe.errors import RecipeError

OURS = ("ours", "accumulation", "costs", "noise", "matrix_products")  # functions of `ours`; all others are of `peers`


@dataclass(frozen=True)
class Setting:
    """What all trainings of a comparison have in common.

    Args:
        vocab_size: tokens, and rows of the tied embedding.
        micro_batch_size: blocks in one forward and backward.
        steps: micro-batches of an update, over all ranks.
        threads: of the process.
        nanogpt: path of nanoGPT's model.py.
    """

    n_layer: int = 6
    n_embd: int = 384
    n_head: int = 6
    vocab_size: int = 4096
    sequence_length: int = 256
    micro_batch_size: int = 8
    steps: int = 4
    threads: int = 1
    compile: bool = False
    nanogpt: str = ""

    @property
    def shape(self) -> dict[str, int]:
        """By the names that all libraries have."""
        return {name: getattr(self, name) for name in ("n_layer", "n_embd", "n_head", "vocab_size")}

    @property
    def blocks(self) -> int:
        """Blocks of an update."""
        return self.micro_batch_size * self.steps

    @property
    def tokens(self) -> int:
        """Tokens of an update."""
        return self.blocks * self.sequence_length

    def block(self, number: int) -> np.ndarray:
        """Block `number` of the text that all train on, int64 [sequence_length + 1]."""
        return random_block(number, self.vocab_size, self.sequence_length).astype(np.int64)


class Turns:
    """The worker's end of its pipes. A training calls `tick` after each update, which returns when its next turn comes.

    Args:
        answers: file descriptor that the answers go to.
    """

    def __init__(self, answers: int) -> None:
        self.facts: dict[str, Any] = {}
        self._answers = os.fdopen(answers, "w")
        self._began = time.perf_counter()

    def tick(self, **parts: Any) -> None:
        """Answer with the seconds of the turn, and of its parts; wait. Ends the process if nobody asks any more."""
        seconds = time.perf_counter() - self._began
        self.answer({"seconds": seconds, **parts, "facts": {**self.facts, "peak_memory_bytes": peak_memory_bytes()}})
        if not sys.stdin.readline():
            os._exit(0)
        self._began = time.perf_counter()

    def answer(self, values: dict[str, Any]) -> None:
        """One line of JSON."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


class Worker:
    """The parent's end: a training that waits for its turns, in one process or in one for each rank.

    Args:
        name: a function of `ours` or of `peers`, called with (setting, turns), that trains until the process ends.
        setting: of the training.
        ranks: processes.
        variables: more of the environment.
    """

    def __init__(self, name: str, setting: Setting, ranks: int = 1, **variables: str) -> None:
        self.name, self.facts = name, dict[str, Any]()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the processes
        self._idle_since, self._cpu_then = 0.0, 0.0
        self._started = time.perf_counter()
        variables |= {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        variables["BENCHMARK_RUN"] = tempfile.mkdtemp(prefix="benchmark-step-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        command = [sys.executable, "-m", "benchmarks.step.turns", name, json.dumps(asdict(setting))]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
        self._processes: list[Any] = []
        for rank in range(ranks):
            of_rank = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            self._processes.append(subprocess.Popen(command, env=os.environ | variables | of_rank, **pipes))

    def first(self) -> float:
        """Seconds from the start of the process to the end of the first update.

        Raises:
            ImportError: the peer is not installed.
        """
        self._answer()
        return time.perf_counter() - self._started

    def turn(self) -> dict[str, Any]:
        """Let it do an update; of several ranks the slowest counts. Adds the share of a core that it used while waiting."""
        idle_seconds = max(time.perf_counter() - self._idle_since, 1e-3)
        idle_share = (self._cpu_seconds() - self._cpu_then) / idle_seconds
        for process in self._processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return {**self._answer(), "idle_share": idle_share}

    def close(self) -> None:
        """End it."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _answer(self) -> dict[str, Any]:
        answers = []
        for process in self._processes:
            line = process.stdout.readline()
            if not line:
                self._log.seek(0)
                raise RecipeError(f"{self.name} ended with {process.wait()}:\n{self._log.read()[-2000:]}")
            answers.append(json.loads(line))
            if "missing" in answers[-1]:
                raise ImportError(answers[-1]["missing"])
        self._idle_since, self._cpu_then = time.perf_counter(), self._cpu_seconds()
        slowest: dict[str, Any] = max(answers, key=lambda answer: answer["seconds"])
        peak_bytes = sum(answer["facts"]["peak_memory_bytes"] for answer in answers)
        self.facts = {**slowest.pop("facts"), "peak_memory_bytes": peak_bytes}
        return slowest

    def _cpu_seconds(self) -> float:
        times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        return sum(time.user + time.system for time in times)


def compare(starts: Mapping[str, Callable[[], Worker]], rounds: int) -> dict[str, Any]:
    """Start workers one after the other, and let them take `rounds` turns each, in another order each round.

    Returns: what was measured of each worker, why others are missing, and the load average before each round.
    """
    trainings: dict[str, dict[str, Any]] = {}
    missing, load = {}, []
    workers = {}
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    try:
        for name, start in starts.items():
            workers[name] = start()
            try:
                trainings[name] = {"first_update_seconds": workers[name].first()}
            except ImportError as error:
                missing[name] = str(error)
        for number in range(rounds):
            load.append(os.getloadavg()[0])
            for name in in_turn(trainings, number):
                answers[name].append(workers[name].turn())
    finally:
        for worker in workers.values():
            worker.close()
    for name, training in trainings.items():
        training["seconds"] = [answer["seconds"] for answer in answers[name]]
        training["parts"] = [answer["parts"] for answer in answers[name] if "parts" in answer]
        training["idle_share"] = max(answer["idle_share"] for answer in answers[name])
        training |= workers[name].facts
    return {"trainings": trainings, "missing": missing, "load": load}


def main() -> None:
    """A worker's process."""
    turns = Turns(os.dup(1))
    os.dup2(2, 1)  # what a library prints is no answer
    name, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    try:
        import torch

        torch.set_num_threads(setting.threads)
        module = importlib.import_module(f"benchmarks.step.{'ours' if name in OURS else 'peers'}")
        getattr(module, name)(setting, turns)
    except ImportError as error:
        turns.answer({"missing": str(error)})


if __name__ == "__main__":
    main()
