"""The files of a preparation made by datatrove's executors, on a Slurm or a Ray cluster whose machines share the directories.

An executor runs in a process of its own: it prints, and may wait for ever for a task that was killed. The command looks at
what the tasks write.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from recipe.data.find import Say
from recipe.data.prepare_file import Preparation
from recipe.data.prepare_task import TELL_SECONDS, PrepareFiles, directory_of_tasks, note_of
from recipe.data.slurm import JobArray
from recipe.errors import RecipeError
from recipe.run.files import remove

# A task without a sign of life for so long is taken for dead. NFS may show what another machine has written as late as that.
SILENT_SECONDS = 60.0
END_SECONDS = 60.0  # that an executor may take to end
MOST_TASKS = 1000  # if nobody says how many; where Slurm's MaxArraySize is not set, a job array has 1,001 at most
_NEEDED, _OURS = ("partition", "time"), ("array", "job-name", "output", "error")  # of sbatch's arguments
_LOG = "executor.log"


@dataclass(frozen=True)
class Engine:
    """What does files in tasks.

    Args:
        executor: of datatrove.
        tasks: that the files are shared out over. None: one for each.
        sbatch: arguments of sbatch, as NAME=VALUE.
        say: is told where the tasks are, and when Slurm's queue changes.

    Raises:
        RecipeError: something is not installed, or not said.
    """

    executor: Literal["slurm", "ray"]
    tasks: int | None
    sbatch: Sequence[str]
    say: Say

    def __post_init__(self) -> None:
        if self.executor == "slurm":
            self._check_slurm()
        needed = ("datatrove", "ray") if self.executor == "ray" else ("datatrove",)
        if missing := [name for name in needed if find_spec(name) is None]:
            raise RecipeError(
                f"executor = {self.executor} needs {' and '.join(missing)}: pip install --editable '.[engine]'"
            )

    def _check_slurm(self) -> None:
        for argument in self.sbatch:
            if "=" not in argument or argument.startswith("-") or argument.partition("=")[0] in _OURS:
                raise RecipeError(
                    f"sbatch: {argument!r} is not NAME=VALUE, such as account=mine; {', '.join(_OURS)} are set already"
                )
        if missing := [name for name in _NEEDED if name not in self._arguments]:
            raise RecipeError(
                f"executor = slurm needs {' and '.join(missing)}: set both, as --sbatch partition=cpu time=4:00:00"
            )
        if shutil.which("sbatch") is None:
            raise RecipeError(
                "executor = slurm: this machine has no sbatch; run this on one from which jobs are submitted"
            )

    @property
    def _arguments(self) -> dict[str, str]:
        return {name: value for name, _, value in (argument.partition("=") for argument in self.sbatch)}

    def do_all(
        self, preparation: Preparation, numbers: Sequence[int], report: Callable[..., None]
    ) -> Iterator[tuple[int, Any]]:
        """(number, what `prepare_file` gives for it) as they are done; it ends when all tasks have ended.

        `report` is called with a number, and the tokens and shards of it that are done.

        Raises:
            RecipeError: what a task raises, one that has died, or a cluster that takes none.
        """
        if not numbers:
            return
        count, directory = min(len(numbers), self.tasks or MOST_TASKS), directory_of_tasks(preparation)
        remove(directory)
        directory.mkdir(0o700)  # what tasks are given may hold the passwords of addresses
        name = f"prepare-{blake2b(os.fsencode(directory.resolve()), digest_size=6).hexdigest()}"
        jobs = JobArray(name, self.say) if self.executor == "slurm" else None
        sbatch = {**self._arguments, "job-name": name} if jobs else {}
        with _executor(PrepareFiles(preparation, numbers), count, directory, sbatch) as process:
            self.say(f"tasks on {self.executor}: {count}, with logs in {directory}")
            tasks = {rank: _Task([*numbers[rank::count]], time.monotonic()) for rank in range(count)}
            while tasks:
                time.sleep(TELL_SECONDS)
                waiting = (
                    jobs.tasks() if jobs else {rank for rank in tasks if process.is_alive() and not tasks[rank].note}
                )
                for rank, task in [*tasks.items()]:
                    while task.files and (result := preparation.result(task.files[0])) is not None:
                        yield task.files.pop(0), result
                    is_waiting = waiting is None or rank in waiting
                    if task.files:
                        task.look(note_of(preparation, rank), is_waiting, report)
                    elif not is_waiting:
                        del tasks[rank]
            if not jobs:
                process.join(END_SECONDS)


@dataclass
class _Task:
    """What is known of a task: the files that it has to do, when it was alive, and its last note."""

    files: list[int]
    seen: float
    note: str = ""

    def look(self, path: Path, is_waiting: bool, report: Callable[..., None]) -> None:
        """Look at its note. `is_waiting`: it lives, even if it writes nothing.

        Raises:
            RecipeError: it has failed, or is taken for dead.
        """
        note = self.note
        with suppress(OSError):
            note = path.read_text("utf-8")
        if is_waiting or note != self.note:
            self.note, self.seen = note, time.monotonic()
        with suppress(ValueError):  # it is half written
            told = json.loads(note)
            if told["error"]:
                raise RecipeError(told["error"], exit_code=told["exit_code"])
            if told["report"] and told["report"][0] == self.files[0]:
                report(*told["report"])
        if time.monotonic() - self.seen > SILENT_SECONDS:
            raise RecipeError(
                f"task {path.stem} was killed, or has ended before its files were done: look at its log in {path.parent}; the "
                "same command goes on from here",
                exit_code=1,
            )


@contextmanager
def _executor(step: PrepareFiles, count: int, directory: Path, sbatch: dict[str, str]) -> Iterator[Any]:
    """The process of an executor that has given its tasks to the cluster. They end with it, and it with this one.

    Raises:
        RecipeError: the cluster does not take them.
    """
    log, context = directory / _LOG, get_context("spawn")
    log.touch()
    ours, theirs = context.Pipe()
    process = context.Process(target=_execute, args=(theirs, step, count, directory, sbatch), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            ours.recv()
        except EOFError:
            process.join(END_SECONDS)
            said = [f"exit code {process.exitcode}", *filter(str.strip, log.read_text("utf-8").splitlines())]
            reason = next((line for line in said if line.startswith("sbatch: error: ")), said[-1])
            raise RecipeError(f"{'Slurm' if sbatch else 'Ray'} takes no tasks: {reason}", exit_code=1) from None
        yield process
    finally:
        ours.close()
        process.join(END_SECONDS)
        process.kill()
        process.join()


def _execute(connection: Connection, step: PrepareFiles, count: int, directory: Path, sbatch: dict[str, str]) -> None:
    """What that process does."""
    os.setsid()  # a Ctrl-C is for the other end
    with (directory / _LOG).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from recipe.data import executors

    end = JobArray(sbatch["job-name"], print).cancel if sbatch else executors.leave_ray
    threading.Thread(target=_end_with_command, args=(connection, end), daemon=True).start()
    if sbatch:
        end()  # what a command has left that was killed together with its executor
        executors.submit_to_slurm(step, count, directory, sbatch)
        connection.send(None)
        threading.Event().wait()
    executors.join_ray()
    connection.send(None)
    executors.run_on_ray(step, count, directory)


def _end_with_command(connection: Connection, end: Callable[[], None]) -> None:
    with suppress(EOFError, OSError):
        connection.recv()
    end()
    os._exit(0)
