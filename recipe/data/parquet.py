"""The documents of Parquet files, a row group at a time, and of remote files nothing but the bytes of their column.

pyarrow's dataset scanner, through which `datasets` streams, gives nothing back before the end of a file (apache/arrow #39808).
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.data.columns import check_column, documents_of
from recipe.data.files import File, LocalFile, PlaceInFile, in_background, name_of, side_by_side
from recipe.data.formats import Document, Part, Reading, State
from recipe.errors import RecipeError

ROWS_AT_ONCE, IDS_AT_ONCE = 32, 1024  # rows of a batch of texts, and of token ids, which are not copied
SHARDS_KEY = b"recipe.shards"  # of a file's metadata: lanes, and the row groups of each shard that it was prepared from
TAIL_BYTES = 1 << 16  # of a remote file, read in the hope that they hold its footer; pyarrow asks for as many
AT_ONCE_BYTES = 64 << 20  # of text: a row group of so much is decoded at once, so that nothing else of the file is kept
KEPT_COLUMNS = 1 << 14  # of all row groups of local files whose footers are kept
FETCH_AHEAD = 0.75  # of a row group's rows have been read when the next one is fetched

Tail = tuple[int, bytes]  # so many bytes, compressed, since a footer repeats itself
_TAIL_CODEC = pa.Codec("zstd")
_DECODING = threading.Lock()


@dataclass(frozen=True)
class RowGroup:
    """What has been fetched of a remote file to read one row group of it."""

    tail: Tail  # its end, with the footer
    start: int = 0
    data: bytes = b""  # the column's, from `start` on


class Footer(NamedTuple):
    """What pyarrow makes of one, and how many rows are before each row group."""

    metadata: Any
    rows_before: list[int]

    @property
    def size(self) -> int:
        """Columns of all its row groups: each takes about a kilobyte."""
        return int(self.metadata.num_columns * self.metadata.num_row_groups)


class ParquetReader:
    """Reads parts of Parquet files; several threads may, each another part."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.tokens = 0  # in the row groups that were asked for, if the column holds ids
        # Of remote files whose row groups were asked for, by address: the end, and where the column of each group is
        self.tails: dict[str, Tail] = {}
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        self.largest_bytes = 0  # of the column in a row group: read, and the next one fetched, as stored
        self._ahead: dict[tuple[str, int], Future[RowGroup]] = {}
        self._footers: dict[str, Footer] = {}  # of local files, by path; those used last, as much as memory allows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": {}, "_footers": {}}

    def columns(self, file: File) -> list[str]:
        """Their names.

        Raises:
            RecipeError: no Parquet file.
            OSError: it cannot be read.
        """
        self._keep_tail(file)
        with _DECODING, self._open(file) as parquet:
            return list(parquet.schema_arrow.names)

    def _keep_tail(self, file: File) -> None:
        if not isinstance(file, LocalFile) and file.address not in self.tails:
            self.tails[file.address] = _read_tail(file)

    def row_groups(self, file: File) -> list[int]:
        """Bytes of the column in each row group. Several readers will want the footer of a remote file, so it is kept.

        Raises:
            RecipeError: no Parquet file, or no such column, or something else in it.
            OSError: it cannot be read.
        """
        self._keep_tail(file)
        with _DECODING, self._open(file) as parquet:
            index = self._index(parquet, file)
            groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
            columns = [group.column(index) for group in groups]
            if not isinstance(file, LocalFile):
                self.ranges[file.address] = list(map(_range, columns))
            sizes = [column.total_uncompressed_size + column.total_compressed_size for column in columns]
            self.largest_bytes = max([self.largest_bytes, *sizes])
            self.tokens += sum(column.num_values for column in columns)
            return [c.total_uncompressed_size if g.num_rows else 0 for c, g in zip(columns, groups, strict=True)]

    def prepared_parts(self, files: Sequence[File], lanes: int) -> list[Part] | None:
        """The shards of the source that files were prepared from, if that was for so many lanes; some may be empty.

        Raises:
            RecipeError: see `row_groups`.
            OSError: a file cannot be read.
        """
        if self._prepared_shards(files[0])[:1] != [lanes]:
            return None
        side_by_side(self.row_groups, files)
        of_files = list(map(self._prepared_shards, files))
        if any(shards[:1] != [lanes] for shards in of_files):
            return None
        return [
            Part(file, start, end)
            for file, (_, *groups) in zip(files, of_files, strict=True)
            for start, end in pairwise([0, *accumulate(groups)])
        ]

    def _prepared_shards(self, file: File) -> list[int]:
        self._keep_tail(file)
        with _DECODING, self._open(file) as parquet:
            lanes, *groups = json.loads((parquet.metadata.metadata or {}).get(SHARDS_KEY, "[0]"))
            return [lanes, *groups] if sum(groups) == parquet.metadata.num_row_groups else []

    def read(self, part: Part, state: State | None, then: Sequence[Part]) -> Iterator[Document]:
        """The rows of a part, a group at a time. As many groups as parts in `then`, or one, are fetched before they are needed.

        Raises:
            RecipeError: see `row_groups`.
            OSError: it cannot be read.
        """
        file, end = part.file, part.end
        group, done = (state["group"], state["row"]) if state else (part.start, 0)
        tail = self.tails.get(file.address)
        while end is None or group < end:
            fetched = None if isinstance(file, LocalFile) else self._take(file, group, tail)
            tail = fetched.tail if fetched else None
            groups, rows, row_before, batches = self._read_group(file, group, fetched)
            del fetched
            end = groups if end is None else end
            following = [*(Part(file, later) for later in range(group + 1, end)), *then][: max(1, len(then))]
            first = 0  # rows of the group before the batch
            for batch in batches:
                skipped = min(max(done - first, 0), batch.num_rows)
                column, first = batch.column(0)[skipped:], first + skipped
                for document in documents_of(column, row_before + first, self.reading, file):
                    first += 1
                    while following and first >= FETCH_AHEAD * rows:
                        self._fetch_ahead(following.pop(0), file, tail)
                    yield document, {"group": group, "row": first}
            group, done = group + 1, 0

    def _read_group(self, file: File, group: int, fetched: RowGroup | None) -> tuple[int, int, int, Iterable[Any]]:
        """(row groups of the file, rows of this one, rows before it, its rows in batches); no rows behind the last group."""
        with _DECODING:  # what pyarrow makes of a footer may be larger than a row group, so no two at the same time
            parquet = self._open(file, fetched)
            metadata, index = parquet.metadata, self._index(parquet, file)
            if group >= metadata.num_row_groups:
                return metadata.num_row_groups, 0, 0, ()
            kept = self._footers.get(file.address)
            row_before = (kept.rows_before if kept else _rows_before(metadata))[group]
            at_once = IDS_AT_ONCE if self.reading.ids else ROWS_AT_ONCE
            batches = parquet.iter_batches(at_once, [group], [self.reading.column], use_threads=False)
            if metadata.row_group(group).column(index).total_uncompressed_size <= AT_ONCE_BYTES:
                batches = [*batches]
            if not kept:
                _give_back_memory()
            return metadata.num_row_groups, metadata.row_group(group).num_rows, row_before, batches

    def forget(self) -> None:
        """Give back what was fetched and not read."""
        self._ahead.clear()

    def _index(self, parquet: Any, file: File) -> int:
        """Of the column among those that are stored; a list is stored by what is in it."""
        check_column(parquet.schema_arrow, self.reading, file)
        stored, name = parquet.metadata.schema, self.reading.column
        paths = [stored.column(index).path for index in range(parquet.metadata.num_columns)]
        return next(n for n, path in enumerate(paths) if path == name or path.startswith(f"{name}.list."))

    def _open(self, file: File, fetched: RowGroup | None = None) -> Any:
        try:
            if isinstance(file, LocalFile):
                kept = self._footers.pop(file.address, None)
                parquet = pq.ParquetFile(file.address, metadata=kept and kept.metadata, buffer_size=1 << 20)
                if kept:
                    self._footers[file.address] = kept  # used last
                else:
                    self._keep_footer(file, Footer(parquet.metadata, _rows_before(parquet.metadata)))
                return parquet
            held = fetched or RowGroup(self.tails[file.address])
            return pq.ParquetFile(pa.PythonFile(_HeldFile(file, held), mode="r"))
        except pa.ArrowInvalid as error:
            raise RecipeError(f"{name_of(file)} ({file.size:,} bytes) is no Parquet file: {error}") from None

    def _keep_footer(self, file: File, footer: Footer) -> None:
        self._footers[file.address] = footer
        while sum(kept.size for kept in self._footers.values()) > KEPT_COLUMNS:
            del self._footers[next(iter(self._footers))]

    def _take(self, file: File, group: int, tail: Tail | None) -> RowGroup:
        ahead = self._ahead.pop((file.address, group), None)
        return ahead.result() if ahead else self._fetch(file, group, tail)

    def _fetch_ahead(self, part: Part, file: File, tail: Tail | None) -> None:
        """Begin to fetch it; `tail` is that of `file`."""
        key = part.file.address, part.start
        if not isinstance(part.file, LocalFile) and key not in self._ahead:
            self._ahead[key] = in_background(self._fetch, part.file, part.start, tail if part.file == file else None)

    def _fetch(self, file: File, group: int, tail: Tail | None) -> RowGroup:
        """The column of a row group, or nothing behind the last one."""
        tail = tail or self.tails.get(file.address) or _read_tail(file)
        known = self.ranges.get(file.address)
        start, end = known[group] if known else self._find_range(file, group, tail)
        return RowGroup(tail, start, file.read_range(start, end) if start < end else b"")

    def _find_range(self, file: File, group: int, tail: Tail) -> tuple[int, int]:
        """As `_range`; nothing behind the last group. pyarrow's footer is gone when it returns."""
        with _DECODING, self._open(file, RowGroup(tail)) as parquet:
            if group >= parquet.metadata.num_row_groups:
                return 0, 0
            return _range(parquet.metadata.row_group(group).column(self._index(parquet, file)))


