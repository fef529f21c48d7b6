"""The local files that names and patterns stand for."""

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from heapq import heappop, heappush
from pathlib import Path


def paths_of(pattern: str) -> list[str]:
    """Paths that `pattern` stands for, in no order, links that lead nowhere among them.

    Of its parts between slashes each that exists by that very name is a name. Any other is a pattern, as a shell has it; `**`
    is any directories below, also through links.
    """
    parts, found = Path(pattern).parts or (pattern,), iter([""])
    for part in (*parts, "*") if parts[-1:] == ("**",) else parts:
        found = _in_each(found, part)
    return list(found)


def _in_each(directories: Iterable[str], part: str) -> Iterator[str]:
    for directory in directories:
        path = os.path.join(directory, part)
        if not glob.has_magic(part) or os.path.lexists(path):
            yield path
        elif part == "**":
            yield from _directories(directory)
        else:
            with suppress(OSError):  # no directory, or one that may not be read
                names = fnmatch.filter(os.listdir(directory or "."), part)
                yield from (os.path.join(directory, name) for name in names if part[0] == "." or name[0] != ".")


def _directories(top: str) -> Iterator[str]:
    """`top` and those below it, but for hidden ones. Each once, so that links that lead back come to an end: on the path with
    the fewest links, of several the first by name."""
    seen, todo = set[tuple[int, int]](), [(0, top)]
    while todo:
        links, directory = heappop(todo)
        with suppress(OSError):
            status = os.stat(directory or ".")
            if (identity := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(identity)
            for entry in os.scandir(directory or "."):
                path, is_link = os.path.join(directory, entry.name), entry.is_symlink()
                if entry.name[0] != "." and (os.path.isdir(path) if is_link else entry.is_dir()):
                    heappush(todo, (links + is_link, path))
            yield directory
