"""The documents of Arrow files, such as `datasets` writes them, a record batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from recipe.data.columns import check_column, documents_of
from recipe.data.files import File, LocalFile, name_of, open_bytes
from recipe.data.formats import Document, Part, Reading, State
from recipe.errors import RecipeError


class ArrowReader:
    """Reads parts of Arrow files, streams as well as those with a footer; parts count record batches."""

    tokens = 0  # not counted

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def columns(self, file: File) -> list[str]:
        """Their names.

        Raises:
            RecipeError: no Arrow file.
            OSError: it cannot be read.
        """
        return list(self._open(file)[0].names)

    def row_groups(self, file: File) -> list[int]:
        """Bytes of the column in each record batch; a local file is mapped.

        Raises:
            RecipeError: no Arrow file, or no such column in it.
            OSError: it cannot be read.
        """
        return [batch.column(0).nbytes if batch.num_rows else 0 for batch in self._batches(file)]

    def read(self, part: Part, state: State | None, then: Sequence[Part] = ()) -> Iterator[Document]:
        """The rows of a part behind `state`.

        Raises:
            RecipeError: see `row_groups`.
            OSError: it cannot be read.
        """
        first, done = (state["group"], state["row"]) if state else (part.start, 0)
        rows = 0
        for number, batch in enumerate(self._batches(part.file)):
            if part.end is not None and number >= part.end:
                return
            if number >= first:
                skipped = done if number == first else 0
                documents = documents_of(batch.column(0)[skipped:], rows + skipped, self.reading, part.file)
                for row, document in enumerate(documents, start=skipped + 1):
                    yield document, {"group": number, "row": row}
            rows += batch.num_rows

    def _batches(self, file: File) -> Iterator[pa.RecordBatch]:
        """The column alone, batch by batch."""
        schema, batches = self._open(file)
        check_column(schema, self.reading, file)
        try:
            for batch in batches:
                yield batch.select([self.reading.column])
        except pa.ArrowInvalid as error:
            raise _not_arrow(file, error) from None

    def _open(self, file: File) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        source: Any = pa.memory_map(file.address) if isinstance(file, LocalFile) else pa.PythonFile(open_bytes(file))
        try:
            has_footer = source.read(6) == b"ARROW1"
            source.seek(0)
            if not has_footer:
                stream = pa.ipc.open_stream(source)
                return stream.schema, iter(stream)
            reader = pa.ipc.open_file(source)
            return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        except pa.ArrowInvalid as error:
            raise _not_arrow(file, error) from None


def _not_arrow(file: File, error: pa.ArrowInvalid) -> RecipeError:
    return RecipeError(f"{name_of(file)} ({file.size:,} bytes) is no Arrow file: {error}")
