"""The directory of a run: locked, checked to be writable, and never written over."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from recipe.config.command_line import write_config
from recipe.errors import RecipeError
from recipe.run.environment import describe_environment
from recipe.run.ledger import EVENTS, LEDGER, read_updates
from recipe.run.run import Run
from recipe.run.trackers import TRACKER_DIRECTORIES

FORMAT = 3  # of a run directory and its checkpoints
_FILES_OF_A_RUN = (
    *("config.yaml", LEDGER, EVENTS, "summary.json", "final", "checkpoints", "report.html"),
    *TRACKER_DIRECTORIES,
)


def claim_run_directory(run: Run) -> None:
    """Make `run.directory`, check that it can be written before anything expensive is done for it, and lock it. On rank 0.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        RecipeError: it cannot be made or written, another process trains in it, or an earlier version has written it.
    """
    directory = run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.write_text("yes", encoding="utf-8")
        probe.unlink()
        run.lock = FileLock(directory / ".lock")
        run.lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"another process is training in run.directory = {str(directory)!r}: wait for it, or set --run.directory"
        ) from None
    except OSError as error:
        raise _cannot_write(run, error) from None
    if run.config.resume != "fresh":
        read_updates(directory)  # of an earlier version it is refused


def begin_run(run: Run, update: int, checkpoint: Path | None) -> None:
    """Make the directory this run's, which goes on after `update` updates, and start the trackers. Collective.

    Raises:
        RecipeError: the directory cannot be written.
    """
    previous = run.on_main(lambda: _make_room(run, update, checkpoint))
    if previous:
        run.console.say(f"what this run replaces is now in {previous}")
    run.ledger.event("start", update, **describe_environment(run.accelerator, run.precision), **run.kernels)
    if run.is_main:
        run.ledger.trackers.start(update)
    run.stop.prepared()


def _make_room(run: Run, update: int, checkpoint: Path | None) -> Path | None:
    """Cut the ledger back to a checkpoint of this directory, or move an earlier run out of the way.

    What this run replaces, an earlier run or checkpoints newer than where it goes on, moves to previous/N.

    Returns: the directory that it moved to, or None.
    Raises:
        RecipeError: the directory cannot be written.
    """
    directory = run.directory
    try:
        earlier = [directory / name for name in _FILES_OF_A_RUN if (directory / name).exists()]
        previous = None
        if checkpoint and checkpoint.parent.resolve() == (directory / "checkpoints").resolve():
            run.ledger.truncate(update)
            newest_first = list_checkpoints(directory / "checkpoints")  # newer ones would be taken for this run's
            earlier = newest_first[: [path.name for path in newest_first].index(checkpoint.name)]
        if earlier:
            taken = [int(path.name) for path in directory.glob("previous/*") if path.name.isdigit()]
            previous = directory / "previous" / str(max(taken, default=0) + 1)
            for path in earlier:
                target = previous / path.relative_to(directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        write_config(run.config, directory / "config.yaml")
    except OSError as error:
        raise _cannot_write(run, error) from None
    return previous


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A directory to fill, which appears as `final` at the end of the block, or not at all. It replaces an earlier one."""
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def list_checkpoints(root: Path) -> list[Path]:
    """`step-N` directories, the newest first; anything else in `root` is left alone."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _cannot_write(run: Run, error: OSError) -> RecipeError:
    return RecipeError(
        f"cannot write run.directory = {str(run.directory)!r}: {error.strerror or error}; set --run.directory"
    )
