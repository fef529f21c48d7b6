"""Whether a checkpoint is what was written: the hashes of its files are those of its manifest. Ranks share the work."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from recipe.checkpoint.files import MANIFEST, OPTIMIZER, STATE, WEIGHTS, optimizer_files, read_json, read_state
from recipe.run.directory import FORMAT
from recipe.run.files import sha256_of
from recipe.run.run import Run

# What reading a manifest that says something else than it should may raise
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def why_invalid(directory: Path, hashes: Mapping[str, str] | None = None) -> str | None:
    """None if every file is what the manifest says and the training state is one, else the reason.

    `hashes`: name -> SHA-256 of files that somebody has read already.
    """
    if not os.path.lexists(directory / MANIFEST):
        return "it has no manifest, so it was never finished"
    known = hashes or {}
    try:
        manifest = read_json(directory / MANIFEST)
        if reason := _why_not_whole(directory, manifest):
            return reason
        files = manifest["files"]
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
            found = pool.map(lambda name: known.get(name) or sha256_of(directory / name), files)
            for (name, expected), digest in zip(files.items(), found, strict=True):
                if digest != expected["sha256"]:
                    return f"{name} has changed since it was written"
        for name in (WEIGHTS, *(optimizer_files(manifest) or [OPTIMIZER]), STATE):
            if name not in files:
                return f"its manifest has no {name}"
    except _UNREADABLE as error:
        return f"its manifest cannot be read ({error})"
    try:
        read_state(directory)
    except (OSError, ValueError) as error:
        return f"its training state cannot be used ({error})"
    return None


def _why_not_whole(directory: Path, manifest: Any) -> str | None:
    """None if all files are there, in the sizes of the manifest."""
    if manifest["format"] != FORMAT:
        return f"its format is {manifest['format']!r:.50}, of another version of this recipe; this one reads {FORMAT}"
    for name, expected in manifest["files"].items():
        path, parts = directory / name, PurePath(name)
        if parts.is_absolute() or ".." in parts.parts or not name.isprintable():
            return f"its manifest names {name!r}, which is not in it"
        if not path.is_file():  # a pipe would be waited for
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
    return None


def hash_together(run: Run, directory: Path) -> dict[str, str]:
    """Name -> SHA-256 of a checkpoint's files, of which each rank reads some; those that could not be read are not there.

    Nothing if there is one rank, whose threads do it in `why_invalid`. Collective.
    """
    from accelerate.utils import gather_object

    if run.accelerator.num_processes == 1:
        return {}
    names = run.on_main(lambda: _names_by_size(directory))
    own = {}
    for name in names[run.rank :: run.accelerator.num_processes]:
        with suppress(OSError):
            own[name] = sha256_of(directory / name)
    return dict(gather_object([*own.items()]))


def _names_by_size(directory: Path) -> list[str]:
    """Its files, the largest first; none if it is not whole anyway."""
    try:
        manifest = read_json(directory / MANIFEST)
        files = manifest["files"]
        return [] if _why_not_whole(directory, manifest) else sorted(files, key=lambda name: -files[name]["bytes"])
    except _UNREADABLE:
        return []
