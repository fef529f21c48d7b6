"""The documents of a part of a file, one after the other, each with the state from which reading goes on behind it.

Of rows only the column of texts, or of token ids, is read, and never converted: what is neither is a `BadRow`. Whatever the
other columns hold, and however a file was cut into parts, a row gives the same document or the same `BadRow`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recipe.data.files import COMPRESSIONS, File, compression_of, decompressed, name_of, open_bytes

State = dict[str, int]
# Columns of token ids, in the order in which they are looked for where none is named.
TOKEN_COLUMNS = ("input_ids", "token_ids", "tokens", "ids")
READ_IDS = "token ids are read by --data.token_files, or --data.token_column of a dataset"
LARGEST_ROW_BYTES = 1 << 28  # of JSONL: a longer line is no row
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, of which it begins with the mark
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
JSON_TYPES: dict[type, str] = {
    **{bool: "a boolean", int: "a number", float: "a number"},
    **{list: "an array", dict: "an object", str: "a string"},
}


@dataclass(frozen=True)
class BadRow:
    """A row, or a .txt file, that holds no text."""

    where: str  # file and place in it
    reason: str

    def __str__(self) -> str:
        return f"{self.where} {self.reason}"


@dataclass(frozen=True)
class TokenIds:
    """What there is to know of token ids before they are read: the tokenizer that made them."""

    tokenizer: str  # its name
    vocabulary_hash: str
    delimiters: tuple[int, ...]  # its end-of-text token, and its beginning-of-text token if that is another
    vocabulary: int  # its tokens
    are_packed: bool = False  # rows are pieces of a stream, and not documents

    @property
    def dtype(self) -> str:
        """The shortest integers of two or four bytes that hold them."""
        return "uint16" if self.vocabulary <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Reading:
    """How documents are read from files."""

    format: str  # text, json, parquet, arrow or flat
    column: str = "text"  # of rows
    encoding: str | None = None  # of .txt files; None: UTF-8, or what a byte-order mark says
    ids: TokenIds | None = None  # of what the column holds; None: it holds text


@dataclass(frozen=True)
class Part:
    """What one lane reads before it comes to another part."""

    file: File
    start: int = 0  # first byte of JSONL, row group of Parquet, batch of Arrow, token or document of a flat file
    end: int | None = None  # behind the last one; None: to the end


Ids = np.ndarray  # integers [tokens] of a document, without end-of-text token; or a piece of a stream, as it is
Document = tuple[str | Ids | BadRow, State]


def read_text(part: Part, encoding: str | None, state: State | None) -> Iterator[Document]:
    """A .txt file: one document, in UTF-8 or what a byte-order mark says, if `encoding` does not. Line ends stay."""
    if not state:
        with open_bytes(part.file) as stream:
            data = stream.read()
        yield _decode(data, encoding, name_of(part.file)), {"row": 1}


def _decode(data: bytes, encoding: str | None, name: str) -> str | BadRow:
    if data.startswith(tuple(COMPRESSIONS)):
        return BadRow(name, "is compressed: unpack it")
    found = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    try:
        text = data.decode(encoding or found or "utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{data[error.start]:02x}, byte {error.start:,}"
        what = f"has a byte that is not {(encoding or found or 'utf-8').upper()} ({byte})"
        return BadRow(name, f"{what}: set --data.encoding to what it is in, such as latin-1, or convert it")
    if "\0" in text and not (encoding or found):
        return BadRow(
            name, "has zero bytes: it is no text, or UTF-16 without a mark, then set --data.encoding utf-16-le"
        )
    return text


def read_json_lines(part: Part, reading: Reading, state: State | None) -> Iterator[Document]:
    """JSON Lines, plain or compressed: the rows whose first byte is in the part."""
    file, place = part.file, state or {"row": 0, "byte": part.start}
    row, byte = place["row"], place["byte"]
    with open_bytes(file) as stream:
        compression = compression_of(stream) if part.end is None else None
        lines = decompressed(stream, compression)
        if compression:
            for _ in range(row):
                lines.readline()
        else:
            lines.seek(byte)
        while part.end is None or byte < part.end:
            line = lines.readline(LARGEST_ROW_BYTES + 1)
            if not line:
                return
            row += 1
            found: str | Ids | BadRow | None
            try:
                found = document_of(line if byte else line.removeprefix(codecs.BOM_UTF8), reading)
            except NotInRow as error:
                # the number of the row is known from the start of the file on
                number = f"row {row:,}" if part.start == 0 else f"the row at byte {byte:,}"
                found = BadRow(f"{number} of {name_of(file)}", str(error))
            byte += len(line)
            if found is not None:
                yield found, {"row": row, "byte": byte}


class NotInRow(ValueError):
    """What is wrong with a row."""


def document_of(line: bytes, reading: Reading) -> str | Ids | None:
    """What a row of JSON Lines holds; None if the line is blank.

    Raises:
        NotInRow: no document.
    """
    column = reading.column
    if len(line) > LARGEST_ROW_BYTES:
        raise NotInRow(f"has more than {LARGEST_ROW_BYTES:,} bytes: a row has to end with a line feed")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x}, byte {error.start:,} of the row"
        raise NotInRow(f"has a byte that is not UTF-8 ({byte})") from None
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotInRow(f"is no JSON: {str(error) or 'too deeply nested'}") from None
    if not isinstance(row, dict):
        raise NotInRow(f"is {JSON_TYPES.get(type(row), 'null')}, not an object with a column {column!r}")
    if column not in row:
        raise NotInRow(no_column(reading, list(row)))
    value = row[column]
    if reading.ids:
        is_list = isinstance(value, list) and all(type(item) is int for item in value)
        if not is_list and value is not None:
            raise NotInRow(f"has no list of integers in column {column!r} ({json.dumps(value)[:60]})")
        return ids_of_row(np.array(value or [], dtype=np.int64), reading.ids)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise NotInRow(f"has {JSON_TYPES[type(value)]} in column {column!r}, not text ({json.dumps(value)[:60]})")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise NotInRow(f"has half of a surrogate pair in column {column!r}, which is no text") from None
    return value


def json_columns(file: File) -> list[str]:
    """The columns of the first row of JSON Lines; none if it is no row, which whoever reads it will say.

    Raises:
        OSError: it cannot be read.
    """
    with open_bytes(file) as stream:
        line = decompressed(stream, compression_of(stream)).readline(LARGEST_ROW_BYTES)
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return []
    return [*row] if isinstance(row, dict) else []


def no_column(reading: Reading, columns: Sequence[str]) -> str:
    """What to say where the column is not among those that there are."""
    setting = "data.token_column" if reading.ids else "data.text_column"
    ways = f"set --{setting} to one of {list(columns)[:30]}"
    if reading.ids is None and not {*TOKEN_COLUMNS}.isdisjoint(columns):
        ways += f"; {READ_IDS}"
    return f"has no column {reading.column!r}: {ways}"


def ids_of_row(values: np.ndarray, ids: TokenIds) -> Ids:
    """Integers [tokens] of a row as a document.

    Raises:
        NotInRow: one that is no token of the tokenizer.
    """
    if len(values):
        smallest, largest = values.min(), values.max()
        if smallest < 0 or largest >= ids.vocabulary:
            raise NotInRow(
                f"has the token id {smallest if smallest < 0 else largest:,}, but the tokenizer has {ids.vocabulary:,} tokens: "
                "is --data.tokenizer another?"
            )
    return values if ids.are_packed else strip_ends(values, ids.delimiters)


def strip_ends(ids: Ids, delimiters: Sequence[int]) -> Ids:
    """A document as everybody means it: without one end-of-text token behind it, and then without one in front."""
    if len(ids) and ids[-1] in delimiters:
        ids = ids[:-1]
    return ids[1:] if len(ids) and ids[0] in delimiters else ids


def is_one_of(ids: Ids, few: Sequence[int]) -> np.ndarray:
    """As `np.isin`, ten times as fast for one or two: bool [tokens]."""
    return np.logical_or.reduce([ids == one for one in few])
