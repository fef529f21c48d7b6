"""Cloze accuracy on files in the formats of HellaSwag, LAMBADA and BLiMP, with the prompts and scores of lm-eval.

Prompts: lm-evaluation-harness 0.4.13, `lm_eval/tasks/{hellaswag,lambada,blimp}`. Scores: `TemplateLM._encode_pair`,
`HFLM._loglikelihood_tokens` and `ConfigurableTask.process_results` there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.data.tokenizer import document_encoder
from recipe.errors import RecipeError


@dataclass(frozen=True)
class Item:
    """A context, the continuations to choose among (a space comes before each), and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


class Score(NamedTuple):
    """A continuation: its summed log-probability in nats, and whether each of its tokens is the most likely one."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class ClozeResult:
    """The items of a file.

    Args:
        format: HellaSwag, LAMBADA or BLiMP.
        items: how many.
        accuracy: share of items whose right choice has the highest summed log-probability; for LAMBADA, which has one choice,
            share of items whose last word is what greedy decoding gives. lm-eval's `acc`.
        normalised_accuracy: the same by log-probability over characters of the choice, lm-eval's `acc_norm`; not for LAMBADA.
    """

    format: str
    items: int
    accuracy: float
    normalised_accuracy: float | None

    def __str__(self) -> str:
        normalised = "" if self.normalised_accuracy is None else f", length-normalised {self.normalised_accuracy:.4f}"
        return f"{self.format}, {self.items:,} items: accuracy {self.accuracy:.4f}{normalised}"


def read_items(path: str) -> tuple[str, list[Item]]:
    """(format, items) of a .jsonl file; the fields of its first line tell the format.

    Raises:
        RecipeError: it cannot be read, or a line is not in one of the formats.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--cloze: cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None
    name, items = "", []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = name or next(name for name, (field, _) in _FORMATS.items() if field in row)
            item = _FORMATS[name][1](row)
            if not 0 <= item.answer < len(item.choices) or not all(item.choices):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise RecipeError(
                f"--cloze: line {number} of {path!r} is not {name or 'in a known format'}: valid are HellaSwag (ctx, endings, "
                "label), LAMBADA (text) and BLiMP (sentence_good, sentence_bad), one JSON object a line"
            ) from None
        items.append(item)
    if not items:
        raise RecipeError(f"--cloze: {path!r} is empty")
    return name, items


def _hellaswag(row: dict[str, Any]) -> Item:
    context = row["ctx"]
    if "activity_label" in row:  # the published files; without it the context stands as it is
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(_without_brackets(context), tuple(map(_without_brackets, row["endings"])), int(row["label"]))


def _without_brackets(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")  # left over from WikiHow
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _lambada(row: dict[str, Any]) -> Item:
    context, _, last_word = row["text"].rpartition(" ")
    return Item(context, (last_word,), 0)


def _blimp(row: dict[str, Any]) -> Item:
    return Item("", (row["sentence_good"], row["sentence_bad"]), 0)


# format -> (a field that no other has, reader of a line)
_FORMATS = {"HellaSwag": ("endings", _hellaswag), "BLiMP": ("sentence_good", _blimp), "LAMBADA": ("text", _lambada)}


def cloze(gpt2: Any, tokenizer: Any, name: str, items: Sequence[Item], rows: int) -> ClozeResult:
    """Accuracy of `items` of the format `name`, `rows` continuations in one forward."""
    pairs = [(item.context, f" {choice}") for item in items for choice in item.choices]
    scores = iter(score(gpt2, tokenizer, pairs, rows))
    of_items = [[next(scores) for _ in item.choices] for item in items]
    if name == "LAMBADA":
        return ClozeResult(name, len(items), sum(only.is_greedy for (only,) in of_items) / len(items), None)
    right = normalised = 0
    for item, (*choices,) in zip(items, of_items, strict=True):
        values = [choice.log_probability for choice in choices]
        per_character = [value / len(text) for value, text in zip(values, item.choices, strict=True)]
        right += values.index(max(values)) == item.answer
        normalised += per_character.index(max(per_character)) == item.answer
    return ClozeResult(name, len(items), right / len(items), normalised / len(items))


def score(gpt2: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], rows: int) -> list[Score]:
    """Score the continuation of each (context, continuation), in batches of `rows` of similar length.

    Args:
        gpt2: a GPT2LMHeadModel in eval mode.
        tokenizer: of the model; an empty context becomes its end-of-text token.
        pairs: a context that is too long loses its beginning.
        rows: pairs in one forward.

    Raises:
        RecipeError: a continuation without a token, or longer than the model's positions.
    """
    encoder = document_encoder(tokenizer)
    encoded = [_encode(encoder, tokenizer.eos_token_id, *pair) for pair in pairs]
    positions = gpt2.config.n_positions
    for (_, continuation), (_, text) in zip(encoded, pairs, strict=True):
        if not 0 < len(continuation) <= positions:
            raise RecipeError(f"{text[:40]!r} has {len(continuation)} tokens: this model scores 1 to {positions}")
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0] + encoded[index][1]))
    scores: dict[int, Score] = {}
    for first in range(0, len(order), rows):
        chunk = order[first : first + rows]
        tokens, is_scored = _pad_right([encoded[index] for index in chunk], positions)
        tokens, is_scored = tokens.to(gpt2.device), is_scored.to(gpt2.device)
        with torch.no_grad():  # causal: no token sees the padding after it
            hidden = gpt2.transformer(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[is_scored]
            logits = F.linear(hidden, gpt2.lm_head.weight[: len(tokenizer)]).float()
        targets = tokens[:, 1:][is_scored]
        log_probabilities = -F.cross_entropy(logits, targets, reduction="none").cpu().double()
        is_greedy = (logits.argmax(-1) == targets).cpu()
        lengths = [len(encoded[index][1]) for index in chunk]
        for index, values, hits in zip(chunk, log_probabilities.split(lengths), is_greedy.split(lengths), strict=True):
            scores[index] = Score(values.sum().item(), bool(hits.all()))
    return [scores[index] for index in range(len(pairs))]


def _encode(encoder: Any, end_of_text: int, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both, split where the context ends; spaces at its end belong to the continuation's first word."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return [end_of_text], encoder.encode(continuation, add_special_tokens=False).ids
    tokens = encoder.encode(stripped, add_special_tokens=False).ids
    return tokens, encoder.encode(stripped + continuation, add_special_tokens=False).ids[len(tokens) :]


def _pad_right(encoded: Sequence[tuple[list[int], list[int]]], positions: int) -> tuple[Tensor, Tensor]:
    """int64 [rows, longest], and bool [rows, longest - 1]: is the target at this input a token of the continuation?"""
    together = [(context + continuation)[-(positions + 1) :] for context, continuation in encoded]
    longest = max(map(len, together))
    tokens = torch.zeros(len(encoded), longest, dtype=torch.int64)
    is_scored = torch.zeros(len(encoded), longest - 1, dtype=torch.bool)
    for row, (all_of_row, (_, continuation)) in enumerate(zip(together, encoded, strict=True)):
        tokens[row, : len(all_of_row)] = torch.tensor(all_of_row)
        is_scored[row, len(all_of_row) - 1 - len(continuation) : len(all_of_row) - 1] = True
    return tokens, is_scored
