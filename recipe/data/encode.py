"""Documents to tokens, in bounded memory: a long document is encoded in pieces, cut where that changes none of its tokens."""

import itertools
import json
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# An encoding of `tokenizers` takes hundreds of bytes a token, so these bound what is encoded at once, in characters.
BATCH_LENGTH = 1 << 19
PIECE_LENGTH = 1 << 16  # a longer document is cut at the first place behind this
LONGEST_PIECE = 1 << 19  # and here at the latest, if there is none
_PLACE = re.compile(r"(?<=\S)(?: (?=\S)|\r?\n(?=\w))")  # where almost every tokenizer begins a new token
_PLACES_TRIED = 64
_CONTEXT = 128  # characters on each side that tell whether a cut changes tokens
_DECODED = 1 << 17  # tokens
_ANCHOR = "\n"  # in front of a piece, for tokenizers that treat the start of a text in another way


class DocumentEncoder:
    """Encodes whole documents. Special tokens that they spell out are plain text. One thread at a time is inside."""

    def __init__(self, tokenizer: Any) -> None:
        self._encoder = _text_encoder(tokenizer)
        self._anchor_tokens = len(self._ids([_ANCHOR])[0])
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        self._encoder.encode_special_tokens = True  # of which its own state says nothing

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The int32 tokens of each document, without end-of-text token."""
        with self._lock:
            parts: list[list[np.ndarray]] = [[] for _ in texts]
            batch: list[tuple[int, str, int]] = []
            length = 0
            for index, text in enumerate(texts):
                for piece, unused in self._pieces(text):
                    if batch and length + len(piece) > BATCH_LENGTH:
                        self._encode_batch(batch, parts)
                        batch, length = [], 0
                    batch.append((index, piece, unused))
                    length += len(piece)
            self._encode_batch(batch, parts)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def _encode_batch(self, batch: list[tuple[int, str, int]], parts: list[list[np.ndarray]]) -> None:
        encodings = self._encoder.encode_batch_fast([piece for _, piece, _ in batch], add_special_tokens=False)
        for (index, _, unused), encoding in zip(batch, encodings, strict=True):
            parts[index].append(np.array(encoding.ids[unused:], dtype=np.int32))

    def _pieces(self, text: str) -> Iterator[tuple[str, int]]:
        """Pieces of a document, each with the number of tokens at its start that do not belong to it."""
        start, anchor = 0, ""
        while len(text) - start > PIECE_LENGTH:
            cut, next_anchor = self._cut(text, start)
            if cut == len(text):
                break
            yield anchor + text[start:cut], self._anchor_tokens if anchor else 0
            start, anchor = cut, next_anchor
        yield anchor + text[start:], self._anchor_tokens if anchor else 0

    def _cut(self, text: str, start: int) -> tuple[int, str]:
        """The place, and what to put in front of what follows, at which the piece from `start` on can end."""
        end = min(start + LONGEST_PIECE, len(text))
        for place in itertools.islice(_PLACE.finditer(text, start + PIECE_LENGTH, end), _PLACES_TRIED):
            cut = place.start() if place[0] == " " else place.end()
            left, right = text[max(start, cut - _CONTEXT) : cut], text[cut : cut + _CONTEXT]
            whole, before, after, anchored = self._ids([left + right, left, right, _ANCHOR + right])
            if whole == before + after:
                return cut, ""
            if whole == before + anchored[self._anchor_tokens :]:
                return cut, _ANCHOR
        return end, ""

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]


def gives_back(tokenizer: Any, ids: np.ndarray, text: str) -> bool:
    """Whether these tokens are the text but for its white space: not if case, accents or characters are lost.

    Of a very long document its beginning is decoded.
    """
    decoded = tokenizer.decode(ids[:_DECODED], clean_up_tokenization_spaces=False)
    found, expected = "".join(decoded.split()), "".join(text.split())
    return (
        found == expected if len(ids) <= _DECODED else expected.startswith(found[:-8])
    )  # it may end within a character


def _text_encoder(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` that finds no special token in a text.

    `encode_special_tokens` keeps the added ones from being matched. A model's own vocabulary may hold them too, and would find
    them (Unigram, WordLevel, WordPiece, BPE with `ignore_merges` or merges): there they get names that no text can foresee.
    """
    from tokenizers import Tokenizer

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    names = {token["content"] for token in parts["added_tokens"] if token["special"]} | set(
        tokenizer.all_special_tokens
    )
    renamed = {name: f"{secrets.token_hex(16)}-{number}" for number, name in enumerate(sorted(names))}
    if isinstance(model["vocab"], dict):
        own = names & model["vocab"].keys()
        model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
    else:
        own = names & {token for token, _ in model["vocab"]}
        model["vocab"] = [[renamed.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in own:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [[a, b] for a, b in model["merges"] if not own & {a, b, a + b.removeprefix(prefix)}]
    added = [token for token in parts["added_tokens"] if token["content"] not in own]
    parts["added_tokens"] = [{**token, "special": token["content"] in names} for token in added]
    encoder = Tokenizer.from_str(json.dumps({**parts, "truncation": None, "padding": None, "post_processor": None}))
    encoder.encode_special_tokens = True
    return encoder
