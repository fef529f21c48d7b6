"""Documents in shards, each read exactly once, however often reading fails."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, sha256
from typing import Any

import numpy as np

from recipe.data.files import name_of
from recipe.data.formats import BadRow, Ids, State
from recipe.data.remote_files import RemoteFile
from recipe.data.shards import Shards
from recipe.errors import DATA_EXIT_CODE, RecipeError
from recipe.retry import growing_pauses

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0
_LITTLE_ENDIAN: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SHARDS_AHEAD = 8  # row groups of remote files on the way where all documents are read in order


@dataclass
class Source:
    """Documents in shards, some of them held out for validation: texts, or token ids."""

    name: str  # what the user called it
    training: Shards  # at least as many as lanes
    # Documents of `training` held out by hash of their text or ids, one in this many; None: none
    validation_one_in: int | None = None
    validation: Shards | None = None  # held-out documents, if they are not in `training`
    retry_seconds: float = 0.0  # how long to try again if reading fails; 0 for local files
    skips_bad_rows: bool = False  # what holds no text is left out and counted, not an error
    bad_rows: int = 0  # left out by the lanes of this process
    label: str = ""  # in a mixture: its name in the ledger
    weight: float = 1.0  # in a mixture: its share of the tokens, relative to the others'
    max_passes: int | None = None  # in a mixture: read its documents so many times at most

    def __len__(self) -> int:
        return len(self.training)

    @property
    def is_remote(self) -> bool:
        """Whether it is asked for over a network."""
        return any(isinstance(part.file, RemoteFile) for part in self.training.parts[:1])

    @property
    def holds_ids(self) -> bool:
        """Whether documents are token ids."""
        return self.training.reading.ids is not None

    @property
    def holds_pieces(self) -> bool:
        """Whether documents are pieces of a stream of token ids: no end-of-text token belongs behind them."""
        ids = self.training.reading.ids
        return ids is not None and ids.are_packed

    def is_held_out(self, document: str | Ids) -> bool:
        """Whether a document of `training` belongs to validation: the same answer on every rank and in every epoch."""
        if self.validation_one_in is None:
            return False
        if isinstance(document, str):
            return hash_number(document.encode()) % self.validation_one_in == 0
        assert self.training.reading.ids is not None
        stored = np.ascontiguousarray(document, _LITTLE_ENDIAN[self.training.reading.ids.dtype])
        # CPUs have instructions for it, and it takes two thirds of blake2b's time
        return int.from_bytes(sha256(stored.data).digest()[:8], "big") % self.validation_one_in == 0

    def training_documents(self) -> Iterator[str | Ids]:
        """The training documents, once, in the order of the source."""
        return (document for document in self._read_all(self.training) if not self.is_held_out(document))

    def validation_documents(self) -> Iterator[str | Ids]:
        """The held-out documents, once, in the order of the source."""
        if self.validation is not None:
            return self._read_all(self.validation)
        if not self.validation_one_in:
            return iter(())
        return (document for document in self._read_all(self.training) if self.is_held_out(document))

    def read_shard(
        self, index: int, state: State | None = None, then: Sequence[int] = ()
    ) -> Iterator[tuple[str | Ids, State]]:
        """(document, the reader's state after it) for each training document of a shard, from `state` on.

        `then` are the shards that are read next: they may be fetched meanwhile.

        Raises:
            RecipeError: the shard cannot be read, or a row of it holds no text.
        """
        try:
            for document, state_after in self._read(self.training, index, state, then):
                if isinstance(document, BadRow):
                    with _COUNTING:
                        self.bad_rows += 1
                elif not self.is_held_out(document):
                    yield document, state_after
        except RecipeError as error:
            error.on_this_rank_only = True  # the others read other shards
            raise

    def split_shard(self, index: int, then: Sequence[int] = ()) -> Iterator[tuple[str | Ids, bool]]:
        """(document, whether it is held out) for each document of a shard of `training`; see `read_shard`."""
        for document in self._read_and_count(self.training, index, then):
            yield document, self.is_held_out(document)

    def validation_shards(self, indices: Sequence[int]) -> Iterator[tuple[str | Ids, bool]]:
        """The same for shards of `validation`."""
        for index in indices:
            assert self.validation is not None
            for document in self._read_and_count(self.validation, index, ()):
                yield document, True

    def _read_and_count(self, shards: Shards, index: int, then: Sequence[int]) -> Iterator[str | Ids]:
        for document, _ in self._read(shards, index, then=then):
            if isinstance(document, BadRow):
                self.bad_rows += 1
            else:
                yield document

    def _read_all(self, shards: Shards) -> Iterator[str | Ids]:
        try:
            for index in range(len(shards)):
                then = range(index + 1, min(index + 1 + SHARDS_AHEAD, len(shards)))
                for document, _ in self._read(shards, index, then=then):
                    if not isinstance(document, BadRow):
                        yield document
        finally:
            shards.forget()

    def _read(
        self, shards: Shards, index: int, state: State | None = None, then: Sequence[int] = ()
    ) -> Iterator[tuple[str | Ids | BadRow, State]]:
        """(document, state after it), each once: after an error it goes on behind the last document."""
        all_pauses = partial(growing_pauses, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, self.retry_seconds)
        pauses, is_again = all_pauses(), False
        while True:
            try:
                for document, state_after in shards.read(index, state, then):
                    state = state_after
                    if isinstance(document, BadRow) and not self.skips_bad_rows:
                        raise RecipeError(f"{document}; --data.on_bad_row skip leaves such rows out")
                    yield document, state
                    if is_again:
                        pauses, is_again = all_pauses(), False
                return
            except RecipeError:
                raise
            except Exception as error:  # of any library that reads
                name = self.name if len(shards) == 1 else f"shard {index} of {self.name}"
                if not may_pass(error):
                    raise RecipeError(
                        f"cannot read {name}: {name_of(shards.parts[index].file)}: {reason_of(error)}"
                    ) from error
                if (pause := next(pauses, None)) is None:
                    raise self._unreadable(name, error) from error
                is_again = True
            time.sleep(pause)

    def _unreadable(self, name: str, error: Exception) -> RecipeError:
        tried = f" (tried again for {self.retry_seconds:g} s, data.retry_seconds)" if self.retry_seconds else ""
        reason = reason_of(error)
        what = reason if name in reason else f"{name}: {reason}"
        return RecipeError(
            f"cannot read {what}{tried}; once it can be read, the same command goes on from here",
            on_this_rank_only=self.retry_seconds > 0,  # a network may have failed for this rank alone
            exit_code=DATA_EXIT_CODE,
        )


_COUNTING = threading.Lock()


def may_pass(error: Exception) -> bool:
    """Whether reading has failed, and not what was read: libraries call that an OSError too, but without a number."""
    return isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno is not None)


def reason_of(error: Exception) -> str:
    """One line for an error of one of the many libraries that `datasets` reads through."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def hash_number(value: bytes) -> int:
    """64 bits of a hash that no library version changes."""
    return int.from_bytes(blake2b(value, digest_size=8).digest(), "big")
