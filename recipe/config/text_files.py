"""The files that text is read from. Imports no torch."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from recipe.config.local_files import TextFiles, find_files
from recipe.errors import RecipeError
from recipe.text import public_address

# File ending -> format: a document is a file of text, an object on a line of JSON, or a row of Parquet.
TEXT_FILE_FORMATS = {
    **{".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".parquet": "parquet"},
    **{".json": "json", ".json.gz": "json", ".json.zst": "json", ".arrow": "arrow"},
}
FLAT = "flat"  # format of a file of nothing but token ids, maybe with a header or a file beside it
MANIFEST = "manifest.json"  # stands beside prepared tokens


def is_remote(path: str) -> bool:
    """True for an address: it is streamed."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def public_name(path: str) -> str:
    """How a path, glob or address is written down: an address without credentials, query and fragment."""
    return public_address(path) if is_remote(path) else path


def text_file_format(path: str) -> str | None:
    """The format of a file by its name or address; None if its ending is not in `TEXT_FILE_FORMATS`."""
    return next((kind for ending, kind in TEXT_FILE_FORMATS.items() if public_name(path).endswith(ending)), None)


def token_file_format(path: str) -> str | None:
    """The format of a file of token ids by its name or address; None: it is a manifest."""
    if public_name(path).endswith(MANIFEST):
        return None
    kind = text_file_format(path)
    return FLAT if kind in (None, "text") else kind


def expand_files(source: Any, section: str = "data", setting: str = "") -> TextFiles:
    """The files that `source`, a SourceConfig, names, as `expand_text_files` finds them; `setting` if others name them."""
    if source.text_files:
        return expand_text_files(source.text_files, setting or f"{section}.text_files")
    return expand_text_files(source.token_files, setting or f"{section}.token_files", token_file_format)


def expand_text_files(
    patterns: Sequence[str],
    setting: str = "data.text_files",
    format_of: Callable[[str], str | None] = text_file_format,
) -> TextFiles:
    """What `patterns` (files, globs, addresses), the value of `setting`, stand for; all of one format.

    Sorted by what of them is public, so that a new signature leaves their order.

    Raises:
        RecipeError: a pattern that matches nothing, an address or a file of an unknown format, files of two formats, or only
            empty ones.
    """
    addresses = [*dict.fromkeys(filter(is_remote, patterns))]
    for address in addresses:
        _check_address(address, setting)
    local = find_files([pattern for pattern in patterns if not is_remote(pattern)], setting)
    paths = sorted([*addresses, *local.paths], key=public_name)
    if format_of is token_file_format:
        paths = [path for path in paths if format_of(path)] or paths
    unknown = [path for path in paths if format_of(path) is None]
    if unknown:
        raise RecipeError(
            f"{setting}: {unknown[0]!r} has no known format: valid endings are {', '.join(TEXT_FILE_FORMATS)}"
        )
    kinds = {format_of(path): path for path in paths}
    if len(kinds) > 1:
        raise RecipeError(f"{setting}: give files of one format, not of {len(kinds)}: {', '.join(kinds.values())}")
    if not any(is_remote(path) or os.path.getsize(path) for path in paths):
        raise RecipeError(f"{setting}: no text, all {len(paths)} files that match are empty")
    return TextFiles(paths, local.left_out)


def _check_address(address: str, setting: str) -> None:
    """Answer what is no address before a library quotes it, with its query, in an error."""
    try:
        parts = urlsplit(address)
        is_valid = bool(parts.hostname) and (parts.port or 1) > 0 and re.fullmatch(r"[!-~]+", address)
    except ValueError:  # a port that is no number
        is_valid = False
    if not is_valid:
        shown = public_address("".join(address.split()))
        raise RecipeError(f"{setting}: {shown!r} is no address: give https://host/file, with %20 for a space")
