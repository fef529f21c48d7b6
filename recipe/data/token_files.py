"""Documents of flat files of token ids, a chunk at a time.

Some layouts have an index of documents. The others are streams of ids that an end-of-text token divides; where none occurs, a
stream is cut in pieces. Files are read and not mapped: a map that is longer than its file kills the process, and what has
been read of it counts as memory in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from recipe.data.formats import Part, State, is_one_of, strip_ends
from recipe.data.shards import SHARDS_PER_LANE, is_even
from recipe.data.token_formats import TokenFile, document_bounds, find_token_files
from recipe.errors import RecipeError

PIECE_TOKENS = 1 << 16  # at most, of a stream without document ends
CHUNK_TOKENS = 1 << 17  # read at once
_LOOKED_AT_TOKENS = 1 << 16  # of each file at the start
_DOCUMENT_TOKENS = 1 << 12  # most documents have fewer
_SEARCHED_TOKENS = 1 << 22  # of each file, at the start, for an end-of-text token


def open_token_files(paths: Sequence[str], dtype: str | None, delimiters: Sequence[int], vocabulary: int) -> FlatTokens:
    """Open files of ids, all of one layout; documents of llm.c's shards run on from one into the next.

    Args:
        paths: of the files; those beside them, such as an index, may be among them.
        dtype: of ids in files that do not say it.
        delimiters: the end-of-text token, and the beginning-of-text token if that is another.
        vocabulary: how many tokens the tokenizer has.

    Raises:
        RecipeError: a file that cannot be read, or not with this tokenizer.
    """
    tokens = FlatTokens(tuple(find_token_files(paths, dtype)), tuple(dict.fromkeys(delimiters)), vocabulary)
    try:
        for file in tokens.files:
            tokens.read_ids(file, 0, min(file.tokens, _LOOKED_AT_TOKENS))
        has_ends = tokens.is_indexed or any(
            tokens.next_start(file, 1, _SEARCHED_TOKENS) <= min(file.tokens, _SEARCHED_TOKENS)
            for file in tokens.files
            if tokens.delimiters
        )
    except OSError as error:
        raise RecipeError(f"data.token_files: cannot read {error.filename}: {error.strerror}") from None
    return FlatTokens(tokens.files, tokens.delimiters, vocabulary, has_ends)


@dataclass(frozen=True)
class FlatTokens:
    """Documents in flat files of ids. It holds no open file, so that it can be sent to other processes.

    Parts and states count documents where there is an index, and else tokens from the start of a file. The documents of a
    part are those that begin in it.
    """

    files: tuple[TokenFile, ...]
    delimiters: tuple[int, ...]
    vocabulary: int
    has_ends: bool = True  # else what is read are pieces of a stream, which have no end-of-text token

    @property
    def format(self) -> str:
        """raw, npy, llm.c, datatrove, dolma or megatron"""
        return self.files[0].format

    @property
    def tokens(self) -> int:
        return sum(file.tokens for file in self.files)

    @property
    def documents(self) -> int | None:
        """None: only reading tells."""
        return sum(file.documents or 0 for file in self.files) if self.is_indexed else None

    @property
    def tokenizer(self) -> str | None:
        """The name of the tokenizer that made them, if they say it."""
        return next((file.tokenizer for file in self.files if file.tokenizer), None)

    @property
    def is_indexed(self) -> bool:
        return self.files[0].documents is not None

    def parts(self, lanes: int) -> list[Part]:
        """Whole files if lanes get about as much of them, else regions with about as many tokens: about 16 a lane.

        Fewer than lanes only where there are fewer documents.
        """
        is_short = not self.has_ends and self.tokens < SHARDS_PER_LANE * lanes * PIECE_TOKENS
        if is_even([file.tokens for file in self.files], lanes) and not is_short:
            return [Part(file.file) for file in self.files]
        parts = []
        for number, file in enumerate(self.files):
            count = max(1, round(file.tokens * SHARDS_PER_LANE * lanes / self.tokens))
            parts += self._cut(number, [file.tokens * cut // count for cut in range(1, count)])
        if len(parts) < lanes:
            parts = [part for number in range(len(self.files)) for part in self._cut(number, None)]
        return parts

    def read(self, part: Part, state: State | None = None) -> Iterator[tuple[np.ndarray, State]]:
        """(ids without end-of-text token, state after it) of each document of a part behind `state`.

        Raises:
            RecipeError: an id that the tokenizer does not have, or a file that has become shorter.
            OSError: a file cannot be read, or not now.
        """
        number = next(n for n, file in enumerate(self.files) if file.path == part.file.address)
        first, last = self._bounds(number)
        start = state["document" if self.is_indexed else "token"] if state else part.start or first
        end = last if part.end is None else part.end
        if self.is_indexed:
            return self._read_indexed(self.files[number], start, end)
        if self.has_ends:
            return self._read_divided(number, start, end)
        return self._read_pieces(self.files[number], start, end)

    def read_ids(self, file: TokenFile, start: int, end: int) -> np.ndarray:
        """Tokens of a file, in its integers."""
        dtype = np.dtype(file.dtype)
        ids = np.fromfile(file.path, dtype, end - start, offset=file.offset + start * dtype.itemsize)
        if len(ids) < end - start:
            raise RecipeError(f"{file.path} no longer has {file.tokens:,} tokens: it has been changed")
        unsigned = ids.view(f"u{dtype.itemsize}")  # of a negative id, a large one
        if len(ids) and unsigned.max() >= self.vocabulary:
            place = int(unsigned.argmax())
            raise RecipeError(
                f"largest id {ids[place]:,} at token {start + place:,} of {file.path}, but the tokenizer has "
                f"{self.vocabulary:,} tokens: is --data.tokenizer or --data.token_dtype another?"
            )
        return ids

    def next_start(self, file: TokenFile, place: int, most: int | None = None) -> int:
        """The first token, at `place` or behind it, in front of which is a delimiter; behind `tokens` if there is none."""
        place = max(place - 1, 0)
        stop = min(file.tokens, place + most) if most else file.tokens
        count = _DOCUMENT_TOKENS
        while place < stop:
            found = np.flatnonzero(is_one_of(self.read_ids(file, place, min(place + count, stop)), self.delimiters))
            if len(found):
                start = place + int(found[0]) + 1
                if len(self.delimiters) > 1 and start < file.tokens:  # end-of-text and beginning-of-text are one place
                    start += tuple(self.read_ids(file, start - 1, start + 1)) == self.delimiters
                return start
            place, count = place + count, min(2 * count, CHUNK_TOKENS)
        return file.tokens + 1

    @property
    def _delimiters_as_ids(self) -> np.ndarray:
        """In integers as short as possible, beside which those of any file stay as they are."""
        return np.array(self.delimiters, np.min_scalar_type(max(self.delimiters)))

    def _bounds(self, number: int) -> tuple[int, int]:
        """Where the first document of a file can begin, and behind where the last one can."""
        file = self.files[number]
        if file.documents is not None:
            return 0, file.documents
        if not self.has_ends:
            return 0, file.tokens
        opening, closing = (int(self.read_ids(file, place, place + 1)[0]) for place in (0, file.tokens - 1))
        if file.format != "llm.c" and (opening not in self.delimiters or closing in self.delimiters):
            return int(opening in self.delimiters[1:]), file.tokens  # documents end with delimiters
        # what is before the first delimiter belongs to the file before; the last document may have no token in this file
        start = self.next_start(file, 1)
        return 0 if number == 0 and start > 1 else start, file.tokens + 1

    def _cut(self, number: int, places: Sequence[int] | None) -> list[Part]:
        """Regions that begin at these tokens, or the first document behind them; None: at each document."""
        file = self.files[number]
        first, last = self._bounds(number)
        if self.is_indexed:
            starts = range(last) if places is None else np.searchsorted(document_bounds(file)[0], places).tolist()
        elif places is None:
            documents = self.read(Part(file.file)) if self.has_ends else ()
            starts = [state["token"] for _, state in documents]
        else:
            starts = [self.next_start(file, place) for place in places] if self.has_ends else places
        bounds = sorted({first, last, *(start for start in starts if first < start < last)})
        return [Part(file.file, start, end) for start, end in pairwise(bounds)]

    def _read_indexed(self, file: TokenFile, number: int, end: int) -> Iterator[tuple[np.ndarray, State]]:
        starts, ends = document_bounds(file)
        while number < end:
            first = starts[number]
            behind = min(max(number + 1, int(np.searchsorted(ends, first + CHUNK_TOKENS, "right"))), end)
            ids = self.read_ids(file, int(first), int(ends[behind - 1]))
            places = zip((starts[number:behind] - first).tolist(), (ends[number:behind] - first).tolist(), strict=True)
            for start, stop in places:
                number += 1
                yield strip_ends(ids[start:stop], self.delimiters), {"document": number}

    def _read_divided(self, number: int, start: int, end: int) -> Iterator[tuple[np.ndarray, State]]:
        """Documents between delimiters. In front of a stream, and behind it, is one that is not in the file."""
        if start >= end:
            return
        place = start - 1  # of the first of `ids`, the delimiter in front of the next document
        ids = self.read_ids(self.files[number], place, start) if start else self._delimiters_as_ids[:1]
        while place + 1 < end:
            behind = place + len(ids)
            # no further behind the end than a document; twice as much for one that is longer than a chunk
            count = max(min(CHUNK_TOKENS, end - behind + _DOCUMENT_TOKENS), len(ids))
            ids = np.concatenate([ids, self._read_on(number, behind, count)])
            cuts = np.flatnonzero(is_one_of(ids, self.delimiters))
            for before, after in self._documents_between(ids, cuts[: np.searchsorted(cuts, end - place - 1) + 1]):
                yield ids[before + 1 : after], {"token": place + after + 1}
            ids, place = ids[cuts[-1] :], place + int(cuts[-1])

    def _documents_between(self, ids: np.ndarray, cuts: np.ndarray) -> Iterator[tuple[int, int]]:
        """Neighbouring delimiters; there is no document between end-of-text and the beginning-of-text behind it."""
        before, after = cuts[:-1], cuts[1:]
        if len(self.delimiters) > 1:
            end, beginning = self.delimiters
            is_one = (after - before == 1) & (ids[before] == end) & (ids[after] == beginning)
            before, after = before[~is_one], after[~is_one]
        return zip(before.tolist(), after.tolist(), strict=True)

    def _read_on(self, number: int, place: int, count: int) -> np.ndarray:
        """Tokens from a place in a file, or in those into which its last document runs on; behind them is a delimiter."""
        for file in self.files[number:] if self.format == "llm.c" else self.files[number : number + 1]:
            if place < file.tokens:
                return self.read_ids(file, place, min(place + count, file.tokens))
            place -= file.tokens
        return self._delimiters_as_ids[-1:]

    def _read_pieces(self, file: TokenFile, start: int, end: int) -> Iterator[tuple[np.ndarray, State]]:
        while start < end:
            stop = min(start + PIECE_TOKENS, end)
            yield self.read_ids(file, start, stop), {"token": stop}
            start = stop
