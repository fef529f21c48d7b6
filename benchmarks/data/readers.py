"""What is compared: each reads tokens into int64 tensors [blocks, tokens], inputs and targets, as a training takes them.

A reader is a generator of such pairs; it ends with its text, unless the text is an endless stream.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.data.corpus import END_OF_TEXT, import_streaming, read_flat, tokenizer_of
from benchmarks.reading import open_lanes, start


class Batch(NamedTuple):
    """Tokens, and how many more the reader holds that it has read, and tokenized, for batches to come."""

    inputs: Tensor
    targets: Tensor
    held: int = 0


@dataclass(frozen=True)
class Job:
    """What a reader reads.

    Args:
        root: directory of `text`, `tokens`, `prepared`, `litdata`, `mds`, `tokenizer`.
        lanes: of ours.
        most_tokens: that ours reads, which is an endless stream; at most all that there are.
        blocks: of an update, or of a batch.
        length: targets of a block.
        processes: of `datasets`.
        validation_one_in: documents that ours holds out by their hash.
    """

    root: str
    lanes: int = 8
    most_tokens: float = math.inf
    blocks: int = 64
    length: int = 2048
    processes: int = 1
    validation_one_in: int | None = 100

    @property
    def path(self) -> Path:
        return Path(self.root)


SOURCES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "text": lambda root: {"data.text_files": [str(root / "text/text.parquet")]},
    "prepared": lambda root: {"data.token_files": [str(root / "prepared/*.parquet")]},
    "parquet": lambda root: {"data.token_files": [str(root / "tokens/train.parquet")]},
    "flat": lambda root: {"data.token_files": [str(root / "tokens/train.bin")], "data.token_dtype": "uint16"},
}


def settings_of(job: Job, source: str) -> dict[str, Any]:
    """Settings of the recipe that reads one of `SOURCES`."""
    return {
        "run.directory": str(job.path / "run"),
        "batch.lanes": job.lanes,
        "batch.tokens_per_update": job.blocks * job.length,
        "data.sequence_length": job.length,
        "data.tokenizer": str(job.path / "tokenizer"),
        "data.validation_one_in": job.validation_one_in,
        "data.retry_seconds": 0,
        **SOURCES[source](job.path),
    }


def ours_from_text(job: Job) -> Iterator[Batch]:
    """This recipe: text, tokenized on the fly."""
    return _ours(job, "text")


def ours_from_prepared(job: Job) -> Iterator[Batch]:
    """This recipe: what `recipe prepare` writes."""
    return _ours(job, "prepared")


def ours_from_parquet(job: Job) -> Iterator[Batch]:
    """This recipe: rows of ids, in small row groups."""
    return _ours(job, "parquet")


def ours_from_flat(job: Job) -> Iterator[Batch]:
    """This recipe: a flat file of ids."""
    return _ours(job, "flat")


def _ours(job: Job, source: str) -> Iterator[Batch]:
    from recipe.data.blocks import next_update

    tokenizer_of(job.path / "tokenizer")  # imports what it needs; it is loaded again
    yield from _started()
    run = start(settings_of(job, source))
    lanes = open_lanes(run)
    given, held, most = 0, 0, min(job.most_tokens, len(read_flat(job.path / "tokens")))
    while given + held < most:
        inputs, targets = next_update(lanes, run.plan.update.blocks_per_lane, run.device).batch
        given, held = given + inputs.numel(), sum(map(_held, lanes))
        yield Batch(inputs, targets, held)


def _held(lane: Any) -> int:
    """Tokens of a lane that are read and not given."""
    in_window = (len(lane._window_order) - lane._block) * lane.sequence_length if lane.is_ready else 0
    return int(in_window + lane._tokens._available)


def bare_tokenizer(job: Job) -> Iterator[Batch]:
    """The limit on the fly: documents in memory, `encode_batch_fast`, ids to numpy, nothing else."""
    encoder = tokenizer_of(job.path / "tokenizer").backend_tokenizer
    texts = pq.read_table(job.path / "text/text.parquet")["text"].to_pylist()
    yield from _started()
    for first in range(0, len(texts), 256):
        encodings = encoder.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
        ids = torch.from_numpy(np.concatenate([np.array(encoding.ids, dtype=np.int64) for encoding in encodings]))
        yield Batch(ids, ids)


def map_and_group(job: Job) -> Iterator[Batch]:
    """`datasets` as in transformers' language-modelling example: map to tokens, map to blocks, then tensors of them.

    The labels are a copy of the inputs there, which the model shifts. What is left of each 1,000 documents is dropped.
    """
    import datasets

    datasets.disable_progress_bars()
    tokenizer_of(job.path / "tokenizer")
    yield from _started()
    tokenizer, length, cache = tokenizer_of(job.path / "tokenizer"), job.length, job.path / f"cache-{job.processes}"

    def group_texts(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = {name: list(itertools.chain(*rows)) for name, rows in examples.items()}
        total = len(joined["input_ids"]) // length * length
        result = {name: [ids[i : i + length] for i in range(0, total, length)] for name, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    shutil.rmtree(cache, ignore_errors=True)
    text = datasets.load_dataset("parquet", data_files=str(job.path / "text/text.parquet"), cache_dir=str(cache))
    processes = job.processes if job.processes > 1 else None
    rows = text["train"].map(
        lambda examples: tokenizer(examples["text"]), batched=True, num_proc=processes, remove_columns=["text"]
    )
    blocks = rows.map(group_texts, batched=True, num_proc=processes)
    for batch in blocks.with_format("torch").iter(batch_size=job.blocks):
        yield Batch(batch["input_ids"], batch["labels"])
    shutil.rmtree(cache, ignore_errors=True)


def raw_memmap(job: Job) -> Iterator[Batch]:
    """The limit of prepared tokens: blocks in their order, cast to int64, one copy that inputs and targets share."""
    yield from _started()
    stream, length = read_flat(job.path / "tokens"), job.length
    windows = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
    for first in range(0, len(windows), job.blocks):
        yield _shifted(torch.from_numpy(windows[first : first + job.blocks].astype(np.int64)))


def nanogpt(job: Job) -> Iterator[Batch]:
    """nanoGPT's `get_batch`: blocks that begin anywhere, drawn with replacement; as many tokens as there are."""
    yield from _started()
    length = job.length
    for _ in range(len(read_flat(job.path / "tokens")) // (job.blocks * length)):
        stream = read_flat(job.path / "tokens")  # opened anew for each batch, as there, against a leak
        starts = torch.randint(len(stream) - length, (job.blocks,))
        inputs = torch.stack([torch.from_numpy(stream[i : i + length].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(stream[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        yield Batch(inputs, targets)


def datasets_stream(job: Job) -> Iterator[Batch]:
    """`datasets` streaming in torch format, batches of rows; end-of-text and packing by `torch.cat`."""
    import datasets

    yield from _started()
    rows = datasets.load_dataset(
        "parquet", data_files=str(job.path / "tokens/train.parquet"), split="train", streaming=True
    )
    end, size = torch.tensor([END_OF_TEXT]), job.blocks * job.length
    held, count = list[Tensor](), 0
    for batch in rows.with_format("torch").iter(batch_size=64):
        for ids in batch["input_ids"]:
            held += [ids, end]
            count += len(ids) + 1
        while count > size:
            stream = torch.cat(held)
            yield _shifted(stream[: size + 1].unfold(0, job.length + 1, job.length))
            held, count = [stream[size:]], count - size


def litdata(job: Job) -> Iterator[Batch]:
    """litdata's TokensLoader with its loader, shuffled, without workers."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    yield from _started()
    directory = str(job.path / "litdata")
    rows = StreamingDataset(directory, item_loader=TokensLoader(job.length + 1), shuffle=True)
    for batch in StreamingDataLoader(rows, batch_size=job.blocks):
        yield _shifted(batch.long())


def mosaicml(job: Job) -> Iterator[Batch]:
    """mosaicml-streaming with torch's loader, shuffled, without workers."""
    StreamingDataset = import_streaming().StreamingDataset  # noqa: N806
    from torch.utils.data import DataLoader

    yield from _started()
    rows = StreamingDataset(local=str(job.path / "mds"), shuffle=True, batch_size=job.blocks)
    for batch in DataLoader(rows, batch_size=job.blocks):
        yield _shifted(batch["tokens"].long())


def _shifted(blocks: Tensor) -> Batch:
    return Batch(blocks[:, :-1], blocks[:, 1:])


def _started() -> Iterator[Batch]:
    """Imports are done: what is read from here on counts."""
    yield Batch(torch.empty(0, 0), torch.empty(0, 0))
