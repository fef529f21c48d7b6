"""A lane: one endless stream of packed blocks over a fixed share of the shards, with exact state.

The order of documents is a function of (seed, lane, epoch) alone, by hashes that no library version changes: each epoch
orders the lane's shards anew, and permutes the documents inside windows of `shuffle_window` of them. A position is therefore
a few integers (and the small state of one shard's reader): which window, which document of it, how many of its tokens are
used. Nothing that has been read is ever part of the state, so nothing can be lost with it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from recipe.data.documents import Source
from recipe.errors import RecipeError

DOCUMENTS_PER_ENCODE = 16


@dataclass(frozen=True)
class Position:
    """Where the next token comes from."""

    epoch: int = 0  # passes over the lane's shards that are complete
    window: int = 0  # windows of this epoch before the current one
    shard: int = 0  # place, in this epoch's order, of the shard in which the window starts
    # State of that shard's reader at the window's start; None at the start of the shard
    reader: dict[str, Any] | None = None
    document: int = 0  # documents of the permuted window before the current one
    token: int = 0  # tokens of the current document that have been consumed


@dataclass(frozen=True)
class LaneOrder:
    """In which order all lanes of a run read."""

    lanes: int  # how many share the shards
    seed: int  # of the order
    shuffle_window: int  # documents permuted among themselves


class Lane:
    """An endless iterator of packed blocks. Each document is its tokens and one end-of-text token; no token is dropped.

    Args:
        source: the documents.
        index: which lane this is; it reads the shards index, index + lanes, ... and no others.
        order: the same for all lanes.
        encode: documents -> int32 tokens of each, with its end-of-text token.
        sequence_length: targets of a block.
    """

    def __init__(
        self,
        source: Source,
        index: int,
        order: LaneOrder,
        encode: Callable[[list[str]], Sequence[np.ndarray]],
        sequence_length: int,
    ) -> None:
        self.source, self.index, self.order = source, index, order
        self.shards = range(index, source.num_shards, order.lanes)
        self.encode, self.sequence_length = encode, sequence_length
        self.load_state_dict(asdict(Position()))

    def state_dict(self) -> dict[str, Any]:
        """JSON value from which `load_state_dict` continues with exactly the next block."""
        position = self._pending[0][0] if self._pending else self._start
        return asdict(replace(position, token=position.token + self._used))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._start = Position(**state)
        self._pending: deque[tuple[Position, np.ndarray]] = deque()  # documents in hand; the first may be partly used
        self._used = 0  # tokens used of the first document in hand
        self._documents = self._read_documents(self._start)

    def next_blocks(self, count: int) -> np.ndarray:
        """The next `count` blocks: int32 [count, sequence_length + 1]; a block's last token is the first of its neighbour.

        Raises:
            RecipeError: the lane's shards hold no text, or cannot be read.
        """
        length = self.sequence_length
        available = sum(len(tokens) for _, tokens in self._pending) - self._used
        while available < count * length + 1:
            position, tokens = next(self._documents)
            self._pending.append((position, tokens))
            available += len(tokens)
        stream = np.concatenate([tokens for _, tokens in self._pending])[self._used :]
        blocks = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length][:count].copy()
        self._consume(count * length)
        return blocks

    def _consume(self, count: int) -> None:
        self._used += count
        while self._used >= len(self._pending[0][1]):
            self._used -= len(self._pending.popleft()[1])

    def _read_documents(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Tokens of each document from `start` on, with the position of its first token."""
        skip, used = start.document, start.token
        for window, texts in self._read_windows(start):
            order = sorted(range(len(texts)), key=lambda i: self._hash(window.epoch, window.window, i))
            for first in range(skip, len(order), DOCUMENTS_PER_ENCODE):
                batch = order[first : first + DOCUMENTS_PER_ENCODE]
                for offset, tokens in enumerate(self.encode([texts[i] for i in batch])):
                    yield replace(window, document=first + offset, token=used), tokens[used:]
                    used = 0
            skip = 0

    def _read_windows(self, start: Position) -> Iterator[tuple[Position, list[str]]]:
        """(position of its start, documents in reading order) of each window from that of `start` on, for ever."""
        window, has_text = replace(start, document=0, token=0), start.window > 0
        while True:
            order = sorted(self.shards, key=lambda shard: self._hash(window.epoch, "shard", shard))
            texts: list[str] = []
            reader = window.reader
            for place in range(window.shard, len(order)):
                for text, state_after in self.source.read_shard(order[place], reader):
                    texts.append(text)
                    has_text = has_text or bool(text)
                    if len(texts) == self.order.shuffle_window:
                        yield window, texts
                        window, texts = Position(window.epoch, window.window + 1, place, state_after), []
                reader = None
            if texts:
                yield window, texts
            if not has_text:
                raise RecipeError(
                    f"{self.source.name}: no training text in lane {self.index} ({len(order)} of {self.source.num_shards} "
                    "shards): the corpus is empty there, or all of it is held out; set --batch.lanes to less, or "
                    "--data.validation_one_in null",
                    on_this_rank_only=True,
                )
            window, has_text = Position(window.epoch + 1), False

    def _hash(self, *key: object) -> bytes:
        """Sorting by it is a random order: the same for the same (seed, lane, key), on any machine."""
        return blake2b(repr((self.order.seed, self.index, *key)).encode(), digest_size=8).digest()
