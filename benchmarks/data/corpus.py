"""The text of the benchmark, and its tokens in the files that each library reads."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipe.data.encode import DocumentEncoder
from recipe.data.standard_library import standard_library_files
from recipe.data.tokenizer import find_tokenizer

PARTS = 1024  # row groups, so that 64 lanes get about as much each
END_OF_TEXT = 50256  # of GPT-2
_CHUNK_BYTES = 1 << 26  # of litdata and MDS, as their examples have it


def documents(size: float) -> Iterator[tuple[str, str]]:
    """(first line, the rest) of documents of `size` bytes: the files of Python's standard library, again and again."""
    root, paths = standard_library_files()
    texts = ["\n" + (root / path).read_text("utf-8", errors="replace") for path in paths]
    for copy in itertools.count():
        for text in texts:
            size -= len(text.encode())
            if size < 0:
                return
            yield f"# copy {copy}", text


def write_text(directory: Path, size: float) -> None:
    """Parquet with a column of text, in row groups of about the same size."""
    directory.mkdir()
    _write_rows(directory / "text.parquet", "text", map("".join, documents(size)), pa.string(), size / PARTS)


def write_tokens(directory: Path, size: float, tokenizer: Any) -> int:
    """The tokens of the same text as Parquet and as a flat file, both of uint16. Returns how many, with end-of-text tokens.

    A row of Parquet is a document without end-of-text token; the flat file has one after each document, as nanoGPT's. What
    follows a first line is encoded once: it has the same tokens in every copy, since no token spans a digit and a line feed.
    """
    directory.mkdir()
    encoder, end = DocumentEncoder(tokenizer), [tokenizer.eos_token_id]
    encode = cache(lambda text: encoder.encode([text])[0])

    def rows() -> Iterator[np.ndarray]:
        with open(directory / "train.bin", "wb") as flat:
            for first_line, rest in documents(size):
                ids = np.concatenate([encode(first_line), encode(rest), end]).astype("<u2")
                flat.write(ids.tobytes())
                yield ids[:-1]

    # of this text a token has two bytes
    _write_rows(directory / "train.parquet", "input_ids", rows(), pa.list_(pa.uint16()), size / PARTS)
    return len(read_flat(directory))


def read_flat(tokens: Path) -> np.ndarray:
    """All tokens, memory-mapped."""
    return np.memmap(tokens / "train.bin", dtype=np.uint16, mode="r")


def write_litdata(directory: Path, tokens: Path, length: int) -> None:
    """Blocks of `length` + 1 tokens that share one, as `litdata.optimize` writes tokens."""
    import torch
    from litdata import TokensLoader
    from litdata.streaming.cache import Cache

    cache = Cache(str(directory), chunk_bytes=_CHUNK_BYTES, item_loader=TokensLoader(length + 1))
    for number, block in enumerate(_blocks(read_flat(tokens), length)):
        cache[number] = torch.from_numpy(block)
    cache.done()
    cache.merge()


def write_mds(directory: Path, tokens: Path, length: int) -> None:
    """The same blocks as samples of mosaicml-streaming."""
    columns = {"tokens": f"ndarray:uint16:{length + 1}"}
    with import_streaming().MDSWriter(out=str(directory), columns=columns, size_limit=_CHUNK_BYTES) as writer:
        for block in _blocks(read_flat(tokens), length):
            writer.write({"tokens": block})


def import_streaming() -> Any:
    """mosaicml-streaming, which imports torchvision for its image datasets; tokens need nothing of it."""
    if importlib.util.find_spec("torchvision") is None:
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms.functional",
            "torchvision.transforms",
        ):
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__dict__.update(VisionDataset=object, to_tensor=None)
    import streaming

    return streaming


def _blocks(stream: np.ndarray, length: int) -> Iterator[np.ndarray]:
    for start in range(0, len(stream) - length, length):
        yield np.array(stream[start : start + length + 1])


def _write_rows(path: Path, column: str, rows: Iterable[Any], kind: Any, group_bytes: float) -> None:
    with pq.ParquetWriter(path, pa.schema({column: kind})) as writer:
        held, size = list[Any](), 0
        for row in rows:
            held.append(row)
            size += row.nbytes if isinstance(row, np.ndarray) else len(row)
            if size >= group_bytes:
                writer.write_table(pa.table({column: pa.array(held, type=kind)}))
                held, size = [], 0
        if held:
            writer.write_table(pa.table({column: pa.array(held, type=kind)}))


def tokenizer_of(directory: Path) -> Any:
    """GPT-2's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    return find_tokenizer("the tokenizer", str(directory))
