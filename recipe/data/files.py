"""Files of text, local or behind addresses, as a reader of documents sees them."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from fsspec.compression import compr

from recipe.config.text_files import is_remote, public_name
from recipe.data.remote_files import REQUESTS_AT_ONCE, RemoteFile, find_remote_file

Item = TypeVar("Item")
Result = TypeVar("Result")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by the first bytes, whatever the file is called
BLOCK_BYTES = 4 << 20  # read at once of a remote file; the next block is fetched meanwhile


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    address: str  # path
    size: int  # bytes
    version: str = ""  # when it was written last

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`."""
        with open(self.address, "rb") as file:
            file.seek(start)
            return file.read(end - start)


File = LocalFile | RemoteFile


def find_file(address: str) -> File:
    """Look at a file.

    Raises:
        OSError: it is not there, or the server does not answer.
    """
    if is_remote(address):
        return find_remote_file(address)
    status = os.stat(address)
    return LocalFile(address, status.st_size, str(status.st_mtime_ns))


def name_of(file: File) -> str:
    """Path, or address without what signs it."""
    return public_name(file.address)


def open_bytes(file: File) -> IO[bytes]:
    """For reading and seeking."""
    if isinstance(file, LocalFile):
        return open(file.address, "rb")
    return io.BufferedReader(_Blocks(file), buffer_size=1 << 16)


def compression_of(stream: IO[bytes]) -> str | None:
    """By its first bytes, which stay in it."""
    head = stream.peek(4)  # type: ignore[attr-defined]
    return next((kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)), None)


def decompressed(stream: IO[bytes], compression: str | None) -> Any:
    """What a stream holds, from its start on; an EOFError if it is cut off."""
    return compr[compression](stream, mode="rb") if compression else stream


def side_by_side(action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `action` gives for each of them, in order; it may wait for a network."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(pool.map(action, items))


def in_background(action: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Do it in a thread of its own, which does not keep the process from ending."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class PlaceInFile(io.RawIOBase):
    """A remote file and a place in it; what reads there is for subclasses."""

    def __init__(self, file: File) -> None:
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.file.size}[whence]
        return self.place


class _Blocks(PlaceInFile):
    """Reads in blocks; where it is read on from block to block, the next one is on its way."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__(file)
        self._number, self._block = -1, b""  # the block in hand
        self._next: Future[bytes] | None = None

    def readinto(self, buffer: Any) -> int:
        if self.place >= self.file.size:
            return 0
        number, offset = divmod(self.place, BLOCK_BYTES)
        if number != self._number:
            follows, ahead = number == self._number + 1, self._next
            self._next = None
            self._block = ahead.result() if ahead and follows else self._fetch(number)
            if follows and number and (number + 1) * BLOCK_BYTES < self.file.size:
                self._next = in_background(self._fetch, number + 1)
            self._number = number
        part = self._block[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)

    def _fetch(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        return self.file.read_range(start, min(start + BLOCK_BYTES, self.file.size))
