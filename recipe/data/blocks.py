"""Blocks for the model: the lanes of a rank, read ahead in the background, and micro-batches."""

import atexit
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipe.data.documents import Source
from recipe.data.encode import DocumentEncoder
from recipe.data.files import in_background
from recipe.data.lanes import Lane, Ranges
from recipe.data.streams import DocumentStream, LaneOrder
from recipe.errors import RecipeError
from recipe.plan.budget import UpdatePlan
from recipe.run.run import Run

IGNORED_TARGET = -100  # of a masked target, as in torch.nn.functional.cross_entropy
# Inputs and targets, int64 [rows, sequence_length], on the model's device; then, if attention stays inside documents, what
# `document_starts` gives.
MicroBatch = tuple[Tensor, ...]
STARTS_PER_ROW = 16  # places for starts of documents; a constant shape, since each shape is a graph of its own
UPDATES_READ_AHEAD = 2
REPORT_SECONDS = 10.0  # between lines that say how far reading is, while an update waits for it
PADDING = -1  # in the last block of a validation set


@dataclass(frozen=True)
class UpdateBlocks:
    """What one rank holds of one update."""

    blocks: np.ndarray  # int32 [blocks of the rank, sequence_length + 1], in lane order
    batch: MicroBatch  # the same as inputs and targets on the device
    sha256: np.ndarray  # uint8 [blocks of the rank, 32], hash of each block's tokens
    # State of each of the rank's lanes before this update: a checkpoint holds these, and reading the update again
    # leads to the next one
    lane_states: list[dict[str, Any]]
    update: int = 0  # which one, from 1
    wait_seconds: float = 0.0  # time the caller waited for it
    bad_rows: int = 0  # rows without text that the rank has left out, up to here and a little further
    # Of each source: targets from it in these blocks, and complete passes over it, of the lane that has made most
    source_tokens: tuple[int, ...] = ()
    source_passes: tuple[int, ...] = ()
    skipped_blocks: Ranges = ()  # of every lane, that rollbacks have left out, or that will be


def make_lanes(run: Run, sources: Sequence[Source], tokenizer: Any) -> list[Lane]:
    """The lanes that this rank owns."""
    config, plan = run.config, run.plan.update
    order = LaneOrder(plan.lanes, config.run.seed, config.data.shuffle_blocks)
    encode = None if all(source.holds_ids for source in sources) else DocumentEncoder(tokenizer).encode
    lanes = []
    for index in plan.lanes_of_rank(run.rank):
        streams = [DocumentStream(source, None if source.holds_ids else encode, index, order) for source in sources]
        lanes.append(Lane(streams, plan.sequence_length, tokenizer.eos_token_id))
        lanes[-1].document_start = tokenizer.eos_token_id if config.data.document_mask else None
    return lanes


def next_update(lanes: Sequence[Lane], blocks_per_lane: int, device: torch.device) -> UpdateBlocks:
    """Read, tokenize and pack the next update's blocks of these lanes, and move them to the device."""
    states = [lane.state_dict() for lane in lanes]
    if any(stream.source.is_remote for stream in lanes[0].streams):  # a lane may wait for a network
        reading = [in_background(lane.next_blocks, blocks_per_lane) for lane in lanes]
        wait(reading)  # also if one has failed: no thread may be inside the tokenizer when the process ends
        blocks = np.concatenate([future.result() for future in reading])
    else:  # the interpreter's lock lets one go at a time, and threads that wait for it take it from the training's
        blocks = np.concatenate([lane.next_blocks(blocks_per_lane) for lane in lanes])
    return UpdateBlocks(
        blocks,
        to_tensors(blocks, device, lanes[0].document_start),
        hash_blocks(blocks),
        states,
        bad_rows=lanes[0].bad_rows,
        source_tokens=tuple(np.sum([lane.source_tokens for lane in lanes], axis=0).tolist()),
        source_passes=tuple(map(max, zip(*(lane.passes for lane in lanes), strict=True))),
        skipped_blocks=lanes[0].skipped,
    )


