"""Tokenizers of every kind of `tokenizers`, small and trained. GPT-2's own is `benchmarks.text_memory.gpt2_tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<unk>", "</s>", "[PAD]"]


def make_tokenizer(kind: str, texts: Sequence[str]) -> Any:
    """A tokenizer that is trained on `texts`, with "</s>" as its end-of-text token."""
    options: dict[str, Any] = {"vocab_size": 1000, "special_tokens": SPECIAL, "show_progress": False}
    unigram: dict[str, Any] = {**options, "unk_token": "<unk>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    after_split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t5 = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    model, trainer, normalizer, pre_tokenizer = {
        "gpt4": lambda: (
            models.BPE(),
            trainers.BpeTrainer(**options, initial_alphabet=alphabet),
            None,
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT4), "isolated"), after_split]),
        ),
        "prefix_space": lambda: (
            models.BPE(),
            trainers.BpeTrainer(**options, initial_alphabet=alphabet),
            None,
            pre_tokenizers.ByteLevel(add_prefix_space=True),
        ),
        "metaspace": lambda: (
            models.BPE(unk_token="<unk>", byte_fallback=True),
            trainers.BpeTrainer(**options, max_token_length=16),
            None,
            pre_tokenizers.Metaspace(),
        ),
        "ignore_merges": lambda: (
            models.BPE(unk_token="<unk>", ignore_merges=True),
            trainers.BpeTrainer(**options),
            None,
            pre_tokenizers.WhitespaceSplit(),
        ),
        "unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(**unigram), None, pre_tokenizers.Metaspace()),
        "t5": lambda: (
            models.Unigram(),
            trainers.UnigramTrainer(**unigram),
            t5,
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        ),
        "wordpiece": lambda: (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(**options),
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        ),
        "wordpiece_by_space": lambda: (
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer(**options),
            None,
            pre_tokenizers.WhitespaceSplit(),
        ),
        "wordlevel": lambda: (
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(**options),
            None,
            pre_tokenizers.WhitespaceSplit(),
        ),
    }["metaspace" if kind == "llama" else kind]()
    backend = Tokenizer(model)
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(texts, trainer)
    if kind in ("gpt4", "prefix_space"):
        backend.decoder = decoders.ByteLevel()
    elif kind.startswith("wordpiece"):
        backend.decoder = decoders.WordPiece()
    elif kind in ("metaspace", "llama", "unigram", "t5"):
        backend.decoder = decoders.Metaspace()
    if kind == "llama":  # which has a normalizer in place of the pre-tokenizer
        backend = Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "pre_tokenizer": None}))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="[PAD]")


def save_byte_tokenizer(directory: Path) -> str:
    """A token for each byte, of its number, and 256 for the end of text."""
    shown = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # by their own character; the others by those from 256 on
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*shown}))}
    bpe = Tokenizer(models.BPE({character: byte for byte, character in characters.items()}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(directory)
    return str(directory)
