"""Files that are read over a network, of which no byte goes missing unnoticed.

The file systems that fsspec and the Hub's library bring take what a server answers for what was asked for. A range that comes
back short, a page with status 200 or an empty answer with status 416 then shifts, replaces or ends the text without an error
(docs/decisions.md). Here an answer is either exactly the bytes that were asked for, of a file as long as it was when this
process first saw it, or a ConnectionError, after which `recipe.data.documents` reads on from the last document.

An address may be signed, or hold a password. `datasets` writes down what it reads, so it knows files by public names.
"""

from __future__ import annotations

import re
from base64 import b64encode
from email.message import Message
from http.client import HTTPException
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request, urlopen

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from huggingface_hub import HfFileSystem
from huggingface_hub.hf_file_system import HfFileSystemFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from recipe.config.text_files import public_name
from recipe.retry import retry

SILENCE_SECONDS = 30.0  # a server that sends nothing for so long has failed
# Before a range is asked for a second and a third time: to start from the last document reads its file up to there again.
PAUSES_SECONDS = (0.5, 2.0)


class HttpFileSystem(AbstractFileSystem):
    """Files by their http:// or https:// addresses, read by ranges of bytes."""

    protocol = ("http", "https")
    _first_seen: ClassVar[dict[str, dict[str, Any]]] = {}
    addresses: ClassVar[dict[str, str]] = {}  # in full, by public name

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size in bytes and ETag of the file as this process first saw it.

        Raises:
            ConnectionError: no such file, or a server that does not answer ranges.
        """
        if path not in self._first_seen:
            headers, _ = retry(lambda: _get(path, 0, 1), PAUSES_SECONDS)
            size = int(headers["Content-Range"].rpartition("/")[2])
            self._first_seen[path] = {"name": path, "type": "file", "size": size, "ETag": headers["ETag"]}
        return self._first_seen[path]

    def glob(self, path: str, **options: Any) -> Any:
        """The one file of this address, in which `?` begins a query and is no pattern."""
        return {path: self.info(path)} if options.get("detail") else [path]

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """As fsspec has it; `datasets` gives the encoding of a text file to the file system instead."""
        return super().open(path, mode, **{**self.storage_options, **options})

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> HttpFile:
        return HttpFile(self, path, mode, block_size or "default", size=self.info(path)["size"])


class HttpFile(AbstractBufferedFile):
    """One of them, read ahead in blocks."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return retry(lambda: _get(self.path, start, end, self.size)[1], PAUSES_SECONDS)


class HubFileSystem(HfFileSystem):
    """The Hub's own, but for how a file is read."""

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, revision: str | None = None, **options: Any
    ) -> HubFile:
        return HubFile(self, path, mode=mode, revision=revision, block_size=block_size, **options)


class HubFile(HfFileSystemFile):
    """A file of a commit, so that its size cannot change."""

    read = AbstractBufferedFile.read  # by ranges also where all of it is wanted

    def _fetch_range(self, start: int, end: int) -> bytes:
        return retry(lambda: self._get(start, end), PAUSES_SECONDS)

    def _get(self, start: int, end: int) -> bytes:
        asked = f"bytes {start}-{end - 1} of {self.size:,}"
        headers = {**build_hf_headers(token=self.fs.token), "Range": f"bytes={start}-{end - 1}"}
        try:
            answer = get_session().get(self.url(), headers=headers, timeout=SILENCE_SECONDS)
            hf_raise_for_status(answer)
        except Exception as error:
            raise ConnectionError(f"{self.path}: asked for {asked}, got {error}") from None
        if len(answer.content) != end - start:
            got = f"{len(answer.content):,} bytes, status {answer.status_code}"
            raise ConnectionError(f"{self.path}: asked for {asked}, got {got}")
        return bytes(answer.content)


def use_checked_files() -> None:
    """Let `datasets` open remote files through these file systems, and leave it to the recipe to try again."""
    import datasets

    for protocol, file_system in (("http", HttpFileSystem), ("https", HttpFileSystem), ("hf", HubFileSystem)):
        fsspec.register_implementation(protocol, file_system, clobber=True)
    # Its own way is to try 20 times, with pauses of 5 to 60 s, whenever a file is opened or read.
    datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_OPEN_RETRY_INTERVAL = datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0


def name_for_datasets(address: str) -> str:
    """A public name by which `HttpFileSystem` reads an address; numbered if addresses differ only in what is not public."""
    public = name = public_name(address)
    number = 1
    while HttpFileSystem.addresses.setdefault(name, address) != address:
        number += 1
        name = f"{public}?{number}"
    return name


def _request(address: str) -> Request:
    """With the credentials in a header, where urllib looks for them, which is for this host alone."""
    parts = urlsplit(address)
    credentials, _, host = parts.netloc.rpartition("@")
    request = Request(parts._replace(netloc=host, fragment="").geturl())
    if credentials:
        credentials += "" if ":" in credentials else ":"
        request.add_unredirected_header("Authorization", f"Basic {b64encode(unquote_to_bytes(credentials)).decode()}")
    return request


def _get(name: str, start: int, end: int, size: int | None = None) -> tuple[Message, bytes]:
    """(headers, the bytes from `start` to before `end`) of a file, which is `size` bytes long where that is known.

    Raises:
        ConnectionError: anything else came, or nothing.
    """
    asked, address = f"bytes {start}-{end - 1}", HttpFileSystem.addresses.get(name, name)
    try:
        request = _request(address)
        request.add_header("Range", asked.replace(" ", "="))
        with urlopen(request, timeout=SILENCE_SECONDS) as answer:
            status, headers, data = answer.status, answer.headers, answer.read(end - start)
    except (OSError, HTTPException, ValueError) as error:
        got = str(error) or type(error).__name__
        if isinstance(error, HTTPError) and error.code < 500 and address == public_name(address):
            got += (
                "; if it needs a query or a password, give it with them: config.yaml and cards have no address in full"
            )
        raise ConnectionError(f"{public_name(name)}: asked for {asked}, got {got}") from None
    given = headers["Content-Range"] or "no range"
    if status != 206 or not re.fullmatch(f"{asked}/{size or '[0-9]+'}", given) or len(data) != end - start:
        of_size = f" of {size:,}" if size else ""
        got = f"{given} ({len(data):,} bytes, status {status})"
        raise ConnectionError(f"{public_name(name)}: asked for {asked}{of_size}, got {got}")
    return headers, data
