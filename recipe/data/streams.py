"""The endless stream of documents, as tokens, that a lane reads from one source."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from recipe.data.documents import Source
from recipe.errors import RecipeError

# Texts are encoded together, up to so many documents or characters; a fourth of it at first, for which the first update waits.
ENCODED_DOCUMENTS, ENCODED_CHARACTERS = 64, 1 << 18
FIRST_SHARE = 1 / 4

Encode = Callable[[list[Any]], Sequence[np.ndarray]]


class StreamPosition(NamedTuple):
    """Which document comes next."""

    epoch: int = 0  # complete passes over the lane's shards
    shard: int = 0  # place of its shard in this epoch's order
    reader: dict[str, Any] | None = None  # state of that shard's reader before it; None at the start of the shard


@dataclass(frozen=True)
class LaneOrder:
    """In which order all lanes of a run read."""

    lanes: int  # how many share the shards
    seed: int  # of the order
    shuffle_blocks: int  # blocks of a window, at most; 1: blocks come as they are packed

    def shuffled(self, numbers: Iterable[int], lane: int, *key: object) -> list[int]:
        """Integers in a random order: the same for the same (seed, lane, key), on any machine.

        They are sorted by BLAKE2b of the text of (seed, lane, *key, number).
        """
        common = blake2b(repr((self.seed, lane, *key))[:-1].encode(), digest_size=8)

        def hash_of(number: int) -> bytes:
            whole = common.copy()
            whole.update(b", %d)" % number)
            return whole.digest()

        return sorted(numbers, key=hash_of)


class DocumentStream:
    """Reads the shards index, index + lanes, ... of a source, in a new order each epoch, and no others.

    `encode` makes of texts the tokens of each, without end-of-text token. None: the source holds ids.
    """

    def __init__(self, source: Source, encode: Encode | None, index: int, order: LaneOrder) -> None:
        self.source, self.encode, self.index, self.order = source, encode, index, order
        self.shards = range(index, len(source), order.lanes)
        ids = source.training.reading.ids
        self.dtype = np.dtype("uint16" if ids and ids.dtype == "uint16" else "int32")  # that its tokens fit into

    def read(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, np.ndarray]]:
        """(position of a document, its tokens without end-of-text) from `start` on, for ever.

        Raises:
            RecipeError: the lane's shards hold no document, or cannot be read.
        """
        if self.encode is None:
            yield from self._read_documents(start)
            return
        positions: list[StreamPosition] = []
        texts: list[str] = []
        characters, share = 0, FIRST_SHARE
        for position, text in self._read_documents(start):
            positions.append(position)
            texts.append(text)
            characters += len(text)
            if len(texts) >= share * ENCODED_DOCUMENTS or characters >= share * ENCODED_CHARACTERS:
                yield from zip(positions, self.encode(texts), strict=True)
                positions, texts = [], []
                characters, share = 0, min(2 * share, 1)

    def _read_documents(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, Any]]:
        position = start
        has_any = start.shard > 0 or start.reader is not None
        while True:
            order = self.order.shuffled(self.shards, self.index, position.epoch, "shard")
            for place in range(position.shard, len(order)):
                then = order[place + 1 : place + 2]
                for document, state_after in self.source.read_shard(order[place], position.reader, then):
                    yield position, document
                    has_any = has_any or len(document) > 0
                    position = StreamPosition(position.epoch, place, state_after)
                position = StreamPosition(position.epoch, place + 1)
            if not has_any:
                raise RecipeError(
                    f"{self.source.name}: no training text in lane {self.index} ({len(order)} of {len(self.source)} "
                    "shards): the corpus is empty there, or all of it is held out; set --batch.lanes to less, or "
                    "--data.validation_one_in null",
                    on_this_rank_only=True,
                )
            position, has_any = StreamPosition(position.epoch + 1), False
