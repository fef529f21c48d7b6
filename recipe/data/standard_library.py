"""The files of Python's own standard library: real text on every machine."""

import os
import sysconfig
from pathlib import Path

from recipe.config.settings import STANDARD_LIBRARY_VALIDATION_ONE_IN
from recipe.data.documents import hash_number

_NOT_TRAINED_ON = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library_files() -> tuple[Path, list[Path]]:
    """(directory, sorted relative paths) of the running interpreter's `.py` files, without its tests."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), list[Path]()
    for directory, folders, names in os.walk(root):
        folders[:] = set(folders) - _NOT_TRAINED_ON  # os.walk goes into these alone: site-packages is large
        paths = (Path(directory, name) for name in names if name.endswith(".py"))
        files += [path.relative_to(root) for path in paths if path.is_file()]
    return root, sorted(files)


def split_standard_library() -> tuple[list[str], list[str]]:
    """Paths of its files to train on, and of those held out."""
    root, files = standard_library_files()
    held_out = {f for f in files if hash_number(f.as_posix().encode()) % STANDARD_LIBRARY_VALIDATION_ONE_IN == 0}
    return [str(root / f) for f in files if f not in held_out], [str(root / f) for f in files if f in held_out]
