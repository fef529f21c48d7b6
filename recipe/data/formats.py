"""The documents of a part of a file, one after the other, each with the state from which reading goes on behind it.

Of rows only the text column is read, and never converted: what is no text is a `BadRow`. Whatever the other columns hold, and
however a file was cut into parts, a row gives the same document or the same `BadRow`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass

from recipe.data.files import COMPRESSIONS, File, compression_of, decompressed, name_of, open_bytes

State = dict[str, int]
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
class Part:
    """What one lane reads before it comes to another part."""

    file: File
    start: int = 0  # first byte of JSONL, or row group of Parquet
    end: int | None = None  # behind the last one; None: to the end


Document = tuple[str | BadRow, State]


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


def read_json_lines(part: Part, column: str, state: State | None) -> Iterator[Document]:
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
            found = document_of(line if byte else line.removeprefix(codecs.BOM_UTF8), column)
            if isinstance(found, ValueError):
                # the number of the row is known from the start of the file on
                number = f"row {row:,}" if part.start == 0 else f"the row at byte {byte:,}"
                yield BadRow(f"{number} of {name_of(file)}", str(found)), {"row": row, "byte": byte + len(line)}
            elif found is not None:
                yield found, {"row": row, "byte": byte + len(line)}
            byte += len(line)


def document_of(line: bytes, column: str) -> str | ValueError | None:
    """The text of a row of JSON Lines; None if the line is blank; else what is wrong with it."""
    if len(line) > LARGEST_ROW_BYTES:
        return ValueError(f"has more than {LARGEST_ROW_BYTES:,} bytes: a row has to end with a line feed")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return ValueError(f"has a byte that is not UTF-8 (0x{line[error.start]:02x}, byte {error.start:,} of the row)")
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is no JSON: {str(error) or 'too deeply nested'}")
    if not isinstance(row, dict):
        return ValueError(f"is {JSON_TYPES.get(type(row), 'null')}, not an object with a column {column!r}")
    if column not in row:
        return ValueError(f"has no column {column!r}: set --data.text_column to one of {list(row)[:30]}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        return ValueError(f"has {JSON_TYPES[type(value)]} in column {column!r}, not text ({json.dumps(value)[:60]})")
    try:
        value.encode()
    except UnicodeEncodeError:
        return ValueError(f"has half of a surrogate pair in column {column!r}, which is no text")
    return value
