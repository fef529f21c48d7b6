"""The parts of files that lanes read. Each is a shard; there are at least as many as lanes, and lanes get about as much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from recipe.data.files import File, LocalFile, compression_of, open_bytes, side_by_side
from recipe.data.formats import Document, Part, State, read_json_lines, read_text

# Files are cut into this many shards per lane, so that shard order shuffles something.
SHARDS_PER_LANE = 16
# Whole files, or row groups, are shards if the largest lane holds at most this many times the bytes of the smallest.
LARGEST_LANE_RATIO = 2
COPIED_COLUMN = "text"  # the only one of a copy
_SEARCHED_BYTES = 1 << 16  # at once for the end of a line


@dataclass(frozen=True)
class Reading:
    """How documents are read from files."""

    format: str  # text, json or parquet
    column: str = "text"  # of rows
    encoding: str | None = None  # of .txt files; None: UTF-8, or what a byte-order mark says


class Shards:
    """Documents in shards."""

    def __init__(self, reading: Reading, parts: Sequence[Part], parquet: Any = None) -> None:
        self.reading, self.parts = reading, parts
        self.text_bytes: float | None = None  # about how much text they hold, if that is known
        self.parquet = parquet
        if reading.format == "parquet" and parquet is None:
            from recipe.data.parquet import ParquetReader  # with pyarrow, which takes a second to import

            self.parquet = ParquetReader(reading.column)

    def __len__(self) -> int:
        return len(self.parts)

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
            return read_json_lines(part, self.reading.column, state)
        return self.parquet.read(part, state, [self.parts[shard] for shard in then])

    def forget(self) -> None:
        """Give back what was fetched and not read."""
        if self.parquet:
            self.parquet.forget()


def make_shards(files: Sequence[File], reading: Reading, lanes: int, copy: Callable[[Shards], File]) -> Shards:
    """Share out what the files hold: whole files, row groups of Parquet, ranges of lines of JSON Lines, or those of a copy.

    Each lane gives the same number of blocks to an update, so the text of a lane that holds little would be repeated as often
    as the others hold more.

    Args:
        files: in their order.
        reading: how documents are read from them.
        lanes: how many share them.
        copy: makes one plain file of JSON Lines of files that cannot be cut: compressed ones, or with too few row groups.

    Raises:
        RecipeError: a file that is not what its name says.
        OSError: a file cannot be read, or not now.
    """
    is_local = all(isinstance(file, LocalFile) for file in files)
    whole = Shards(reading, [Part(file) for file in files if file.size or reading.format != "json"])
    if reading.format == "text" or (not is_local and len(files) >= lanes):
        if reading.format == "text":
            whole.text_bytes = sum(file.size for file in files)
        if reading.format == "parquet":  # a look at one file also tells at the start whether it has the column
            share = sum(whole.parquet.row_groups(files[0])) / files[0].size
            whole.text_bytes = share * sum(file.size for file in files)
            whole.parquet.tails.clear()
            whole.parquet.ranges.clear()
        return whole
    if reading.format == "parquet":
        sizes = {
            Part(file, group, group + 1): size
            for file, sizes_of_file in zip(files, side_by_side(whole.parquet.row_groups, files), strict=True)
            for group, size in enumerate(sizes_of_file)
            if size
        }
        # to make lanes even nothing is downloaded
        if is_even([*sizes.values()], lanes) or (not is_local and len(sizes) >= lanes):
            shards = Shards(reading, [*sizes], whole.parquet)
            shards.text_bytes = sum(sizes.values())
            return shards
    elif is_even([file.size for file in files], lanes):
        return whole
    if reading.format == "parquet" or any(map(_is_compressed, files)):
        files, reading = [copy(whole)], Reading("json", COPIED_COLUMN)
    return Shards(reading, cut(files, lanes))


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
