"""Numbered pieces of work in processes that end with the one that started them, however that ends."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from recipe.errors import RecipeError

# Called while a piece is worked on, with how far it is.
Report = Callable[..., None]
Work = Callable[[int, Report], Any]
REPORT_SECONDS = 0.5


def available_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def do_all(
    work: Work, numbers: Sequence[int], processes: int, report: Callable[..., None]
) -> Iterator[tuple[int, Any]]:
    """(number, what `work` gives for it), in the order in which they are done; with one process, in this one.

    `report` is called with a number and how far it is. Neither it nor the caller is waited for while processes have work.

    Raises:
        RecipeError: what `work` raises, or a process that was killed.
    """
    processes = min(processes, len(numbers))
    if processes > 1:
        yield from _do_in_processes(work, list(numbers), processes, report)
        return
    for number in numbers:
        yield number, work(number, partial(report, number))


def _do_in_processes(
    work: Work, numbers: list[int], processes: int, report: Callable[..., None]
) -> Iterator[tuple[int, Any]]:
    # Not forked from this process, whose libraries have threads; nor an executor, whose processes outlive one that is killed.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([getattr(work, "func", work).__module__])
    workers: dict[Connection, Any] = {}
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
            _give(ours, process, numbers.pop(0))
        while workers:
            for connection in wait([*workers]):
                assert isinstance(connection, Connection)
                try:
                    kind, number, answer = connection.recv()
                except (EOFError, ConnectionError):
                    raise _has_died(workers[connection]) from None
                if kind == "error":
                    raise answer
                if kind == "report":
                    report(number, *answer)
                    continue
                if numbers:
                    _give(connection, workers[connection], numbers.pop(0))
                else:
                    del workers[connection]
                    connection.close()
                yield number, answer
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _give(connection: Connection, process: Any, number: int) -> None:
    try:
        connection.send(number)
    except ConnectionError:
        raise _has_died(process) from None


def _has_died(process: Any) -> RecipeError:
    process.join(10)
    code, how = process.exitcode or 0, f"ended with exit code {process.exitcode}"
    if code < 0:
        how = f"was killed by signal {-code}, perhaps for want of memory"
    less = "with less memory if --processes is less"
    return RecipeError(f"a process {how}; the same command goes on from here, {less}", exit_code=1)


def _serve(connection: Connection, work: Work) -> None:
    """What a process does: a number comes, and reports and the result go back, until there is nobody at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the other end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            number = connection.recv()
        except (EOFError, ConnectionError):
            return
        said = 0.0

        def report(*values: Any, number: int = number) -> None:
            nonlocal said
            if time.monotonic() - said >= REPORT_SECONDS:
                said = time.monotonic()
                connection.send(("report", number, values))

        try:
            connection.send(("done", number, work(number, report)))
        except RecipeError as error:
            connection.send(("error", number, error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
