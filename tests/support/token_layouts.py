"""Writers of flat files of token ids, each byte by byte as the documents of its layout say."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

END, BEGINNING = 256, 257
Write = Callable[[Path, Sequence[Sequence[int]]], list[str]]


def put(path: Path, ids: Sequence[int], dtype: str, head: bytes = b"") -> str:
    path.write_bytes(head + np.array(ids, dtype=dtype).tobytes())
    return str(path)


def before(documents: Sequence[Sequence[int]]) -> list[int]:
    return [token for document in documents for token in (END, *document)]


def after(documents: Sequence[Sequence[int]]) -> list[int]:
    return [token for document in documents for token in (*document, END)]


def around(documents: Sequence[Sequence[int]]) -> list[int]:
    return [token for document in documents for token in (BEGINNING, *document, END)]


def raw_after(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    return [put(directory / "train.bin", after(documents), "<u2")]


def raw_before(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    return [put(directory / "tokens", before(documents), "<u2")]


def raw_around(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    return [put(directory / "train.bin", around(documents), "<u2")]


def raw_files(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    """Each with whole documents, one before and one after."""
    raw_after(directory, documents[:6])
    raw_before(directory, documents[6:])
    return [str(directory / "train.bin"), str(directory / "tokens")]


def llmc_header(tokens: int, magic: int = 20240520, version: int = 1) -> bytes:
    return struct.pack("<256i", magic, version, tokens, *[0] * 253)


def llmc(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    ids = before(documents)
    return [put(directory / "a_train_000001.bin", ids, "<u2", llmc_header(len(ids)))]


def llama(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    ids = before(documents)
    return [put(directory / "a_train_000001.bin", ids, "<u4", llmc_header(len(ids), 20240801, 7))]


def llmc_shards(sizes: Sequence[int]) -> Write:
    """Shards of so many tokens, whatever is there, and one with the rest."""

    def write(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
        ids = before(documents)
        shards = [ids[a:b] for a, b in pairwise([0, *accumulate(sizes), len(ids)])]
        return [
            put(directory / f"a_train_{number:06d}.bin", shard, "<u2", llmc_header(len(shard)))
            for number, shard in enumerate(shards, 1)
        ]

    return write


def datatrove(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    path = put(directory / "00000_unshuffled.ds", after(documents), "<u2")
    ends = [*accumulate(len(document) + 1 for document in documents)]
    Path(path + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(path + ".metadata").write_text(f"gpt2|2\n{ends[-1]}\n{ends[-1]} T", encoding="utf-8")
    return [path, path + ".index", path + ".metadata"]  # as a glob gives them


def datatrove_bare(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    """Of 4 bytes a token, without end-of-text and metadata: an empty document has no token."""
    path = put(directory / "a.ds", [token for document in documents for token in document], "<u4")
    ends = [*accumulate(map(len, documents))]
    Path(path + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return [path]


def dolma(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    path = put(directory / "part-0-00000.npy", around(documents), "<u4")
    ends = [*accumulate(len(document) + 2 for document in documents)]
    with gzip.open(directory / "part-0-00000.csv.gz", "wt") as rows:
        for number, (start, end) in enumerate(pairwise([0, *ends])):
            rows.write(f'{start},{end},id-{number},"s3://bucket/a, b.gz",{number}\n')
    return [path]


def numpy_array(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    np.save(directory / "a.npy", np.array(after(documents), dtype=np.int64))
    return [str(directory / "a.npy")]


def numpy_documents(directory: Path, documents: Sequence[Sequence[int]]) -> list[str]:
    (path,) = dolma(directory, documents)
    np.save(path, np.array(around(documents), dtype=np.uint16))
    return [path]


def megatron(directory: Path, documents: Sequence[Sequence[int]], code: int = 8, dtype: str = "<u2") -> list[str]:
    """Documents of several sequences, as with --split-sentences, and a mode of each sequence."""
    sequences, numbers = list[list[int]](), [0]
    for document in documents:
        ids = [*document, END]
        sequences += [ids[:4], ids[4:]] if len(ids) > 4 else [ids]
        numbers.append(len(sequences))
    path = put(directory / "a_text_document.bin", [token for ids in sequences for token in ids], dtype)
    lengths = np.array([len(ids) for ids in sequences], dtype="<i4")
    places = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(numbers))
    index = head + lengths.tobytes() + places.tobytes() + np.array(numbers, dtype="<i8").tobytes()
    Path(path).with_suffix(".idx").write_bytes(index + bytes(len(sequences)))
    return [str(Path(path).with_suffix(".idx"))]


# A shard that begins with a delimiter, one that ends with one, one within a document, and one of a single delimiter
SHARDS = llmc_shards([6, 3, 40, 17, 1, 50, 60, 10])
LAYOUTS: dict[str, tuple[Write, str | None]] = {
    **{"raw": (raw_after, "uint16"), "raw, before": (raw_before, "uint16"), "raw, around": (raw_around, "uint16")},
    **{"raw, several": (raw_files, "uint16")},
    **{"llm.c": (llmc, None), "llm.c, llama": (llama, None), "llm.c, shards": (SHARDS, None)},
    **{"llm.c, even shards": (llmc_shards([30] * 9), None)},
    **{"datatrove": (datatrove, None), "datatrove, bare": (datatrove_bare, None)},
    **{"dolma": (dolma, None), "dolma, dtype given": (dolma, "uint32")},
    **{"numpy": (numpy_array, None), "numpy, csv": (numpy_documents, None), "megatron": (megatron, None)},
}
