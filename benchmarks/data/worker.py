"""A process that reads when it is asked to, and waits without work: `python -m benchmarks.data.worker NAME JOB`, both ends."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.data.readers import Batch, Job
from benchmarks.reading import peak_memory_bytes, resident_bytes
from benchmarks.rounds import in_turn
from recipe.errors import RecipeError


class Worker:
    """The parent's end.

    Args:
        name: a function of `readers` or `experiments`.
        job: what it reads.
    """

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        command = [sys.executable, "-m", "benchmarks.data.worker", name, json.dumps(asdict(job))]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
        variables = {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        self._process = subprocess.Popen(command, env=os.environ | variables, **pipes)

    def ask(self, **arguments: Any) -> dict[str, Any]:
        """What the function gives, called once more; `missing` if what it needs is not there.

        Raises:
            RecipeError: it fails.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RecipeError(f"{self.name} ended with {self._process.wait()}:\n{self._log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def take_turns(jobs: Mapping[str, tuple[str, Job]], rounds: int, **arguments: Any) -> dict[str, Any]:
    """Let each job's process answer so many times, in another order each round; what is not installed has `missing`."""
    workers, answers = dict[str, Worker](), dict[str, Any]()
    try:
        for number in range(rounds):
            for name in in_turn(jobs, number):
                if "missing" in (found := answers.setdefault(name, {"rounds": []})):
                    continue
                if name not in workers:
                    workers[name] = Worker(*jobs[name])
                answer = workers[name].ask(**arguments)
                if "missing" in answer:
                    answers[name] = answer
                else:
                    found["rounds"].append(answer)
    finally:
        for worker in workers.values():
            worker.close()
    return {name: answers[name] for name in jobs}


def read(reader: Iterator[Batch], most_seconds: float = math.inf) -> dict[str, Any]:
    """Read until the reader's end, or about so long behind the first tensors: seconds to these and in all, memory.

    Processor time is that behind the first tensors.
    """
    tokens, ahead, first_tokens, base = 0, 0, 0, 0
    began = processor = first = 0.0
    for inputs, _, held in reader:
        ahead = held
        if not inputs.numel():  # imports are done
            base, began = resident_bytes(), time.perf_counter()
            continue
        tokens += inputs.numel()
        if not first:
            first, first_tokens, processor = time.perf_counter() - began, tokens + held, time.process_time()
        if time.perf_counter() - began - first > most_seconds:
            break
    return {
        "tokens": tokens,
        "read_tokens": tokens + ahead,
        "seconds": time.perf_counter() - began,
        "first_seconds": first,
        "first_read_tokens": first_tokens,
        "processor_seconds": time.process_time() - processor,
        "base_bytes": base,
        "peak_bytes": max(peak_memory_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    from benchmarks.data import experiments, readers

    name, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            if hasattr(readers, name):
                answer = read(getattr(readers, name)(job), **arguments)
            else:
                answer = getattr(experiments, name)(job, **arguments)
        except (ImportError, RecipeError) as error:
            answer = {"missing": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
