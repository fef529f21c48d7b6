"""The local files that names and patterns stand for, each once."""

import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from recipe.errors import RecipeError
from recipe.text import one_line

Identity = tuple[int, int | str]  # the same for all paths of a file


@dataclass(frozen=True)
class TextFiles:
    """Files and addresses, each once."""

    paths: list[str]
    left_out: str  # what else was found, the same files again and dead links, in one line; empty: nothing


def find_files(patterns: Sequence[str], setting: str) -> TextFiles:
    """The files that `patterns`, the value of `setting`, stand for; each is looked at once.

    Of several paths of a file it takes the one through the fewest links, of these the first by name.

    Raises:
        RecipeError: a pattern that no file matches.
    """
    files, again, dead = dict[str, Identity](), dict[str, str](), set[str]()
    for pattern in patterns:
        found = _paths_of(pattern, again)
        files |= {path: identity for path in found if path not in files and (identity := _identity_of_file(path))}
        others = [path for path in found if path not in files]
        dead |= {path for path in others if os.path.islink(path) and not os.path.exists(path)}
        if len(others) == len(found):
            raise RecipeError(f"{setting}: {_why_no_file(pattern, others)}")
    kept = dict[Identity, str]()
    for path, identity in files.items():
        if (other := kept.setdefault(identity, path)) != path:
            kept[identity] = min(path, other, key=_by_links)
    again |= {path: kept[identity] for path, identity in files.items() if path != kept[identity]}
    kinds = {"repetitions": [f"{path} is {again[path]}" for path in sorted(again)], "dead links": sorted(dead)}
    left_out = "; ".join(_listed(kind, paths) for kind, paths in kinds.items() if paths)
    return TextFiles([*kept.values()], f"{setting}: left out {left_out}" if left_out else "")


def _identity_of_file(path: str) -> Identity | None:
    """None: it is no file."""
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return (status.st_dev, status.st_ino or path) if stat.S_ISREG(status.st_mode) else None
    return None


def _by_links(path: str) -> tuple[int, str]:
    return sum(map(os.path.islink, (path, *map(str, Path(path).parents)))), path


def _why_no_file(pattern: str, others: Sequence[str]) -> str:
    if directory := next(filter(os.path.isdir, others), None):
        return f"{directory!r} is a directory: give its files, such as {os.path.join(directory, '*.txt')!r}"
    if link := next(filter(os.path.islink, others), None):
        return f"{link!r} is a link that leads nowhere"
    if pattern.startswith("[") and pattern.endswith("]"):
        return f"no file is called {pattern!r}: on the command line, give files one behind the other, without brackets"
    return f"no file matches {pattern!r} (looked from {Path.cwd()})"


def _listed(kind: str, paths: Sequence[str]) -> str:
    return f"{kind} ({len(paths):,}): {one_line(', '.join(paths[:3]))}{', ...' if len(paths) > 3 else ''}"


# ---- Patterns ------------------------------------------------------------------------------------------------------------


def _paths_of(pattern: str, again: dict[str, str]) -> list[str]:
    """Paths that `pattern` stands for, in no order, links that lead nowhere among them.

    Of its parts between slashes each that exists by that very name is a name. Any other is a pattern, as a shell has it; `**`
    is any directories below, also through links. A directory that is another again goes into `again`, with the other.
    """
    parts, found = Path(pattern).parts or (pattern,), iter([""])
    for part in (*parts, "*") if parts[-1] == "**" else parts:
        found = _in_each(found, part, again)
    return list(found)


def _in_each(directories: Iterable[str], part: str, again: dict[str, str]) -> Iterator[str]:
    for directory in directories:
        path = os.path.join(directory, part)
        if not glob.has_magic(part) or os.path.lexists(path):
            yield path
        elif part == "**":
            yield from _directories(directory, again)
        else:
            with suppress(OSError):  # no directory, or one that may not be read
                names = fnmatch.filter(os.listdir(directory or "."), part)
                yield from (os.path.join(directory, name) for name in names if part[0] == "." or name[0] != ".")


def _directories(top: str, again: dict[str, str]) -> Iterator[str]:
    """`top` and those below it, but for hidden ones. Each once, so that links that lead back come to an end: on the path with
    the fewest links, of several the first by name."""
    seen, todo = dict[tuple[int, int], str](), [(0, top)]
    while todo:
        links, directory = heappop(todo)
        with suppress(OSError):  # one that may not be read
            status = os.stat(directory or ".")
            first = seen.setdefault((status.st_dev, status.st_ino), directory)
            if first != directory:
                again[directory] = first or "."
                continue
            for entry in os.scandir(directory or "."):
                path, is_link = os.path.join(directory, entry.name), entry.is_symlink()
                if entry.name[0] != "." and (os.path.isdir(path) if is_link else entry.is_dir()):
                    heappush(todo, (links + is_link, path))
            yield directory
