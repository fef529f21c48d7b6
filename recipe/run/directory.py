"""The directory of a run: locked, checked to be writable, and never written over."""

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from recipe.config.command_line import write_config
from recipe.errors import RecipeError
from recipe.run.environment import describe_environment, hosts_of
from recipe.run.files import (
    LOCK,
    is_place,
    missing_abilities,
    move,
    move_aside,
    new_file,
    open_to_append,
    remove_leftovers,
)
from recipe.run.ledger import EVENTS, LEDGER, read_updates
from recipe.run.run import Run
from recipe.run.trackers import TRACKER_DIRECTORIES

FORMAT = 3  # of a run directory and its checkpoints
# What makes up a run. Checkpoints are moved aside first: those without a ledger would be gone on from, not the other way round.
_DIRECTORIES = ("checkpoints", "final", *TRACKER_DIRECTORIES)
_FILES = ("config.yaml", LEDGER, EVENTS, "summary.json", "report.html")
_WITHOUT = {
    "fsync": "a power cut can cost the newest checkpoint",
    "chmod": "files keep the permissions that they are made with",
    "rename of directories": "a checkpoint appears file by file, and counts once it is whole",
    "locks": "nothing keeps a second training out of it",
}


def claim_run_directory(run: Run) -> None:
    """Make `run.directory`, check what is written there before anything expensive is done for it, and lock it. On rank 0.

    The lock is the operating system's: it ends with the process, however that ends. What the file system cannot do is said,
    and done without.

    Raises:
        RecipeError: it cannot be made or written, another process trains in it, or an earlier version has written it.
    """
    directory = run.directory
    missing: dict[str, Path] = {}
    try:
        _check_directory(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _check_places(directory)
        checkpoints, final = directory / "checkpoints", directory / "final"
        run.lock = [_lock(place, run) for place in (directory, checkpoints) if place == directory or is_place(place)]
        if None in run.lock:
            missing["locks"] = directory
        for place in filter(Path.is_dir, (directory, checkpoints, final)):
            remove_leftovers(place)
            for name in missing_abilities(place):
                missing.setdefault(name, place)
    except OSError as error:
        raise _cannot_write(run, error) from None
    for name, place in missing.items():
        run.console.say(f"the file system of {place} has no {name}: {_WITHOUT[name]}")
    if run.config.resume != "fresh":
        read_updates(directory)  # of an earlier version it is refused


def _check_places(directory: Path) -> None:
    """Refuse what would be written through a link, or never: of a run only whole directories may be elsewhere.

    Raises:
        RecipeError: a file is a link or no file, or a directory is none.
    """
    for name in (*_DIRECTORIES, "previous"):
        _check_directory(directory / name)
    for path in (directory / name for name in (*_FILES, LOCK)):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            what = f"a link to {os.readlink(path)}" if path.is_symlink() else "no file"
            raise RecipeError(
                f"{path} is {what}: put the file itself there, or remove it; links may be the run directory, and checkpoints, "
                "final and previous in it"
            )


def _check_directory(path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        what = f"is a link to {os.readlink(path)}, which is" if path.is_symlink() else "is"
        raise RecipeError(f"{path} {what} no directory: make it one, or remove it")


def lock(place: Path, taken: str) -> IO[str] | None:
    """Lock a directory until the process ends, or the file is closed; None where there are no locks.

    Raises:
        RecipeError: another process has locked it, which `taken` says.
    """
    file = open_to_append(place / LOCK)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return None
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):  # but ENOLCK, EOPNOTSUPP, ENOSYS
            return None
        raise RecipeError(taken) from None
    return file


def _lock(place: Path, run: Run) -> IO[str] | None:
    """Lock the run directory, or the one that its checkpoints lead to; see `lock`."""
    where = "" if place == run.directory else f", whose {place.name} lead to {place.resolve()}"
    return lock(
        place,
        f"another process is training in run.directory = {str(run.directory)!r}{where}: wait for it, or set --run.directory",
    )


def begin_run(run: Run, update: int, checkpoint: Path | None) -> None:
    """Make the directory this run's, which goes on after `update` updates, and start the trackers. Collective.

    Raises:
        RecipeError: the directory cannot be written.
    """
    previous = run.on_main(lambda: _make_room(run, update, checkpoint))
    if previous:
        run.console.say(f"what this run replaces is now in {' and '.join(map(str, previous))}")
    machine = describe_environment(run.accelerator, run.precision) | {"hosts": hosts_of(run.accelerator)}
    run.ledger.event("start", update, **machine, **run.kernels, text=run.text)
    if run.is_main:
        run.ledger.trackers.start(update)
    run.stop.prepared()


def _make_room(run: Run, update: int, checkpoint: Path | None) -> list[Path]:
    """Cut the ledger back to a checkpoint of this directory, or move an earlier run out of the way.

    What this run replaces, an earlier run, or checkpoints newer than where it goes on and an earlier end, moves to
    previous/N. The ledger is cut last, when nothing else can fail; what was moved before a failure moves back.

    Returns: the directories that it moved to.
    Raises:
        RecipeError: the directory cannot be written, and is as it was.
    """
    directory = run.directory
    newest_first = list_checkpoints(directory / "checkpoints")
    is_own = checkpoint in newest_first
    earlier = [directory / name for name in (*_DIRECTORIES, *_FILES)]
    if checkpoint and is_own:  # newer ones would be taken for this run's
        earlier = [*newest_first[: newest_first.index(checkpoint)], directory / "final", directory / "summary.json"]
    taken = [path.name for place in ("", *_DIRECTORIES) for path in (directory / place).glob("previous/*")]
    number = max((int(name) for name in taken if name.isdigit()), default=0) + 1
    moved: list[tuple[Path, Path]] = []
    try:
        for path in filter(os.path.lexists, earlier):
            moved.extend(move_aside(path, directory, number))
        if moved and is_own:  # with the lines that will be cut
            for path in filter(Path.exists, (directory / LEDGER, directory / EVENTS)):
                copy = directory / "previous" / str(number) / path.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                moved.append((path, copy))
        with new_file(directory / "config.yaml") as file:
            write_config(run.config, file)
        if is_own:
            run.ledger.truncate(update)
    except OSError as error:
        for old, new in reversed(moved):
            with suppress(OSError):
                move(new, old)
        raise _cannot_write(run, error) from None
    return sorted({next(p for p in new.parents if p.parent.name == "previous") for _, new in moved})


def list_checkpoints(root: Path) -> list[Path]:
    """`step-N` directories, the newest first; anything else in `root` is left alone."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _cannot_write(run: Run, error: OSError) -> RecipeError:
    where = f" ({error.filename})" if error.filename else ""
    return RecipeError(
        f"cannot write run.directory = {str(run.directory)!r}: {error.strerror or error}{where}; set --run.directory"
    )
