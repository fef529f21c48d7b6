"""How a flat file of token ids is laid out: told by magic number, ending and the files beside it, and held against its size."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from recipe.config.text_files import is_remote, public_name, text_file_format
from recipe.data.files import COMPRESSIONS, LocalFile
from recipe.errors import RecipeError

LLMC_HEADER_BYTES = 1024
LLMC_MAGIC = {"uint16": 20240520, "uint32": 20240801}  # number, by type of the ids
_LLMC_DTYPES = {magic: dtype for dtype, magic in LLMC_MAGIC.items()}
_LLMC_VERSIONS = (1, 7)
_LLMC_EVALUATION = 20240522
_MEGATRON_MAGIC, _MEGATRON_HEADER = b"MMIDIDX\0\0", "<9sQBQQ"
_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_NPY_MAGIC = b"\x93NUMPY"
_WIDTHS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}  # bytes of an id
# Ending of a file beside the tokens -> that of the tokens
_SIDECARS = {".ds.index": ".ds", ".ds.metadata": ".ds", ".ds.loss": ".ds", ".idx": ".bin", ".csv.gz": ".npy"}
_VALIDATION = re.compile(r"(?<![a-z])val(idation)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class TokenFile:
    """A file of ids and what is known of it before they are read."""

    file: LocalFile
    format: str  # raw, npy, llm.c, datatrove, dolma or megatron
    dtype: str  # of numpy, little-endian
    offset: int  # bytes before the first id
    tokens: int
    documents: int | None = None  # None: only the ids tell
    tokenizer: str | None = None  # its name, if the file beside it says so

    @property
    def path(self) -> str:
        return self.file.address


def is_validation_file(path: str) -> bool:
    """Whether it is called `val` or `validation`, as nanoGPT's val.bin and llm.c's NAME_val_000000.bin are."""
    return _VALIDATION.search(os.path.basename(path)) is not None


def find_token_files(paths: Sequence[str], dtype: str | None) -> list[TokenFile]:
    """Look at files of ids; those that lie beside them may be given too.

    Raises:
        RecipeError: a file that cannot be read, is cut off, has no ids or is of no known layout, or two layouts.
    """
    files = [_look_at(path, dtype) for path in dict.fromkeys(map(_token_path, paths))]
    for what, values in (
        ("format", {file.format: file.path for file in files}),
        ("tokenizer", {file.tokenizer: file.path for file in files if file.tokenizer}),
    ):
        if len(values) > 1:
            listed = ", ".join(f"{path} ({value})" for value, path in values.items())
            raise RecipeError(f"data.token_files: give files of one {what}, not of {len(values)}: {listed}")
    return files


def _token_path(path: str) -> str:
    ending = next((ending for ending in _SIDECARS if path.endswith(ending)), None)
    return path.removesuffix(ending) + _SIDECARS[ending] if ending else path


def _look_at(path: str, dtype: str | None) -> TokenFile:
    if is_remote(path):
        raise RecipeError(
            f"data.token_files: {public_name(path)} is an address, and flat files are read from a disk: download them "
            "first, for example with `hf download REPOSITORY --repo-type dataset --local-dir DIRECTORY`"
        )
    try:
        return _layout(path, dtype)
    except OSError as error:
        raise RecipeError(
            f"data.token_files: cannot read {error.filename or path}: {error.strerror or error}"
        ) from None


def _layout(path: str, dtype: str | None) -> TokenFile:
    with open(path, "rb") as stream:
        head, status = stream.read(LLMC_HEADER_BYTES), os.fstat(stream.fileno())
    file = LocalFile(path, status.st_size, str(status.st_mtime_ns))
    if not file.size:
        raise RecipeError(f"data.token_files: {path} is empty")
    if head.startswith(tuple(COMPRESSIONS)):
        raise RecipeError(f"data.token_files: {path} is compressed: unpack it")
    if text_file_format(path):
        raise RecipeError(f"data.token_files: {path} is no flat file of ids, as .bin, .npy and .ds are")
    if path.endswith(".ds"):
        found = _datatrove(file)
    elif path.endswith(".bin") and os.path.exists(_beside(path, ".idx")):
        found = _megatron(file)
    elif path.endswith(".npy"):
        found = _numpy(file, head, dtype)
    else:
        found = _llmc(file, head) or _raw(file, dtype)
    if dtype and np.dtype(dtype).itemsize != np.dtype(found.dtype).itemsize:
        raise RecipeError(
            f"data.token_dtype = {dtype}, but {path} has ids of {found.dtype} ({found.format}): leave it out"
        )
    return found


def _beside(path: str, ending: str) -> str:
    return str(Path(path).with_suffix(ending))


def _count(file: LocalFile, dtype: str, offset: int = 0) -> int:
    """How many ids fit exactly into the file."""
    width = np.dtype(dtype).itemsize
    tokens, rest = divmod(file.size - offset, width)
    if rest:
        raise RecipeError(
            f"data.token_files: {file.address} has {file.size - offset:,} bytes of ids, no whole number of {dtype} "
            f"({width} bytes): it is cut off, or data.token_dtype is another"
        )
    return tokens


def _raw(file: LocalFile, dtype: str | None) -> TokenFile:
    if not dtype:
        raise RecipeError(
            f"{file.address} has no header that says how its ids are stored: set --data.token_dtype (nanoGPT's train.bin "
            "is uint16). Shards of llm.c, .ds with .ds.index, .bin with .idx, and .npy with a header or a .csv.gz need none"
        )
    return TokenFile(file, "raw", dtype, 0, _count(file, dtype))


def _llmc(file: LocalFile, head: bytes) -> TokenFile | None:
    """A shard of llm.c or modded-nanogpt; None if there is no such header."""
    path = file.address
    if len(head) < 4:
        return None
    magic = int.from_bytes(head[:4], "little")
    if magic == _LLMC_EVALUATION:
        raise RecipeError(f"{path} holds llm.c's multiple-choice questions (magic number {magic}), no text to train on")
    if magic not in _LLMC_DTYPES:
        if magic and len(head) == LLMC_HEADER_BYTES and not any(head[64:]):  # a header of something: no ids are all 0
            known = " and ".join(map(str, _LLMC_DTYPES))
            raise RecipeError(
                f"{path} has a header with the unknown magic number {magic}: those of llm.c's shards are {known}"
            )
        return None
    if len(head) < LLMC_HEADER_BYTES:
        raise RecipeError(
            f"{path} is cut off: llm.c's header has {LLMC_HEADER_BYTES:,} bytes, and it has {file.size:,}"
        )
    version, tokens = struct.unpack_from("<ii", head, 4)
    if version not in _LLMC_VERSIONS:
        raise RecipeError(f"{path} is a shard of llm.c of version {version}: 1 and 7 are known")
    dtype = _LLMC_DTYPES[magic]
    if tokens <= 0:
        raise RecipeError(f"{path} has {tokens} tokens, as its header says")
    size = LLMC_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if file.size != size:
        raise RecipeError(
            f"{path} has {file.size:,} bytes and not {size:,}, for the {tokens:,} tokens of its header: it is cut off, or "
            "still being written"
        )
    return TokenFile(file, "llm.c", dtype, LLMC_HEADER_BYTES, tokens)


def _numpy(file: LocalFile, head: bytes, dtype: str | None) -> TokenFile:
    """An array of numpy, or Dolma's ids without a header that are called so too; a .csv.gz says where documents are."""
    path, offset = file.address, 0
    if head.startswith(_NPY_MAGIC):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise RecipeError(f"data.token_files: {path} is no array of ids, or is cut off: {error}") from None
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype.byteorder == ">":
            raise RecipeError(
                f"data.token_files: {path} is an array of {array.dtype} with {array.ndim} dimensions: give one of integers, "
                "with one dimension"
            )
        if not len(array):
            raise RecipeError(f"data.token_files: {path} has 0 tokens")
        dtype, offset = array.dtype.name, int(array.offset)
    if not os.path.exists(_beside(path, ".csv.gz")):
        if not offset:
            return _raw(file, dtype)
        assert dtype
        return TokenFile(file, "npy", dtype, offset, _count(file, dtype, offset))
    last = int(_read_csv(path)[1].max())
    width, rest = divmod(file.size - offset, max(last, 1))
    if not dtype and (rest or width not in _WIDTHS):
        raise RecipeError(f"{path} has {file.size:,} bytes, which is no size for the {last:,} tokens of its .csv.gz")
    dtype = dtype or _WIDTHS[width]
    found = TokenFile(file, "dolma", dtype, offset, _count(file, dtype, offset))
    return _with_documents(found, None)


