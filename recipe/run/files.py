"""How files of a run are written: whole or not at all, and through no link that lies in their place.

A directory may be a link or a mount, which says where its content goes: it stays, and what is in it changes.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = ".lock"
# What is said of a thing that a file system cannot do at all (CIFS, FUSE, mounted buckets), or not over its border.
_UNSUPPORTED = {
    *(errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.EBADF, errno.EISDIR, errno.EXDEV, errno.EBUSY),
}


@contextmanager
def where_supported() -> Iterator[None]:
    """Leave the block, without an error, at what the file system cannot do; a full or broken disk stays an error."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def missing_abilities(directory: Path) -> list[str]:
    """What checkpoints are better with, and the file system of `directory` cannot do.

    Raises:
        OSError: nothing can be written there.
    """
    probe = Path(tempfile.mkdtemp(prefix=".tmp-probe-", dir=directory))
    file, renamed, missing = probe / "file", Path(f"{probe}-renamed"), ["fsync", "chmod", "rename of directories"]
    try:
        file.write_text("yes", encoding="utf-8")
        with where_supported():
            _fsync(file)
            _fsync(probe)
            missing.remove("fsync")
        with where_supported():
            file.chmod(0o644)
            missing.remove("chmod")
        with where_supported():
            os.replace(probe, renamed)
            missing.remove("rename of directories")
    finally:
        remove(probe)
        remove(renamed)
    return missing


def sync(path: Path) -> None:
    """Force a file or directory to the disk, where the file system can."""
    with where_supported():
        _fsync(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a directory, or a link but not what it leads to. No error if that cannot be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_leftovers(directory: Path) -> None:
    """Remove what was being written when a process was killed."""
    for path in directory.glob(".tmp-*"):
        remove(path)


def is_place(path: Path) -> bool:
    """Whether a directory is a link or a mount, which stays."""
    return path.is_dir() and (path.is_symlink() or os.path.ismount(path))


def open_to_append(path: Path) -> IO[str]:
    """Open a file of text, but not through a link."""
    flag = getattr(os, "O_NOFOLLOW", 0)
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags | flag, 0o666))


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end of the block, on the disk, or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    remove(temporary)
    try:
        temporary.touch(exist_ok=False)  # which follows no link
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def new_directory(final: Path, may_be_place: bool = False) -> Iterator[Path]:
    """A directory to fill, which appears as `final` at the end of the block, or not at all. It replaces an earlier one.

    If `may_be_place` and `final` is a link or a mount, its files are replaced one by one.
    """
    inside = may_be_place and is_place(final)
    temporary = final / ".tmp-new" if inside else final.with_name(f".tmp-{final.name}")
    remove(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if inside:
            _merge(temporary, final)
        else:
            _put_in_place(temporary, final)
    finally:
        remove(temporary)


def move(source: Path, target: Path) -> None:
    """Rename, or copy and remove what cannot be renamed."""
    with where_supported():
        return os.replace(source, target)
    _copy(source, target)
    remove(source)


def move_aside(path: Path, root: Path, number: int) -> Iterator[tuple[Path, Path]]:
    """Move what is in the directory `root` to `root/previous/number`.

    A link or a mount stays, and what it holds goes to a `previous/number` in it, as does what would have to be copied because
    `root/previous` is on another file system. Only files, and directories where none can be renamed, are copied.

    Yields: (where it was, where it is) of each thing that was moved.
    Raises:
        OSError: one could not be moved, and is where it was.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    targets = [root / "previous" / str(number) / path.relative_to(root)]
    if path.parent != root:
        targets.append(path.parent / "previous" / str(number) / path.name)
    if not is_place(path):
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            with where_supported():
                os.replace(path, target)
            if os.path.lexists(target):
                yield path, target
                return
    if path.is_dir() and path.parent == root:
        newest_checkpoint_last = sorted(path.iterdir(), key=lambda entry: (len(entry.name), entry.name))
        for entry in newest_checkpoint_last:
            if entry.name not in ("previous", LOCK):
                yield from move_aside(entry, root, number)
    else:
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        move(path, targets[0])
        yield path, targets[0]


def _fsync(path: Path) -> None:
    is_directory = path.is_dir()
    if is_directory and os.name == "nt":
        return  # Windows opens no directory, and flushes a file only through a descriptor that can write
    descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, final: Path) -> None:
    old = final.with_name(f".tmp-old-{final.name}")
    remove(old)
    if final.is_symlink():
        final.unlink()
    with where_supported():
        try:
            if os.path.lexists(final):
                os.replace(final, old)
            os.replace(temporary, final)
        except OSError:
            if os.path.lexists(old):
                os.replace(old, final)
            raise
        return remove(old)
    _merge(temporary, final)


def _merge(source: Path, target: Path) -> None:
    """Replace one by one; the largest last, since weights say that the rest is there."""
    target.mkdir(exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda entry: entry.stat().st_size):
        move(entry, target / entry.name)


def _copy(source: Path, target: Path) -> None:
    """Without permissions and times, which not every file system takes."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            _copy(entry, target / entry.name)
    else:
        remove(target)
        shutil.copyfile(source, target, follow_symlinks=False)
        if not target.is_symlink():
            sync(target)
