"""The documents in a column of Parquet or Arrow: texts, or lists of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recipe.data.files import File, name_of
from recipe.data.formats import READ_IDS, BadRow, Ids, NotInRow, Reading, ids_of_row, is_one_of, no_column
from recipe.errors import RecipeError

VOCABULARY_KEY = b"recipe.vocabulary_sha256"  # of a file's metadata: see `recipe.data.tokenizer.vocabulary_hash`
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def check_column(schema: pa.Schema, reading: Reading, file: File) -> None:
    """Check that a file has the column, and in it what is to be read.

    Raises:
        RecipeError: it does not.
    """
    column, made_with = reading.column, (schema.metadata or {}).get(VOCABULARY_KEY, b"").decode()
    if reading.ids and made_with not in ("", reading.ids.vocabulary_hash):
        raise RecipeError(
            f"{name_of(file)} was prepared with another tokenizer than {reading.ids.tokenizer!r} (its vocabulary has the "
            f"SHA-256 {made_with[:16]}..., not {reading.ids.vocabulary_hash[:16]}...): set --data.tokenizer to that one"
        )
    if column not in schema.names:
        raise RecipeError(f"{name_of(file)} {no_column(reading, schema.names)}")
    kind = schema.field(column).type
    if reading.ids:
        if not holds_ids(kind):
            raise RecipeError(
                f"column {column!r} of {name_of(file)} holds {kind}, not lists of integers: set --data.token_column to one of "
                f"{[field.name for field in schema if holds_ids(field.type)] or 'another file'}"
            )
        return
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(kind) for is_text in _TEXTS):
        ways = READ_IDS if holds_ids(kind) else "set --data.text_column"
        raise RecipeError(f"column {column!r} of {name_of(file)} holds {kind}, not text: {ways}")


def holds_ids(kind: pa.DataType) -> bool:
    """Whether values of this type are lists of integers."""
    return any(is_list(kind) for is_list in _LISTS) and pa.types.is_integer(kind.value_type)


def documents_of(column: Any, row_before: int, reading: Reading, file: File) -> Iterator[str | Ids | BadRow]:
    """Those of a piece of the column, with `row_before` rows before it in the file."""
    row = row_before
    for document in _ids_of(column, reading) if reading.ids else _texts_of(column, reading):
        row += 1
        if isinstance(document, NotInRow):
            yield BadRow(f"row {row:,} of {name_of(file)}", str(document))
        else:
            yield document


def _texts_of(column: Any, reading: Reading) -> Iterator[str | NotInRow]:
    for value in column:
        try:
            yield value.as_py() or ""
        except UnicodeDecodeError:
            yield NotInRow(f"has bytes that are not UTF-8 in column {reading.column!r}")


def _ids_of(column: Any, reading: Reading) -> Iterator[Ids | NotInRow]:
    ids = reading.ids
    assert ids is not None
    lengths = pc.list_value_length(column)
    ends = np.cumsum((pc.fill_null(lengths, 0) if lengths.null_count else lengths).to_numpy(zero_copy_only=False))
    starts = np.concatenate([[0], ends[:-1]])
    values = column.flatten()
    is_null = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    tokens = (values if is_null is None else pc.fill_null(values, 0)).to_numpy(zero_copy_only=False)
    if is_null is None and (not len(tokens) or (tokens.min() >= 0 and tokens.max() < ids.vocabulary)):
        if len(tokens) and not ids.are_packed:  # as `strip_ends`, of all at once
            ends = ends - (is_one_of(tokens[ends - 1], ids.delimiters) & (starts < ends))
            opening = tokens[np.minimum(starts, len(tokens) - 1)]
            starts = starts + (is_one_of(opening, ids.delimiters) & (starts < ends))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield tokens[start:end]
        return
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if is_null is not None and is_null[start:end].any():
            yield NotInRow(f"has a null among the token ids of column {reading.column!r}")
            continue
        try:
            yield ids_of_row(tokens[start:end], ids)
        except NotInRow as error:
            yield error
