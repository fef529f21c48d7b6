"""A record of the text that a run reads, kept in its checkpoints: a resumed run notices where its text is another."""

import base64
import json
import os
import re
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import urlsplit

from recipe.config.text_files import is_remote
from recipe.data.documents import reason_of
from recipe.data.files import File
from recipe.data.remote_files import RemoteFile
from recipe.errors import RecipeError

PIECE_BYTES = 1 << 16  # of the head and of the tail of a file; one of at most two pieces is hashed whole


class TextFile(NamedTuple):
    """A file, or all files of a commit of a Hub dataset."""

    name: str  # relative to the directory that all files share; an address without its query; or `user/name` of the Hub
    size_bytes: int | None  # None: of the Hub
    hash: str  # of head and tail; an address's ETag; or the commit
    modified: int = 0  # seconds since 1970; 0: not known


Record = list[TextFile]  # in the order in which the files are dealt to lanes


def record_text(files: Sequence[File]) -> Record:
    """What the text of these files is now.

    Raises:
        RecipeError: a file that cannot be read.
    """
    paths = [file.address if isinstance(file, RemoteFile) else os.path.abspath(file.address) for file in files]
    directories = {os.path.dirname(path) for path in paths if not is_remote(path)}
    root = os.path.commonpath(directories) if directories else ""
    try:
        record = [
            _remote_file(file) if isinstance(file, RemoteFile) else _local_file(path, root)
            for file, path in zip(files, paths, strict=True)
        ]
    except OSError as error:
        raise RecipeError(f"cannot read {reason_of(error)}") from None
    return list(dict.fromkeys(record))  # of a commit once


def pack_record(record: Record) -> str:
    """As text that a checkpoint can afford: 20 bytes for each of 20,000 files."""
    return base64.b85encode(zlib.compress(json.dumps(record).encode())).decode()


def unpack_record(text: str) -> Record:
    """What `pack_record` packed.

    Raises:
        RecipeError: something else.
    """
    try:
        return [TextFile(*values) for values in json.loads(zlib.decompress(base64.b85decode(text)))]
    except (ValueError, TypeError, zlib.error) as error:
        raise RecipeError(f"the checkpoint's record of its text cannot be read ({error})") from None


def what_changed(earlier: Record, now: Record) -> str | None:
    """The first file that is another than in `earlier`, and how; None if all text is the same, wherever it lies.

    What the text is, is decided by sizes and hashes in their order; names only say where it changed.
    """
    if [file[1:3] for file in earlier] == [file[1:3] for file in now]:
        return None
    old, new = ({file.name: file for file in record} for record in (earlier, now))
    if not old.keys() & new.keys():  # all of it has another place
        old, new = ({f"{file.hash} {file.size_bytes}": file for file in record} for record in (earlier, now))
    for key in sorted(old.keys() | new.keys(), key=lambda key: (new.get(key) or old[key]).name):
        if key not in new:
            return f"{old[key].name} is missing"
        name, size = new[key].name, new[key].size_bytes
        if key not in old:
            return f"{name} is new"
        if size is None and old[key].hash != new[key].hash:
            commits = f"{name} is at commit {new[key].hash} now and was at {old[key].hash}"
            return f"{commits}: set --data.revision {old[key].hash}"
        if size != old[key].size_bytes:
            return f"{name} has {size:,} bytes instead of {old[key].size_bytes:,}"
        if old[key].hash != new[key].hash:
            return f"{name} has {'another ETag' if '://' in name else 'other text'}, of the same size"
    if len(now) != len(earlier):
        return f"{len(now):,} files are now what {len(earlier):,} were"
    return "the files are the same, but not their order by path"


def touched(earlier: Record, now: Record) -> list[str]:
    """Files of the same text by what was compared, which may have changed between head and tail: the time says so."""
    pairs = zip(earlier, now, strict=True)
    return [
        new.name
        for old, new in pairs
        if old.modified != new.modified and (new.size_bytes or 0) > 2 * PIECE_BYTES and old.name == new.name
    ]


def _local_file(path: str, root: str) -> TextFile:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        digest = blake2b(file.read(PIECE_BYTES), digest_size=8)
        if status.st_size > 2 * PIECE_BYTES:
            file.seek(-PIECE_BYTES, os.SEEK_END)
        digest.update(file.read(PIECE_BYTES))
    name = path.removeprefix(root).lstrip("/")
    return TextFile(name, status.st_size, digest.hexdigest(), int(status.st_mtime))


def _remote_file(file: RemoteFile) -> TextFile:
    if found := re.fullmatch(r"hf://datasets/([^@]+)@([0-9a-f]{40})/.*", file.address):
        return TextFile(found[1], None, found[2])
    parts = urlsplit(file.address)
    return TextFile(f"{parts.scheme}://{parts.hostname}{parts.path}", file.size, file.version)