class UpdateReader:
    """The blocks of the updates that are left, read, tokenized, packed and moved to the device in a background thread.

    The thread starts at once. At most `UPDATES_READ_AHEAD` updates wait in memory. The states that come with an update are its
    own, however far the thread has read.

    `done` updates come before the first.
    """

    def __init__(self, run: Run, lanes: Sequence[Lane], done: int = 0) -> None:
        self.run, self.lanes, self.done = run, lanes, done
        self._ready: queue.Queue[UpdateBlocks | BaseException] = queue.Queue(maxsize=UPDATES_READ_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="data-reader", daemon=True)
        # However the process ends, the thread must not be inside the tokenizer then; one that waits for a network may be left.
        atexit.register(self.close)
        self._thread.start()

    def next_update(self) -> UpdateBlocks:
        """The next update's blocks.

        Raises:
            Stopped: a rank was asked to stop, or has to, since its blocks cannot be read; the error is printed.
        """
        started = time.perf_counter()
        item, next_report = None, started + REPORT_SECONDS
        while item is None:
            try:
                item = self._ready.get(timeout=0.2)
            except queue.Empty:
                if self.run.stop.signal:
                    self.run.stop.agree()
                if time.perf_counter() > next_report:
                    next_report += REPORT_SECONDS
                    ready = sum(lane.is_ready for lane in self.lanes)
                    self.run.console.say(f"reading text: {ready} of {len(self.lanes)} lanes have what the update needs")
        if isinstance(item, RecipeError):
            self.run.stop.request_stop(item, self.run.rank)
            self.run.stop.agree()
        if isinstance(item, BaseException):
            raise item
        return replace(item, wait_seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Stop reading; wait for the thread, but not for a network that does not answer."""
        self._closed.set()
        self._thread.join(timeout=2)
        atexit.unregister(self.close)

    def _read(self) -> None:
        device, plan = self.run.device, self.run.plan
        try:
            # Of this thread: pinned memory would else open the first GPU too. One without a number is the first.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                for update in range(self.done + 1, plan.planned_updates + 1):
                    if self._closed.is_set():
                        break
                    blocks = next_update(self.lanes, plan.update_at(update).blocks_per_lane, device)
                    self._put(replace(blocks, update=update))
        except BaseException as error:
            self._put(error)

    def _put(self, item: UpdateBlocks | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


def hash_blocks(blocks: np.ndarray) -> np.ndarray:
    """sha256 of each block's tokens as little-endian int32: uint8 [blocks, 32]."""
    digests = [sha256(block).digest() for block in np.ascontiguousarray(blocks, dtype="<i4")]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32)


def combine_hashes(hashes: np.ndarray) -> str:
    """One hash of an update: of the sorted hashes of its blocks [blocks, 32], so it does not depend on who held them."""
    return sha256(b"".join(sorted(row.tobytes() for row in hashes))).hexdigest()


def split_into_micro_batches(
    batch: MicroBatch, plan: UpdatePlan, rank: int, *, masked_row_last: bool = False
) -> list[MicroBatch]:
    """Split the rank's blocks into the micro-batches of the plan.

    A rank with fewer blocks than steps gets fully masked rows. With `masked_row_last` one more micro-batch follows, fully
    masked and as large as the smallest, so that a compiled model knows its shape.
    """
    first = plan.blocks_of_rank(rank).start
    slices = [slice(blocks.start - first, blocks.stop - first) for blocks in plan.micro_batches(rank)]
    smallest = max(1, min(part.stop - part.start for part in slices))
    inputs, targets, *starts = (tensor[:1] for tensor in batch)
    masked = torch.zeros_like(inputs), torch.full_like(targets, IGNORED_TARGET), *starts
    micro_batches = [tuple(tensor[part] for tensor in batch) if part.stop > part.start else masked for part in slices]
    if masked_row_last:
        micro_batches.append(tuple(tensor.expand(smallest, -1) for tensor in masked))
    return micro_batches


def to_tensors(blocks: np.ndarray, device: torch.device, document_start: int | None = None) -> MicroBatch:
    """Blocks [rows, tokens + 1] -> inputs and targets; padding becomes token 0 and a masked target.

    With `document_start`, the token at which attention begins anew, the `document_starts` come with them.
    """
    inputs, targets = blocks[:, :-1], blocks[:, 1:]
    if (targets[:, -1] == PADDING).any():  # a padded row ends so
        inputs, targets = np.maximum(inputs, 0), np.where(targets == PADDING, IGNORED_TARGET, targets)
    starts = [] if document_start is None else [document_starts(blocks, document_start)]
    return tuple(_to_device(array, device) for array in (inputs, targets, *starts))


def document_starts(blocks: np.ndarray, document_start: int) -> np.ndarray:
    """Where in the inputs of each block attention begins anew, ascending, and then `sequence_length`: [rows, places].

    That is at the block's start, and at each end-of-text token: what stands in front of a document is its first token, as it
    is that of a prompt. There are `STARTS_PER_ROW` places, or twice, 4, 8, ... times as many, if a row needs them.
    """
    is_start = blocks[:, :-1] == document_start
    is_start[:, 0] = True
    counts = is_start.sum(axis=1, keepdims=True)
    places = max(STARTS_PER_ROW, 1 << int(counts.max() - 1).bit_length())
    starts = np.full((len(blocks), places), is_start.shape[1])
    starts[np.arange(places) < counts] = is_start.nonzero()[1]
    return starts


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    # Cast by numpy: torch would do it with threads, which wait for each other while those of the training have the cores.
    tensor = torch.from_numpy(array.astype(np.int64))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
