"""Documents in shards, each read exactly once, however often reading fails."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

from recipe.data.shards import StreamedShards, TextShards
from recipe.errors import DATA_EXIT_CODE, RecipeError
from recipe.retry import growing_pauses

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Source:
    """Documents in shards, some of them held out for validation."""

    name: str  # what the user called it
    training: StreamedShards | TextShards  # at least as many shards as lanes
    text_column: str  # the column that holds the document
    # Documents of `training` held out by hash of their text, one in this many; None: none
    validation_one_in: int | None = None
    validation: TextShards | None = None  # held-out documents, if they are not in `training`
    retry_seconds: float = 0.0  # how long to try again if reading fails; 0 for local files

    @property
    def num_shards(self) -> int:
        """Shards of the training documents."""
        return self.training.num_shards

    def shard(self, index: int) -> Any:
        """A reader of one shard, with its own `state_dict()`."""
        return self.training.shard(index)

    def text(self, row: dict[str, Any]) -> str:
        """The document of a row; an empty string if it is null.

        Raises:
            RecipeError: no such column, or not text.
        """
        if self.text_column not in row:
            raise RecipeError(
                f"{self.name} has no column {self.text_column!r}: set --data.text_column to one of {list(row)}"
            )
        value = row[self.text_column]
        if value is not None and not isinstance(value, str):
            raise RecipeError(
                f"column {self.text_column!r} of {self.name} holds {type(value).__name__}, not text: set --data.text_column"
            )
        return value or ""

    def is_held_out(self, text: str) -> bool:
        """Whether a document of `training` belongs to validation: the same answer on every rank and in every epoch."""
        return (
            self.validation_one_in is not None
            and hash_number(text.encode("utf-8", "surrogatepass")) % self.validation_one_in == 0
        )

    def training_documents(self) -> Iterator[str]:
        """The training documents, once, in the order of the source."""
        return (text for text in self._read_all(self.training) if not self.is_held_out(text))

    def validation_documents(self) -> Iterator[str]:
        """The held-out documents, once, in the order of the source."""
        if self.validation is not None:
            return self._read_all(self.validation)
        if not self.validation_one_in:
            return iter(())
        return (text for text in self._read_all(self.training) if self.is_held_out(text))

    def read_shard(self, index: int, state: dict[str, Any] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """(document, the reader's state after it) for each training document of a shard, from `state` on.

        Raises:
            RecipeError: the shard cannot be read, or holds no text.
        """
        try:
            for text, state_after in self._read(self.shard(index), f"shard {index} of {self.name}", state):
                if not self.is_held_out(text):
                    yield text, state_after
        except RecipeError as error:
            error.on_this_rank_only = True  # the others read other shards
            raise

    def _read_all(self, shards: StreamedShards | TextShards) -> Iterator[str]:
        for index in range(shards.num_shards):
            name = self.name if shards.num_shards == 1 else f"shard {index} of {self.name}"
            for text, _ in self._read(shards.shard(index), name):
                yield text

    def _read(
        self, reader: Any, name: str, state: dict[str, Any] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(document, the reader's state after it), each once: after an error it goes on behind the last document."""
        all_pauses = partial(growing_pauses, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, self.retry_seconds)
        pauses = all_pauses()
        while True:
            if state is not None:
                reader.load_state_dict(state)
            try:
                for row in reader:
                    text, state = self.text(row), reader.state_dict()
                    yield text, state
                    pauses = all_pauses()
                return
            except RecipeError:
                raise
            except Exception as error:  # of any library under datasets
                if (pause := next(pauses, None)) is None:
                    raise self._unreadable(name, error) from error
            time.sleep(pause)

    def _unreadable(self, name: str, error: Exception) -> RecipeError:
        tried = f" (tried again for {self.retry_seconds:g} s, data.retry_seconds)" if self.retry_seconds else ""
        return RecipeError(
            f"cannot read {name}: {reason_of(error)}{tried}; once it can be read, the same command goes on from here",
            on_this_rank_only=self.retry_seconds > 0,  # a network may have failed for this rank alone
            exit_code=DATA_EXIT_CODE,
        )


def reason_of(error: Exception) -> str:
    """One line for an error of one of the many libraries that `datasets` reads through."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def hash_number(value: bytes) -> int:
    """64 bits of a hash that no library version changes."""
    return int.from_bytes(blake2b(value, digest_size=8).digest(), "big")
