"""Validation sets: whole documents in blocks, packed once."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from recipe.data.blocks import PADDING
from recipe.data.encode import DocumentEncoder, gives_back
from recipe.data.formats import Ids
from recipe.errors import RecipeError
from recipe.run.files import new_file

REPLACEMENT = "\ufffd"  # of what is no character


@dataclass(frozen=True)
class ValidationSet:
    """Held-out documents in blocks."""

    blocks: np.ndarray  # int32 [blocks, sequence_length + 1]; the last one is padded
    tokens: int  # targets that are not padding
    text_bytes: int  # UTF-8 bytes of the documents, the measure of bits per byte
    unknown_tokens: int = 0  # for what the tokenizer cannot represent
    is_exact: bool = True  # whether the tokens give the text back, so that bits per byte mean something

    @property
    def loss_of_text(self) -> str | None:
        """What the tokenizer does not keep of the text; None if it keeps all."""
        if self.unknown_tokens:
            share = 100 * self.unknown_tokens / self.tokens
            return f"{share:.2g} % of the tokens are unknown: the tokenizer cannot represent this text"
        return None if self.is_exact else "the tokenizer does not give this text back (case, accents, characters)"


def pack_validation(
    documents: Iterator[str | Ids],
    tokenizer: Any,
    sequence_length: int,
    max_tokens: float,
    are_pieces: bool = False,
) -> ValidationSet | None:
    """Whole documents until `max_tokens` are reached; None if there are none.

    The stream starts with an end-of-text token, so that every token of every document is a target exactly once. Of documents
    that are token ids the text is what they decode to. No end-of-text token is put behind `are_pieces`, which have them.
    """
    encoder, end = DocumentEncoder(tokenizer), np.array([tokenizer.eos_token_id], dtype=np.int32)
    parts, targets, text_bytes = [end], 0, 0
    unknown, unknown_tokens, is_exact = tokenizer.unk_token_id, 0, True
    for document in documents:
        ids = encoder.encode([document])[0] if isinstance(document, str) else document
        parts += [ids] if are_pieces else [ids, end]
        targets += len(ids) + (not are_pieces)
        if unknown not in (None, tokenizer.eos_token_id):
            unknown_tokens += int((ids == unknown).sum())
        if isinstance(document, str):
            text, is_same = document, is_exact and gives_back(tokenizer, ids, document)
        else:
            text = tokenizer.decode(document, clean_up_tokenization_spaces=False)
            is_same = REPLACEMENT not in text
        is_exact = is_same and is_exact and not unknown_tokens
        text_bytes += len(text.encode("utf-8", "surrogatepass"))
        if targets >= max_tokens:
            break
    if not text_bytes:
        return None
    rows = math.ceil(targets / sequence_length)
    stream = np.full(rows * sequence_length + 1, PADDING, dtype=np.int32)
    stream[: targets + 1] = np.concatenate(parts)
    blocks = np.lib.stride_tricks.sliding_window_view(stream, sequence_length + 1)[::sequence_length].copy()
    return ValidationSet(blocks, targets, text_bytes, unknown_tokens, is_exact)


def pack_once(path: Path, pack: Callable[[], ValidationSet | None]) -> ValidationSet | None:
    """What `pack` gives, kept at `path`: a start does not ask a server again for the same text.

    Raises:
        RecipeError: `path` cannot be written.
    """
    try:
        with np.load(path) as held:
            return ValidationSet(held["blocks"], *(held[name].item() for name in _NUMBERS))
    except (OSError, EOFError, BadZipFile, KeyError, ValueError):  # not there, or not whole
        packed = pack()
    if packed:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **asdict(packed))
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error.strerror}; set --data.cache_directory") from None
    return packed


_NUMBERS = ("tokens", "text_bytes", "unknown_tokens", "is_exact")
