"""Blocks for the model: the lanes of a rank, read ahead in the background, and the validation set."""

from __future__ import annotations

import atexit
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from recipe.config.settings import Config
from recipe.data.documents import Source
from recipe.data.lanes import Lane
from recipe.data.tokenizer import document_encoder
from recipe.errors import RecipeError
from recipe.model.loss import IGNORED_TARGET
from recipe.plan.budget import UpdatePlan
from recipe.run.stop import StopRequest
from recipe.step.update import MicroBatch

UPDATES_READ_AHEAD = 2
_PADDING = -1  # in the last validation block


@dataclass(frozen=True)
class UpdateBlocks:
    """What one rank holds of one update.

    Args:
        blocks: int32 [blocks of the rank, sequence_length + 1], in lane order.
        batch: the same as inputs and targets on the device, int64 [blocks of the rank, sequence_length].
        sha256: uint8 [blocks of the rank, 32], hash of each block's tokens.
        lane_states: state of each of the rank's lanes before this update: a checkpoint holds these, and reading the update
            again leads to the next one.
        wait_seconds: time the caller waited for it.
        skipped_batches: what has been left out, or will be.
    """

    blocks: np.ndarray
    batch: MicroBatch
    sha256: np.ndarray
    lane_states: list[dict[str, Any]]
    wait_seconds: float
    skipped_batches: tuple[int, ...] = ()


def batch_index(update: int, skipped_batches: Iterable[int]) -> int:
    """Which draw an update trains on. What the lanes give at once for an update is a draw; all count from 1.

    They are the same number until a rollback leaves a draw out for good.
    """
    draw = update
    for skipped in sorted(skipped_batches):
        draw += skipped <= draw
    return draw


def make_lanes(config: Config, plan: UpdatePlan, rank: int, source: Source, tokenizer: Any) -> list[Lane]:
    """The lanes that `rank` owns."""
    encoder = document_encoder(tokenizer)

    def encode(texts: list[str]) -> Sequence[Sequence[int]]:
        return [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)]

    return [
        Lane(
            source,
            lane,
            plan.lanes,
            encode=encode,
            end_of_text=tokenizer.eos_token_id,
            sequence_length=plan.sequence_length,
            seed=config.run.seed,
            shuffle_window=config.data.shuffle_window,
        )
        for lane in plan.lanes_of_rank(rank)
    ]


def next_update(lanes: Sequence[Lane], blocks_per_lane: int, device: torch.device) -> UpdateBlocks:
    """Read, tokenize and pack the next update's blocks of these lanes, and move them to the device."""
    states = [lane.state_dict() for lane in lanes]
    blocks = np.concatenate([lane.next_blocks(blocks_per_lane) for lane in lanes])
    return UpdateBlocks(blocks, to_tensors(blocks, device), hash_blocks(blocks), states, wait_seconds=0.0)


