"""What a task of an engine does: its share of the files of a preparation. It tells how far it is, and so that it lives."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from recipe.data.prepare_file import UNFINISHED, Preparation, prepare_file
from recipe.errors import RecipeError

TELL_SECONDS = 1.0


class PrepareFiles:
    """A step of a datatrove pipeline: of these files each task makes every so many-th."""

    def __init__(self, preparation: Preparation, numbers: Sequence[int]) -> None:
        self.preparation, self.numbers = preparation, numbers
        self.directory = os.getcwd()

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """`data` would be from a step before this one."""
        os.chdir(self.directory)  # paths may be relative
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with _telling(note_of(self.preparation, rank)) as tell:
            for number in self.numbers[rank::world_size]:
                if self.preparation.result(number) is None:  # Slurm may begin a task again
                    prepare_file(self.preparation, number, partial(tell, number))


def directory_of_tasks(preparation: Preparation) -> Path:
    """What tasks and executors write, beside the files."""
    return preparation.directory / UNFINISHED / "tasks"


def note_of(preparation: Preparation, rank: int) -> Path:
    """What a task has told, as JSON: `report` (file, its tokens, its shards), and `error` with `exit_code`, or null."""
    return directory_of_tasks(preparation) / f"{rank}.json"


@contextmanager
def _telling(path: Path) -> Iterator[Callable[..., None]]:
    """Yields what takes a report. A thread writes the last one every so often, so that no two notes are the same."""
    said: dict[str, Any] = {"report": None, "error": None, "exit_code": 0, "beats": 0}
    over = threading.Event()

    def write() -> None:
        said["beats"] += 1
        with suppress(OSError):
            path.write_text(json.dumps(said), encoding="utf-8")

    def keep_writing() -> None:
        while not over.wait(TELL_SECONDS):
            write()

    def tell(*report: Any) -> None:
        said["report"] = report

    write()
    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    try:
        yield tell
    except Exception as error:
        said["error"] = str(error) if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}"
        said["exit_code"] = getattr(error, "exit_code", 1)
        raise
    finally:
        over.set()
        thread.join()
        write()
