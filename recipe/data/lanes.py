"""A lane: one endless stream of packed blocks over a fixed share of the shards, shuffled, with exact state.

The order is a function of (seed, lane) alone, by hashes that no library version changes: each epoch orders the lane's shards
anew, and the blocks that are cut from its tokens are permuted inside windows of up to `shuffle_blocks` of them. Blocks and not
only documents, since neighbouring blocks of a long document are nearly the same sample. A position is therefore a few integers
(and the small state of one shard's reader): where the window starts, and how many of its blocks have been given. Nothing that
has been read is ever part of the state, so nothing can be lost with it; to go on, the window is read again.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from recipe.data.documents import Source
from recipe.errors import RecipeError

# Of the first window, for which the first update waits; each has twice as many as the one before, up to `shuffle_blocks`.
FIRST_WINDOW_BLOCKS = 8
# Documents are encoded together up to so many, and so many characters: more would keep the first update waiting.
ENCODED_DOCUMENTS, ENCODED_CHARACTERS = 16, 1 << 16


@dataclass(frozen=True)
class Position:
    """Which block comes next."""

    epoch: int = 0  # passes over the lane's shards that are complete where the window starts
    shard: int = 0  # place, in this epoch's order, of the shard in which it starts
    # State of that shard's reader at the document in which it starts; None at the start of the shard
    reader: dict[str, Any] | None = None
    token: int = 0  # tokens of that document before it
    window: int = 0  # windows before it, since the first epoch
    block: int = 0  # blocks of the permuted window that have been given


@dataclass(frozen=True)
class LaneOrder:
    """In which order all lanes of a run read."""

    lanes: int  # how many share the shards
    seed: int  # of the order
    shuffle_blocks: int  # blocks of a window, at most; 1: blocks come as they are packed


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
        self.shards = range(index, len(source), order.lanes)
        self.encode, self.sequence_length = encode, sequence_length
        self.load_state_dict(asdict(Position()))

    @property
    def is_ready(self) -> bool:
        """Whether the window in use has been read."""
        return self._window is not None

    @property
    def bad_rows(self) -> int:
        """Rows without text that this and the other lanes of the source have left out."""
        return self.source.bad_rows

    def state_dict(self) -> dict[str, Any]:
        """JSON value from which `load_state_dict` continues with exactly the next block."""
        return asdict(self._position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._position = Position(**state)
        self._stream = _TokenStream(self._read_documents(self._position), self._position)
        self._window: np.ndarray | None = None  # int32 [blocks of the window, sequence_length + 1], permuted

    def next_blocks(self, count: int) -> np.ndarray:
        """The next `count` blocks: int32 [count, sequence_length + 1]; packed, a block's last token is its neighbour's first.

        Raises:
            RecipeError: the lane's shards hold no text, or cannot be read.
        """
        self._read_ahead()
        blocks: list[np.ndarray] = []
        while len(blocks) < count:
            if self._window is None:
                self._window = self._read_window()
            first, size = self._position.block, len(self._window)
            given = min(size - first, count - len(blocks))
            blocks += [*self._window[first : first + given]]
            self._position = replace(self._position, block=first + given)
            if first + given == size:
                self._position, self._window = replace(self._stream.position(), window=self._position.window + 1), None
        return np.stack(blocks)

    def window_blocks(self, window: int) -> int:
        """Blocks of a window, by its number."""
        most = self.order.shuffle_blocks
        return min(FIRST_WINDOW_BLOCKS << min(window, most.bit_length()), most)

    def _read_ahead(self) -> None:
        """As much of the next window as has been used of this one, so that no update waits for a whole window."""
        if self._window is not None:
            used = self._position.block / len(self._window)
            blocks = math.ceil(used * self.window_blocks(self._position.window + 1))
            self._stream.read(blocks * self.sequence_length + 1)

    def _read_window(self) -> np.ndarray:
        window, length = self._position.window, self.sequence_length
        count = self.window_blocks(window)
        tokens = self._stream.take(count * length)
        order = sorted(range(count), key=lambda block: self._hash("block", window, block))
        return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length][order]

    def _read_documents(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Tokens of each document from that in which `start` is, with the position of its first token."""
        positions: list[Position] = []
        texts: list[str] = []
        for position, text in self._read_texts(start):
            positions.append(position)
            texts.append(text)
            if len(texts) == ENCODED_DOCUMENTS or sum(map(len, texts)) >= ENCODED_CHARACTERS:
                yield from zip(positions, self.encode(texts), strict=True)
                positions, texts = [], []

    def _read_texts(self, start: Position) -> Iterator[tuple[Position, str]]:
        """The documents from that in which `start` is, for ever."""
        position = Position(start.epoch, start.shard, start.reader)
        has_text = start.shard > 0 or start.reader is not None
        while True:
            order = sorted(self.shards, key=lambda shard: self._hash(position.epoch, "shard", shard))
            for place in range(position.shard, len(order)):
                then = order[place + 1 : place + 2]
                for text, state_after in self.source.read_shard(order[place], position.reader, then):
                    yield position, text
                    has_text = has_text or bool(text)
                    position = Position(position.epoch, place, state_after)
                position = Position(position.epoch, place + 1)
            if not has_text:
                raise RecipeError(
                    f"{self.source.name}: no training text in lane {self.index} ({len(order)} of {len(self.source)} "
                    "shards): the corpus is empty there, or all of it is held out; set --batch.lanes to less, or "
                    "--data.validation_one_in null",
                    on_this_rank_only=True,
                )
            position, has_text = Position(position.epoch + 1), False

    def _hash(self, *key: object) -> bytes:
        """Sorting by it is a random order: the same for the same (seed, lane, key), on any machine."""
        return blake2b(repr((self.order.seed, self.index, *key)).encode(), digest_size=8).digest()


class _TokenStream:
    """The tokens of one document after the other, from a position on."""

    def __init__(self, documents: Iterator[tuple[Position, np.ndarray]], start: Position) -> None:
        self._documents = documents
        self._held: deque[tuple[Position, np.ndarray]] = deque()  # documents in hand; the first may be partly used
        self._used = start.token  # tokens used of the first document in hand
        self._available = -start.token

    def read(self, count: int) -> None:
        """Have at least `count` tokens in hand."""
        while self._available < count:
            self._held.append(next(self._documents))
            self._available += len(self._held[-1][1])

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens and the one behind them, which stays in hand: int32 [count + 1]."""
        self.read(count + 1)
        parts, left = list[np.ndarray](), count + 1
        for _, tokens in self._held:
            part = tokens[self._used if not parts else 0 :][:left]
            parts.append(part)
            left -= len(part)
            if not left:
                break
        self._used += count
        self._available -= count
        while self._used >= len(self._held[0][1]):
            self._used -= len(self._held.popleft()[1])
        return np.concatenate(parts)

    def position(self) -> Position:
        """Of the next token. Some have been taken."""
        return replace(self._held[0][0], token=self._used)