class UpdateReader:
    """The blocks of `updates` updates, read, tokenized, packed and moved to the device in a background thread that starts now.

    At most `UPDATES_READ_AHEAD` updates wait in memory. The states that come with an update are its own, however far the thread
    has read.

    Args:
        lanes: of this rank.
        blocks_per_lane: of each in an update.
        updates: how many to read.
        device: where they go.
        done: updates before the first.
        skipped_batches: draws to leave out.
        stop: a request to stop ends the waiting for data.
        rank: that says an error.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        blocks_per_lane: int,
        updates: int,
        device: torch.device,
        *,
        done: int = 0,
        skipped_batches: Sequence[int] = (),
        stop: StopRequest | None = None,
        rank: int = 0,
    ) -> None:
        self._stop, self._rank, self._device = stop, rank, device
        self._ready: queue.Queue[UpdateBlocks | BaseException] = queue.Queue(maxsize=UPDATES_READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._read,
            args=(lanes, blocks_per_lane, done, updates, tuple(skipped_batches)),
            name="data-reader",
            daemon=True,
        )
        # However the process ends, the thread must not be inside the tokenizer then; one that waits for a network may be left.
        atexit.register(self.close)
        self._thread.start()

    def next_update(self) -> UpdateBlocks | None:
        """The next update's blocks; None where the run is asked to stop instead, or has to, since they cannot be read.

        Raises:
            RecipeError: they cannot be read, and there is no `stop` to ask.
        """
        started = time.perf_counter()
        while True:
            try:
                item = self._ready.get(timeout=0.2)
                break
            except queue.Empty:
                if self._stop is not None and self._stop.signal:
                    return None
        if isinstance(item, RecipeError) and self._stop is not None:
            self._stop.request_stop(item, self._rank)
            return None
        if isinstance(item, BaseException):
            raise item
        return replace(item, wait_seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Stop reading; wait for the thread, but not for a network that does not answer."""
        self._stopped.set()
        self._thread.join(timeout=2)
        atexit.unregister(self.close)

    def _read(
        self, lanes: Sequence[Lane], blocks_per_lane: int, done: int, updates: int, skipped_batches: tuple[int, ...]
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: pinned memory would else open the first GPU too
        try:
            for draw in range(batch_index(done, skipped_batches) + 1, batch_index(done + updates, skipped_batches) + 1):
                blocks = next_update(lanes, blocks_per_lane, self._device)
                if draw not in skipped_batches:
                    self._put(replace(blocks, skipped_batches=skipped_batches))
                if self._stopped.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: UpdateBlocks | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


def hash_blocks(blocks: np.ndarray) -> np.ndarray:
    """sha256 of each block's tokens as little-endian int32: uint8 [blocks, 32]."""
    digests = [sha256(block.astype("<i4").tobytes()).digest() for block in blocks]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def combine_hashes(hashes: np.ndarray) -> str:
    """One hash of an update: of the sorted hashes of its blocks [blocks, 32], so it does not depend on who held them."""
    return sha256(b"".join(sorted(row.tobytes() for row in hashes))).hexdigest()


def split_into_micro_batches(
    batch: MicroBatch, plan: UpdatePlan, rank: int, *, masked_row_last: bool = False
) -> list[MicroBatch]:
    """Cut the rank's inputs and targets, [blocks of the rank, tokens], into the micro-batches of the plan.

    A rank with fewer blocks than steps gets fully masked rows. With `masked_row_last` one more micro-batch follows, fully
    masked and as large as the smallest, so that a compiled model knows its shape.
    """
    inputs, targets = batch
    first = plan.blocks_of_rank(rank).start
    cuts = [slice(blocks.start - first, blocks.stop - first) for blocks in plan.micro_batches(rank)]
    smallest = max(1, min(cut.stop - cut.start for cut in cuts))
    masked = torch.zeros_like(inputs[:1]), torch.full_like(targets[:1], IGNORED_TARGET)
    micro_batches = [(inputs[cut], targets[cut]) if cut.stop > cut.start else masked for cut in cuts]
    if masked_row_last:
        micro_batches.append((masked[0].expand(smallest, -1), masked[1].expand(smallest, -1)))
    return micro_batches


def to_tensors(blocks: np.ndarray, device: torch.device) -> MicroBatch:
    """Blocks [rows, tokens + 1] -> (inputs, targets), int64 [rows, tokens]; padding becomes token 0 and a masked target."""
    tokens = torch.from_numpy(blocks.astype(np.int64))
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return inputs.clamp(min=0), targets.masked_fill(targets == _PADDING, IGNORED_TARGET)


@dataclass(frozen=True)
class ValidationSet:
    """Held-out documents in blocks.

    Args:
        blocks: int32 [blocks, sequence_length + 1]; the last one is padded.
        tokens: targets that are not padding.
        text_bytes: UTF-8 bytes of the documents, the measure of bits per byte.
    """

    blocks: np.ndarray
    tokens: int
    text_bytes: int


def pack_validation(
    documents: Iterator[str], tokenizer: Any, sequence_length: int, max_tokens: float
) -> ValidationSet | None:
    """Whole documents until `max_tokens` are reached; None where there are none.

    The stream starts with an end-of-text token, so that every token of every document is a target exactly once.
    """
    encoder = document_encoder(tokenizer)
    tokens, text_bytes = [tokenizer.eos_token_id], 0
    for document in documents:
        tokens += [*encoder.encode(document, add_special_tokens=False).ids, tokenizer.eos_token_id]
        text_bytes += len(document.encode("utf-8", "surrogatepass"))
        if len(tokens) > max_tokens:
            break
    if not text_bytes:
        return None
    targets = len(tokens) - 1
    rows = math.ceil(targets / sequence_length)
    stream = np.full(rows * sequence_length + 1, _PADDING, dtype=np.int32)
    stream[: len(tokens)] = tokens
    blocks = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)[::sequence_length].copy()
    return ValidationSet(blocks, targets, text_bytes)
