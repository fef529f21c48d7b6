"""Files behind addresses: http(s)://, hf:// and, with their libraries, s3://, gs:// and what else fsspec knows.

They are read by ranges of bytes, and no byte goes missing unnoticed. Libraries take what a server answers for what was asked
for: a range that comes back short, a page with status 200 or an empty answer with status 416 then shifts, replaces or ends
the text without an error (docs/decisions.md). Here an answer is either exactly the bytes that were asked for, of a file as
long as it was when it was first seen, or a ConnectionError, after which `recipe.data.documents` reads on from the last
document.
"""

from __future__ import annotations

import functools
import re
import threading
from dataclasses import dataclass
from glob import has_magic
from typing import Any
from urllib.parse import urlsplit

import fsspec
import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session

from recipe.config.text_files import public_name
from recipe.errors import RecipeError
from recipe.retry import retry

SILENCE_SECONDS = 30.0  # a server that sends nothing for so long has failed
# Before a range is asked for a second and a third time: to start from the last document may read its file up to there again.
PAUSES_SECONDS = (0.5, 2.0)
REQUESTS_AT_ONCE = 16
_REQUESTS = threading.Semaphore(REQUESTS_AT_ONCE)


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address, as it was when it was first seen."""

    address: str  # in full
    size: int  # bytes
    version: str = ""  # its ETag, or another value that changes with its bytes, if there is one

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`.

        Raises:
            ConnectionError: anything else came, or nothing, three times.
        """
        return retry(lambda: self._read_range(start, end), PAUSES_SECONDS)

    def _read_range(self, start: int, end: int) -> bytes:
        size = self.size
        try:
            with _REQUESTS:
                if is_http(self.address):
                    data, size, _ = _get_range(self.address, start, end)
                else:
                    data = _file_system(urlsplit(self.address).scheme).cat_file(self.address, start=start, end=end)
        except Exception as error:  # of any library under fsspec
            got = _reason(self.address, error)
        else:
            if len(data) == end - start and size == self.size:
                return data
            got = f"{len(data):,} bytes of {size:,}"
        what = f"asked for bytes {start}-{end - 1} of {self.size:,}"
        raise ConnectionError(f"{public_name(self.address)}: {what}, got {got}") from None


def find_remote_file(address: str) -> RemoteFile:
    """Ask for size and version of a file.

    Raises:
        ConnectionError: no such file, or a server that does not answer ranges.
        RecipeError: a library that is needed for this kind of address is not installed.
    """
    return retry(lambda: _find_remote_file(address), PAUSES_SECONDS, lambda error: not isinstance(error, RecipeError))


def _find_remote_file(address: str) -> RemoteFile:
    try:
        if is_http(address):
            _, size, version = _get_range(address, 0, 1)
            return RemoteFile(address, size, version.removeprefix("W/"))
        info = _file_system(urlsplit(address).scheme).info(address)
        versions = (info.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime"))
        return RemoteFile(address, int(info["size"]), str(next(filter(None, versions), "")))
    except RecipeError:
        raise
    except Exception as error:  # of any library under fsspec
        raise ConnectionError(f"{public_name(address)}: {_reason(address, error)}") from None


def find_pattern(address: str) -> list[str]:
    """The addresses that a pattern of an object store or the Hub stands for; `?` and `*` are no pattern in https://.

    Raises:
        ConnectionError: there is none, or no answer.
        RecipeError: see `find_remote_file`.
    """
    scheme = urlsplit(address).scheme
    if scheme in ("http", "https") or not has_magic(address):
        return [address]
    try:
        found = _file_system(scheme).glob(address)
    except RecipeError:
        raise
    except Exception as error:
        raise ConnectionError(f"{public_name(address)}: {_reason(address, error)}") from None
    if not found:
        raise RecipeError(f"no file matches {public_name(address)}")
    return sorted(f"{scheme}://{path}" for path in found)


def is_http(address: str) -> bool:
    """Whether it is asked for by HTTP: of the Hub, or any other server."""
    return address.startswith(("http://", "https://", "hf://"))


def _get_range(address: str, start: int, end: int) -> tuple[bytes, int, str]:
    """(the bytes, of how many the file has, its ETag) of a file behind http(s):// or hf://.

    Raises:
        ConnectionError: an answer that is not this range.
    """
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    client, url = _http_client(), address
    if found := re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", address):
        url = hf_hub_url(found[1], found[3], repo_type="dataset", revision=found[2] or "main")
        client, headers = get_session(), {**build_hf_headers(), **headers}
    with client.stream("GET", url, headers=headers, timeout=SILENCE_SECONDS, follow_redirects=True) as answer:
        answer.raise_for_status()
        given = answer.headers.get("Content-Range", "no range")
        found = re.fullmatch(rf"bytes {start}-{end - 1}/(\d+)", given)
        if answer.status_code != 206 or not found or "Content-Encoding" in answer.headers:
            raise ConnectionError(f"{given}, status {answer.status_code}")
        return answer.read(), int(found[1]), answer.headers.get("ETag", "")


@functools.cache
def _http_client() -> httpx2.Client:
    return httpx2.Client(limits=httpx2.Limits(max_connections=None))


@functools.cache
def _file_system(scheme: str) -> Any:
    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:  # it names the package
        raise RecipeError(f"{scheme}:// cannot be read: {error}") from None


def _reason(address: str, error: Exception) -> str:
    status = error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else None
    text = f"HTTP Error {status}" if status else str(error) or type(error).__name__
    if status and status < 500 and address.startswith("http") and address == public_name(address):
        text += "; if it needs a query or a password, give it with them: config.yaml and cards have no address in full"
    return text
