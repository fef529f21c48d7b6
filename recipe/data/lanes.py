"""A lane: one endless stream of packed blocks over a fixed share of each source's shards, shuffled, with exact state.

The order is a function of (seed, lane) alone, by hashes that no library version changes: each epoch orders the lane's shards
anew, and the blocks that are cut from its tokens are permuted inside windows of up to `shuffle_blocks` of them. Blocks and not
only documents, since neighbouring blocks of a long document are nearly the same sample. Of several sources, the next document
comes from the one that is furthest behind its share of the tokens. A position is therefore a few integers (and the small state
of one shard's reader for each source): where the window starts, and how many of its blocks have been given. Nothing that has
been read is ever part of the state, so nothing can be lost with it; to go on, the window is read again.
"""

import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from recipe.data.streams import DocumentStream, StreamPosition

# Of the first window, for which the first update waits; each has twice as many as the one before, up to `shuffle_blocks`.
FIRST_WINDOW_BLOCKS = 8


# Blocks of a lane, numbered from 0 in the order in which they are given: [start, stop) of each stretch, ascending and apart.
Ranges = tuple[tuple[int, int], ...]


def merge_ranges(ranges: Iterable[Sequence[int]]) -> Ranges:
    """The same blocks as `ranges`, which may overlap."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((start, stop) for start, stop in ranges):
        if merged and start <= merged[-1][1]:
            start, stop = merged[-1][0], max(stop, merged.pop()[1])
        merged.append((start, stop))
    return tuple(merged)


def number_of(block: int, skipped: Ranges) -> int:
    """The number of the block that follows `block` others that are not skipped."""
    for start, stop in skipped:
        block += (stop - start) * (start <= block)
    return block


@dataclass(frozen=True)
class Position:
    """Which block comes next."""

    # Of each source, where the window starts: the next document, and how many tokens of it came before. A document that the
    # window's start is in is not read yet.
    streams: tuple[StreamPosition, ...]
    source_tokens: tuple[int, ...]
    token: int = 0  # tokens of the document in which the window starts before it
    window: int = 0  # windows before it, since the first epoch
    block: int = 0  # blocks of the permuted window that have been given
    source: int | None = None  # of the document in which the window starts; None: the one that lacks most
    # Of the sources, in this window only: a branch with other weights is in a window of the run that it has left
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Position":
        """What `Lane.state_dict` gave; a TypeError if it is something else."""
        position = cls(**state)
        streams = tuple(StreamPosition(**stream) for stream in position.streams)  # type: ignore[arg-type]
        tokens, weights = tuple(position.source_tokens), tuple(position.weights)
        return replace(position, streams=streams, source_tokens=tokens, weights=weights)


class _Document(NamedTuple):
    streams: tuple[StreamPosition, ...]  # before it
    source_tokens: tuple[int, ...]  # before it
    source: int
    tokens: np.ndarray  # without end-of-text
    size: int  # with it


class Lane:
    """An endless iterator of packed blocks. Each document is its tokens and one end-of-text token; no token is dropped.

    Args:
        streams: of each source, the documents that this lane reads, in one order.
        sequence_length: targets of a block.
        end_of_text: the token behind each document, but not behind pieces of a stream, which has them.
    """

    document_start: int | None = None  # token at which attention begins anew, if it stays inside documents
    keeps_weights = False  # of a position, also in the windows after that
    skipped: Ranges = ()  # its blocks that are not given: rollbacks have left them out

    def __init__(self, streams: Sequence[DocumentStream], sequence_length: int, end_of_text: int) -> None:
        self.streams, self.sequence_length = streams, sequence_length
        self._dtype = np.result_type(*(stream.dtype for stream in streams))  # of windows, which are large
        self._ends = [None if stream.source.holds_pieces else end_of_text for stream in streams]
        self.index, self.order = streams[0].index, streams[0].order
        # Targets from each source, in the blocks given last
        self.source_tokens = np.zeros(len(streams), dtype=np.int64)
        self._begin(Position((StreamPosition(),) * len(streams), (0,) * len(streams)))

    @property
    def is_ready(self) -> bool:
        """Whether the window in use has been read."""
        return self._window is not None

    @property
    def bad_rows(self) -> int:
        """Rows without text that this and the other lanes of the sources have left out."""
        return sum(stream.source.bad_rows for stream in self.streams)

    @property
    def passes(self) -> list[int]:
        """Of each source, complete passes over the lane's documents, up to the end of the window in use."""
        streams = self._position.streams if self._window is None else self._tokens.streams
        return [stream.epoch for stream in streams]

    def state_dict(self) -> dict[str, Any]:
        """JSON value from which `load_state_dict` continues with exactly the next block."""
        return {**self._state_of_window, "block": self._block}

    def _set_position(self, position: Position) -> None:
        """Where the next window starts, and stays while it is in use; `_block` counts the blocks that have been given."""
        streams = [stream._asdict() for stream in position.streams]
        self._position, self._block = position, position.block
        self._state_of_window = {**vars(position), "streams": streams, "source_tokens": [*position.source_tokens]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._begin(Position.of(state))

    def _begin(self, position: Position) -> None:
        self._set_position(position)
        weights = position.weights or [stream.source.weight for stream in self.streams]
        total = math.fsum(weights)  # the same in every version of Python
        self._shares = [weight / total for weight in weights]
        self._tokens = _TokenStream(self._read_documents(position), position, self._ends, self._dtype)
        self._window: np.ndarray | None = None  # [blocks of the window x sequence_length + 1]
        self._window_order: list[int] = []  # the numbers of its blocks, permuted
        self._window_sources: np.ndarray | None = None  # [blocks of the window, sources], targets from each, if several

    def next_blocks(self, count: int) -> np.ndarray:
        """The next `count` blocks: int32 [count, sequence_length + 1]; packed, a block's last token is its neighbour's first.

        Raises:
            RecipeError: the lane's shards hold no text, or cannot be read.
        """
        self._read_ahead()
        length, given = self.sequence_length, 0
        blocks = np.empty((count, length + 1), dtype=np.int32)
        of_sources = []
        while given < count:
            if self._window is None:
                self._window = self._read_window()
            first = self._block
            alike, is_skipped = self._stretch(first)
            numbers = self._window_order[first : first + (alike if is_skipped else min(alike, count - given))]
            if not is_skipped:
                for row, number in enumerate(numbers, start=given):
                    blocks[row] = self._window[number * length : (number + 1) * length + 1]
                given += len(numbers)
                if self._window_sources is not None:
                    of_sources.append(self._window_sources[numbers].sum(0))
            self._block += len(numbers)
            if self._block == len(self._window_order):
                self._end_window()
        self.source_tokens = np.sum(of_sources, axis=0) if of_sources else np.array([count * length])
        return blocks

    def _end_window(self) -> None:
        ended, self._window = self._position, None
        position = replace(self._tokens.position(), window=ended.window + 1)
        if ended.weights and not self.keeps_weights:  # the run's own are of the tokens from here on
            self._begin(replace(position, source_tokens=(0,) * len(self.streams)))
        else:
            self._set_position(replace(position, weights=ended.weights))

    def window_blocks(self, window: int) -> int:
        """Blocks of a window, by its number."""
        most = self.order.shuffle_blocks
        return min(FIRST_WINDOW_BLOCKS << min(window, most.bit_length()), most)

    def _blocks_before_window(self) -> int:
        """Of all windows before the one in use."""
        window, most = self._position.window, self.order.shuffle_blocks
        growing = min(window, ((most - 1) // FIRST_WINDOW_BLOCKS).bit_length())  # windows of fewer than `most`
        return FIRST_WINDOW_BLOCKS * ((1 << growing) - 1) + (window - growing) * most

    def _stretch(self, block: int) -> tuple[int, bool]:
        """How many blocks from this one of the window on are skipped, or are not, as it is; and whether it is."""
        block += self._blocks_before_window() if self.skipped else 0
        for start, stop in self.skipped:
            if block < stop:
                return (stop - block, True) if start <= block else (start - block, False)
        return sys.maxsize, False

    def _read_ahead(self) -> None:
        """As much of the next window as has been used of this one, so that no update waits for a whole window."""
        if self._window is not None:
            used = self._block / len(self._window_order)
            blocks = math.ceil(used * self.window_blocks(self._position.window + 1))
            self._tokens.read(blocks * self.sequence_length + 1)

    def _read_window(self) -> np.ndarray:
        """The tokens of the next window; sets the order of its blocks, and how many targets of each are from each source."""
        window, length = self._position.window, self.sequence_length
        count = self.window_blocks(window)
        tokens, runs = self._tokens.take(count * length)
        self._window_order = self.order.shuffled(range(count), self.index, "block", window)
        if len(self.streams) > 1:
            of_blocks = np.repeat(*np.transpose(runs))[1:].reshape(count, length)
            of_sources = [(of_blocks == source).sum(1) for source in range(len(self.streams))]
            self._window_sources = np.stack(of_sources, axis=1)
        return tokens

    def _read_documents(self, start: Position) -> Iterator[_Document]:
        """The documents from that in which `start` is: each from the source that lacks most tokens of its share."""
        documents = [stream.read(position) for stream, position in zip(self.streams, start.streams, strict=True)]
        positions, waiting = map(list, zip(*map(next, documents), strict=True))
        taken, source = list(start.source_tokens), start.source
        while True:
            if source is None:
                source = self._most_lacking(taken) if len(taken) > 1 else 0
            tokens = waiting[source]
            size = len(tokens) + (self._ends[source] is not None)
            yield _Document(tuple(positions), tuple(taken), source, tokens, size)
            taken[source] += size
            positions[source], waiting[source] = next(documents[source])
            source = None

    def _most_lacking(self, taken: Sequence[int]) -> int:
        """The source that lacks most tokens of its share; of several the first."""
        total = sum(taken)
        lacking = [share * total - tokens for share, tokens in zip(self._shares, taken, strict=True)]
        return lacking.index(max(lacking))


class _TokenStream:
    """The tokens of one document after the other, from a position on; `ends` are the tokens behind those of each source."""

    def __init__(
        self, documents: Iterator[_Document], start: Position, ends: Sequence[int | None], dtype: np.dtype
    ) -> None:
        self._documents, self._ends, self._dtype = documents, ends, dtype
        self._held: deque[_Document] = deque()  # documents in hand; the first may be partly used
        self._used = start.token  # tokens used of the first document in hand
        self._available = -start.token

    def read(self, count: int) -> None:
        """Have at least `count` tokens in hand."""
        while self._available < count:
            self._held.append(next(self._documents))
            self._available += self._held[-1].size

    def take(self, count: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """The next `count` tokens and the one behind them, which stays in hand: [count + 1].

        And where they are from, in their order: (source, so many tokens).
        """
        self.read(count + 1)
        taken, runs = np.empty(count + 1, self._dtype), list[tuple[int, int]]()
        place, used = 0, self._used
        for document in self._held:
            tokens = document.tokens[used : used + count + 1 - place]
            after = place + len(tokens)
            taken[place:after] = tokens
            end = self._ends[document.source]
            if end is not None and after <= count and used + len(tokens) == len(document.tokens):
                taken[after] = end
                after += 1
            runs.append((document.source, after - place))
            place, used = after, 0
            if place > count:
                break
        self._used += count
        self._available -= count
        while self._used >= self._held[0].size:
            self._used -= self._held.popleft().size
        return taken, runs

    @property
    def streams(self) -> tuple[StreamPosition, ...]:
        """Of each source, before the document of the next token. Some have been taken."""
        return self._held[0].streams

    def position(self) -> Position:
        """Of the next token. Some have been taken."""
        first = self._held[0]
        return Position(first.streams, first.source_tokens, token=self._used, source=first.source)