def _datatrove(file: LocalFile) -> TokenFile:
    path = file.address
    if not os.path.exists(path + ".index"):
        raise RecipeError(f"{path}.index is missing: it says where the documents of {path} end")
    ends = _read_ends(path)
    last = int(ends[-1]) if len(ends) else 0
    width, rest = divmod(file.size, max(last, 1))
    tokenizer = None
    if os.path.exists(path + ".metadata"):
        lines = Path(path + ".metadata").read_text(encoding="utf-8", errors="replace").splitlines()
        name, _, size = lines[0].rpartition("|") if lines else ("", "", "")
        tokens = lines[1].strip() if len(lines) > 1 else ""
        if not (size.isdecimal() and tokens.isdecimal()):
            raise RecipeError(
                f"{path}.metadata is not what datatrove writes: TOKENIZER|BYTES OF A TOKEN, and the tokens"
            )
        if int(size) * int(tokens) != file.size:
            raise RecipeError(
                f"{path} has {file.size:,} bytes and not {tokens} tokens of {size} bytes, as {path}.metadata says: it is "
                "cut off, or not of this folder"
            )
        tokenizer = None if not name or name.startswith("Unknown Tokenizer") else name
        width, rest = int(size), 0
    if rest or width not in (2, 4):
        raise RecipeError(f"{path} has {file.size:,} bytes, which does not fit the {last:,} tokens of {path}.index")
    return _with_documents(TokenFile(file, "datatrove", _WIDTHS[width], 0, file.size // width), tokenizer)


def _megatron(file: LocalFile) -> TokenFile:
    path = file.address
    index = _beside(path, ".idx")
    size = os.path.getsize(index)
    code, sequences, documents = _read_megatron_header(index)
    dtype = _MEGATRON_DTYPES.get(code, "")
    if np.dtype(dtype or float).kind == "f":
        raise RecipeError(f"{index} says that {path} holds {dtype or f'type {code}'}, and ids are integers")
    needed = struct.calcsize(_MEGATRON_HEADER) + 12 * sequences + 8 * documents
    if size not in (needed, needed + sequences):  # with a mode of each sequence
        raise RecipeError(
            f"{index} has {size:,} bytes and not {needed:,}, for its {sequences:,} sequences: it is cut off"
        )
    if documents < 2:
        raise RecipeError(f"{index} has 0 documents")
    return _with_documents(TokenFile(file, "megatron", dtype, 0, _count(file, dtype)), None)


def _with_documents(file: TokenFile, tokenizer: str | None) -> TokenFile:
    """With what the index says, once that fits the file."""
    starts, ends = document_bounds(file)
    before = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    if not len(ends):
        raise RecipeError(f"the index of {file.path} has 0 documents")
    if (starts < before).any() or (ends < starts).any():
        number = int(np.flatnonzero((starts < before) | (ends < starts))[0])
        raise RecipeError(f"the index of {file.path} runs backwards at document {number:,}")
    if ends[-1] != file.tokens:
        raise RecipeError(
            f"{file.path} has {file.tokens:,} tokens of {file.dtype}, and its index ends at {ends[-1]:,}: one of the two is "
            "cut off or of another file"
        )
    return TokenFile(file.file, file.format, file.dtype, file.offset, file.tokens, len(ends), tokenizer)


@lru_cache(maxsize=8)  # regions of one file are read one after the other
def document_bounds(file: TokenFile) -> tuple[np.ndarray, np.ndarray]:
    """First token of each document of a file with an index, and the one behind its last: int64.

    Raises:
        RecipeError: the index is not what it should be.
        OSError: it cannot be read, or not now.
    """
    if file.format == "dolma":
        return _read_csv(file.path)
    if file.format == "datatrove":
        ends = _read_ends(file.path)
        return np.concatenate([np.zeros(1, np.int64), ends[:-1]]), ends
    index = _beside(file.path, ".idx")
    _, sequences, documents = _read_megatron_header(index)
    offset = struct.calcsize(_MEGATRON_HEADER)
    lengths = np.fromfile(index, "<i4", sequences, offset=offset)
    places = np.fromfile(index, "<i8", sequences, offset=offset + 4 * sequences)
    numbers = np.fromfile(index, "<i8", documents, offset=offset + 12 * sequences)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or (places != bounds[:-1] * np.dtype(file.dtype).itemsize).any():
        raise RecipeError(f"the sequences of {index} do not lie one behind the other")
    if numbers[0] != 0 or numbers[-1] != sequences or (np.diff(numbers) < 0).any():
        raise RecipeError(f"the documents of {index} run backwards, or are not all of its {sequences:,} sequences")
    return bounds[numbers[:-1]], bounds[numbers[1:]]


def _read_ends(path: str) -> np.ndarray:
    index = path + ".index"
    if os.path.getsize(index) % 8:
        raise RecipeError(
            f"{index} is cut off: it has {os.path.getsize(index):,} bytes, no whole number of 8-byte ends"
        )
    return np.fromfile(index, "<i8")  # unsigned, of which none needs the last bit


def _read_csv(path: str) -> tuple[np.ndarray, np.ndarray]:
    import pandas  # takes half a second to import

    index = _beside(path, ".csv.gz")
    try:
        rows = pandas.read_csv(index, header=None, usecols=[0, 1], dtype=np.int64).to_numpy()
    except (ValueError, EOFError, zlib.error) as error:
        raise RecipeError(
            f"{index} does not say `start,end` of each document: {str(error) or 'it is cut off'}"
        ) from None
    return rows[:, 0], rows[:, 1]


def _read_megatron_header(index: str) -> tuple[int, int, int]:
    """(code of the type of ids, sequences, places where documents begin or end)"""
    with open(index, "rb") as stream:
        head = stream.read(struct.calcsize(_MEGATRON_HEADER))
    if not head.startswith(_MEGATRON_MAGIC):
        raise RecipeError(
            f"{index} has an unknown magic number ({head[:9]!r}): an index of Megatron begins with {_MEGATRON_MAGIC!r}"
        )
    if len(head) < struct.calcsize(_MEGATRON_HEADER):
        raise RecipeError(f"{index} is cut off: it has {len(head)} bytes")
    _, version, code, sequences, documents = struct.unpack(_MEGATRON_HEADER, head)
    if version != 1:
        raise RecipeError(f"{index} is of version {version}: 1 is known")
    return code, sequences, documents