def _rows_before(metadata: Any) -> list[int]:
    """How many rows a file has before each row group, and before its end."""
    rows = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return list(accumulate(rows, initial=0))


def _range(column: Any) -> tuple[int, int]:
    """First byte of a row group's column, and the one behind its last."""
    start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    return start, start + column.total_compressed_size


def _give_back_memory() -> None:
    """glibc keeps what pyarrow has used of many threads' heaps for a footer: 600 MB with 64 lanes."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _read_tail(file: File) -> Tail:
    tail = file.read_range(max(file.size - TAIL_BYTES, 0), file.size)
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    if tail.endswith(b"PAR1") and len(tail) < footer <= file.size:
        tail = file.read_range(file.size - footer, file.size - len(tail)) + tail
    return len(tail), _TAIL_CODEC.compress(tail, asbytes=True)


class _HeldFile(PlaceInFile):
    """Two pieces of it are at hand. What lies elsewhere is fetched."""

    def __init__(self, file: File, held: RowGroup) -> None:
        super().__init__(file)
        size, compressed = held.tail
        tail = _TAIL_CODEC.decompress(compressed, size, asbytes=True)
        self._pieces = [(file.size - len(tail), tail), (held.start, held.data)]

    def read(self, size: int = -1) -> bytes:
        start = self.place
        end = self.file.size if size < 0 else min(start + size, self.file.size)
        self.place = end
        for first, piece in self._pieces:
            if first <= start and end <= first + len(piece):
                return piece[start - first : end - first]
        return self.file.read_range(start, end) if start < end else b""
