"""The parts of files that lanes read. Each is a shard; there are at least as many as lanes, and lanes get about as much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from recipe.config.text_files import FLAT
from recipe.data.files import File, LocalFile, compression_of, open_bytes, side_by_side
from recipe.data.formats import Document, Part, Reading, State, json_columns, read_json_lines, read_text

# Files are cut into this many shards per lane, so that shard order shuffles something.
SHARDS_PER_LANE = 16
# Whole files, or row groups, are shards if the largest lane holds at most this many times the bytes of the smallest.
LARGEST_LANE_RATIO = 2
_SEARCHED_BYTES = 1 << 16  # at once for the end of a line


class Shards:
    """Documents in shards.

    `reader` reads them: a ParquetReader, ArrowReader or FlatTokens. None: one is made if it takes one.
    """

    def __init__(self, reading: Reading, parts: Sequence[Part], reader: Any = None) -> None:
        self.reading, self.parts = reading, parts
        self.text_bytes: float | None = None  # about how much text they hold, if that is known
        self.tokens: int | None = None  # ids that they hold, if that is known
        self.reader = reader or _make_reader(reading)
        if self.reader and reading.format != FLAT:
            self.reader.reading = reading

    def __len__(self) -> int:
        return len(self.parts)

    def columns(self, file: File) -> list[str]:
        """The columns of a file of rows; of JSON Lines those of the first row.

        Raises:
            RecipeError: it is not what its name says.
            OSError: it cannot be read.
        """
        return self.reader.columns(file) if self.reader else json_columns(file)

    def count(self, column_bytes: float, times: float = 1) -> None:
        """Note how much they hold: so many bytes of text, or so many times the ids that the reader has seen."""
        if self.reading.ids is None:
            self.text_bytes = column_bytes
        else:
            self.tokens = round(self.reader.tokens * times) or None

    def read(self, index: int, state: State | None = None, then: Sequence[int] = ()) -> Iterator[Document]:
        """The documents of a shard behind `state`; `then` are shards that will be read next.

        Raises:
            RecipeError: a file that is not what its name says.
            OSError: it cannot be read, or not now.
        """
        part = self.parts[index]
        if self.reading.format == "text":
            return read_text(part, self.reading.encoding, state)
        if self.reading.format == "json":
            return read_json_lines(part, self.reading, state)
        if self.reading.format == "parquet":
            following = [self.parts[shard] for shard in then]
            return self.reader.read(part, state, [part for part in following if part.start != part.end])
        return self.reader.read(part, state)

    def forget(self) -> None:
        """Give back what was fetched and not read."""
        if self.reading.format == "parquet":
            self.reader.forget()


def _make_reader(reading: Reading) -> Any:
    """pyarrow takes a second to import."""
    if reading.format == "parquet":
        from recipe.data.parquet import ParquetReader

        return ParquetReader(reading)
    if reading.format == "arrow":
        from recipe.data.arrow import ArrowReader

        return ArrowReader(reading)
    return None


def make_shards(files: Sequence[File], nothing: Shards, lanes: int, copy: Callable[[Shards], Shards]) -> Shards:
    """Share out what files of text or rows hold: whole files, row groups of Parquet, batches of Arrow, ranges of lines of JSON
    Lines, or those of a copy.

    Each lane gives the same number of blocks to an update, so the text of a lane that holds little would be repeated as often
    as the others hold more.

    Args:
        files: in their order.
        nothing: shards without parts, which know how documents are read from the files.
        lanes: how many share them.
        copy: shards of one plain file that has all documents of files that cannot be cut: compressed ones, or with too few
            row groups.

    Raises:
        RecipeError: a file that is not what its name says.
        OSError: a file cannot be read, or not now.
    """
    is_local, reading, reader = all(isinstance(file, LocalFile) for file in files), nothing.reading, nothing.reader
    whole = Shards(reading, [Part(file) for file in files if file.size or reading.format != "json"], reader)
    if reading.format == "parquet" and reading.ids and (parts := reader.prepared_parts(files, lanes)):
        prepared = Shards(reading, parts, reader)
        prepared.count(0)
        return prepared
    if reading.format == "text" or (not is_local and len(files) >= lanes):
        if reading.format == "text":
            whole.count(sum(file.size for file in files))
        if reading.format == "parquet":  # a look at one file also tells at the start whether it has the column
            size = sum(file.size for file in files)
            whole.count(sum(whole.reader.row_groups(files[0])) / files[0].size * size, size / files[0].size)
            whole.reader.tails.clear()
            whole.reader.ranges.clear()
        return whole
    if reading.format in ("parquet", "arrow"):
        sizes = {
            Part(file, group, group + 1): size
            for file, sizes_of_file in zip(files, side_by_side(whole.reader.row_groups, files), strict=True)
            for group, size in enumerate(sizes_of_file)
            if size
        }
        # to make lanes even nothing is downloaded
        if is_even([*sizes.values()], lanes) or (not is_local and len(sizes) >= lanes):
            shards = Shards(reading, [*sizes], whole.reader)
            shards.count(sum(sizes.values()))
            return shards
        return copy(whole)
    if is_even([file.size for file in files], lanes):
        return whole
    return copy(whole) if any(map(_is_compressed, files)) else Shards(reading, cut(files, lanes))


def _is_compressed(file: File) -> bool:
    with open_bytes(file) as stream:
        return compression_of(stream) is not None


def is_even(sizes: Sequence[int], lanes: int) -> bool:
    """Whether there are as many parts of these bytes as lanes, and no lane gets much more than another."""
    of_lanes = [sum(sizes[lane::lanes]) for lane in range(lanes)]
    return len(sizes) >= lanes and max(of_lanes) <= LARGEST_LANE_RATIO * min(of_lanes)


def cut(files: Sequence[File], lanes: int) -> list[Part]:
    """Ranges of lines of about equal length in bytes; single rows, if there are so few."""
    size = sum(file.size for file in files)
    parts = []
    for file in files:
        count = max(1, round(file.size * SHARDS_PER_LANE * lanes / size))
        places = sorted({file.size * number // count for number in range(1, count)} - {0})
        parts += _between(file, side_by_side(partial(line_start, file), places))
    if len(parts) < lanes:
        parts = [part for file in files for part in _between(file, line_starts(file))]
    return parts


def _between(file: File, starts: Sequence[int]) -> list[Part]:
    bounds = sorted({0, *starts, file.size})
    return [Part(file, start, end) for start, end in pairwise(bounds)]


def line_start(file: File, place: int) -> int:
    """The first byte of a line at `place` or behind it; the file's size if there is none."""
    start = place - 1  # the line before may end there
    while start < file.size:
        piece = file.read_range(start, min(start + _SEARCHED_BYTES, file.size))
        if (found := piece.find(b"\n")) >= 0:
            return start + found + 1
        start += len(piece)
    return file.size


def line_starts(file: File) -> list[int]:
    """The first byte of every line."""
    with open_bytes(file) as stream:
        return list(accumulate(map(len, stream)))
