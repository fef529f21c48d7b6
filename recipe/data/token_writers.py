"""Files of token ids, written document by document in bounded memory: Parquet that everybody reads, or shards of llm.c."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipe.data.columns import VOCABULARY_KEY
from recipe.data.formats import Ids, TokenIds
from recipe.data.parquet import SHARDS_KEY
from recipe.data.token_formats import LLMC_HEADER_BYTES, LLMC_MAGIC
from recipe.errors import RecipeError

COLUMN = "input_ids"
ROW_GROUP_TOKENS = 1 << 22  # at most, if it has several documents


@dataclass(frozen=True)
class Output:
    """What files of token ids are made of."""

    format: Literal["parquet", "llmc"]
    ids: TokenIds
    lanes: int  # that the shards of the source are for

    @property
    def ending(self) -> str:
        return "parquet" if self.format == "parquet" else "bin"

    def open(self, path: Path) -> "ParquetFile | LlmcFile":
        """A file to write."""
        return ParquetFile(path, self) if self.format == "parquet" else LlmcFile(path, self)

    def join(self, parts: Sequence[Path], path: Path) -> None:
        """Write the documents of several files as one."""
        with self.open(path) as joined:
            for part in parts:
                joined.append(part)


class ParquetFile:
    """A row is a document without end-of-text, and a row group holds documents of one shard of the source.

    How many row groups each shard has is in the file's metadata: a run with as many lanes reads the same shards again.
    """

    def __init__(self, path: Path, output: Output) -> None:
        self.documents = self.tokens = 0
        self._ids, self._lanes = output.ids, output.lanes
        # without nulls, and plain, which zstd packs best: read in two thirds of the time
        kind = pa.list_(pa.field("element", pa.type_for_alias(output.ids.dtype), nullable=False))
        metadata = {VOCABULARY_KEY: output.ids.vocabulary_hash, "recipe.tokenizer": output.ids.tokenizer}
        metadata |= {"recipe.end_of_text": str(output.ids.delimiters[0])}
        self._schema = pa.schema([pa.field(COLUMN, kind, nullable=False)], metadata)
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=False, write_statistics=False
        )
        self._row_groups: list[int] = []  # of each shard
        self._groups, self._held, self._held_tokens = 0, list[Ids](), 0

    def __enter__(self) -> "ParquetFile":
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        if kind is None:
            self._write()
        if self._row_groups:
            self._writer.add_key_value_metadata({SHARDS_KEY: json.dumps([self._lanes, *self._row_groups])})
        self._writer.close()

    def add(self, document: Ids) -> None:
        """Write a document of the shard at hand."""
        if self._held and self._held_tokens + len(document) > ROW_GROUP_TOKENS:
            self._write()
        self._held.append(document)
        self._held_tokens += len(document)
        self.documents += 1
        self.tokens += len(document)

    def end_shard(self) -> None:
        """What follows is of the next shard."""
        self._write()
        self._row_groups.append(self._groups)
        self._groups = 0

    def append(self, path: Path) -> None:
        """The documents of another file."""
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                self._write_group(file.read_row_group(group).column(0).combine_chunks())

    def _write(self) -> None:
        if not self._held:
            return
        rows = [self._wrapped(document) for document in self._held]
        ends = np.array([0, *accumulate(map(len, rows))], dtype=np.int32)
        kind = self._schema.field(0).type
        values = np.concatenate(rows).astype(kind.value_type.to_pandas_dtype(), copy=False)
        self._write_group(pa.ListArray.from_arrays(pa.array(ends), pa.array(values), type=kind))
        self._held, self._held_tokens = [], 0

    def _write_group(self, rows: Any) -> None:
        self._groups += 1
        self._writer.write_table(pa.Table.from_arrays([rows], schema=self._schema), row_group_size=max(len(rows), 1))

    def _wrapped(self, document: Ids) -> Ids:
        """With an end-of-text token at each end that has one: whoever reads a row takes one away."""
        end, delimiters = self._ids.delimiters[:1], self._ids.delimiters
        if self._ids.are_packed or not len(document):
            return document
        before, after = (end if place in delimiters else () for place in (document[0], document[-1]))
        return np.concatenate([before, document, after]).astype(np.int32) if before or after else document


class LlmcFile:
    """A header, and the tokens of all documents, each behind an end-of-text token."""

    def __init__(self, path: Path, output: Output) -> None:
        self.documents = self.tokens = 0
        self._path, self._dtype = path, np.dtype(output.ids.dtype)
        self._head = np.array([] if output.ids.are_packed else output.ids.delimiters[:1], self._dtype).tobytes()
        self._file: IO[bytes] = path.open("wb")
        self._file.write(bytes(LLMC_HEADER_BYTES))

    def __enter__(self) -> "LlmcFile":
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        with self._file as file:
            count = (file.tell() - LLMC_HEADER_BYTES) // self._dtype.itemsize
            if count >= 1 << 31:
                raise RecipeError(
                    f"{self._path.name} would have {count:,} tokens, and llm.c counts to 2^31: set --batch.lanes to more"
                )
            header = np.zeros(LLMC_HEADER_BYTES // 4, "<i4")
            header[:3] = LLMC_MAGIC[self._dtype.name], 1, count
            file.seek(0)
            file.write(header.tobytes())

    def add(self, document: Ids) -> None:
        """Write a document."""
        self._file.write(self._head + document.astype(self._dtype, copy=False).tobytes())
        self.documents += 1
        self.tokens += len(document)

    def end_shard(self) -> None:
        """Shards leave no trace."""

    def append(self, path: Path) -> None:
        """The documents of another file."""
        with path.open("rb") as file:
            file.seek(LLMC_HEADER_BYTES)
            shutil.copyfileobj(file, self._file)
