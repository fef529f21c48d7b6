"""The parent's end: trainings in processes of their own take turns, update by update, so that all see the same machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from benchmarks.worker import Setting
from recipe.errors import RecipeError

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_", "TORCHELASTIC_")


class MissingError(Exception):
    """A peer that is not installed; its text says what is missing."""


class Worker:
    """A training that waits for its turns, in one process or in one for each rank.

    Args:
        name: a function of a worker's module.
        setting: of the training.
        ranks: processes.
        variables: further ones of the environment.
    """

    def __init__(self, name: str, setting: Setting, ranks: int = 1, **variables: str) -> None:
        self.name, self.setting, self.facts = name, setting, dict[str, Any]()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the processes
        self._idle: tuple[float, float] | None = None
        self._started = time.perf_counter()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER)}
        environment |= {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", **variables}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", name, setting.as_argument()],
                env={**environment, **({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
            for rank in range(ranks)
        ]

    def first(self) -> float:
        """Seconds from the start of the process to the end of the first update.

        Raises:
            MissingError: the peer is not installed.
        """
        self._answer()
        return time.perf_counter() - self._started

    def turn(self) -> dict[str, Any]:
        """Let it do an update; of several ranks the slowest counts. Adds the share of a core that it used while waiting."""
        idle = self._idle_share()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return {**self._answer(), "idle_share": idle}

    def close(self) -> None:
        """End it."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _answer(self) -> dict[str, Any]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                self._log.seek(0)
                raise RecipeError(f"{self.name} ended with {process.wait()}:\n{self._log.read()[-2000:]}")
            answers.append(json.loads(line))
            if "missing" in answers[-1]:
                raise MissingError(answers[-1]["missing"])
        self._idle = (time.perf_counter(), self._cpu_seconds())
        slowest: dict[str, Any] = max(answers, key=lambda answer: answer["seconds"])
        peak_bytes = sum(answer["facts"]["peak_memory_bytes"] for answer in answers)
        self.facts = {**slowest.pop("facts"), "peak_memory_bytes": peak_bytes}
        return slowest

    def _idle_share(self) -> float:
        assert self._idle is not None
        seconds = time.perf_counter() - self._idle[0]
        return (self._cpu_seconds() - self._idle[1]) / max(seconds, 1e-3)

    def _cpu_seconds(self) -> float:
        times = [psutil.Process(process.pid).cpu_times() for process in self._processes]
        return sum(time.user + time.system for time in times)


def compare(starts: Mapping[str, Callable[[], Worker]], rounds: int, *, at_once: bool) -> dict[str, Any]:
    """Let workers take `rounds` turns each after their first update, in another order each round.

    Args:
        starts: start the workers; by the name that the result gives them. They are ended in the end.
        rounds: turns of each.
        at_once: start all at the same time, where the seconds to the first update do not matter.

    Returns: what was measured of each worker, why others are missing, and the load average before each round.
    """
    trainings: dict[str, dict[str, Any]] = {}
    missing, load = {}, []
    workers = {name: start() for name, start in starts.items()} if at_once else {}
    try:
        for name, start in starts.items():
            if not at_once:
                workers[name] = start()
            try:
                trainings[name] = {"first_update_seconds": workers[name].first()}
            except MissingError as error:
                missing[name] = str(error)
        answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        names = list(trainings)
        for number in range(rounds):
            load.append(os.getloadavg()[0])
            for name in rotated(names, number):
                answers[name].append(workers[name].turn())
        for name in names:
            trainings[name] |= {
                "seconds": [answer["seconds"] for answer in answers[name]],
                "parts": [answer["parts"] for answer in answers[name] if "parts" in answer],
                "idle_share": max(answer["idle_share"] for answer in answers[name]),
                **workers[name].facts,
            }
    finally:
        for worker in workers.values():
            worker.close()
    return {"trainings": trainings, "missing": missing, "load": load}


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names, beginning with another one."""
    by %= max(len(names), 1)
    return [*names[by:], *names[:by]]
