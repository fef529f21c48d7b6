"""The tokenizer: loaded by name, or a byte-level BPE trained once on the training documents and cached."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipe.config.settings import Config
from recipe.data.documents import Source
from recipe.errors import RecipeError

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 64_000_000


def load_tokenizer(config: Config, source: Source, init_from: str | None = None) -> Any:
    """The fast tokenizer that `data.tokenizer` names, or that of the model in `init_from`, or one trained on `source`.

    Raises:
        RecipeError: it cannot be loaded, is empty or slow, has no end-of-text token, or is not that of `init_from`.
    """
    if init_from is None:
        return _named_tokenizer("data.tokenizer", config.data.tokenizer, config) or _trained_tokenizer(config, source)
    its_own = _named_tokenizer("the tokenizer of model.init_from", init_from, config)
    given = _named_tokenizer("data.tokenizer", config.data.tokenizer, config)
    if given and given.get_vocab() != its_own.get_vocab():
        raise RecipeError(
            f"data.tokenizer = {config.data.tokenizer!r} ({len(given):,} tokens) has another vocabulary than that of "
            f"model.init_from = {config.model.init_from!r} ({len(its_own):,}): set --data.tokenizer null to take the model's"
        )
    return given or its_own


def _named_tokenizer(setting: str, name: str | None, config: Config) -> Any:
    """The tokenizer that a setting names; None if it is null."""
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"cannot load {setting} = {name!r}: {reason}; give a local directory with one, or null"
        ) from error
    if not tokenizer.is_fast or len(tokenizer) < 257 or tokenizer.eos_token_id is None:
        raise RecipeError(
            f"{setting} = {name!r} cannot be used ({len(tokenizer)} tokens, fast: {tokenizer.is_fast}, end-of-text "
            f"token: {tokenizer.eos_token}): it has to be a fast tokenizer with a vocabulary and an end-of-text token"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise RecipeError(
            f"{setting} = {name!r} has {len(tokenizer)} tokens but ids up to {highest}: its ids have a hole"
        )
    tokenizer.model_max_length = config.n_positions
    return tokenizer


def _trained_tokenizer(config: Config, source: Source) -> Any:
    """Train, or take from the cache: keyed by a hash of the text and of every setting."""
    from transformers import PreTrainedTokenizerFast

    settings = {
        "vocab_size": config.model.vocab_size,
        "end_of_text": END_OF_TEXT,
        "bytes": TRAINING_BYTES,
        "version": 1,
    }
    texts: list[str] = []
    digest, size = hashlib.sha256(json.dumps(settings).encode()), 0
    for text in source.training_documents():
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
        texts.append(text)
        size += len(encoded)
        if size >= TRAINING_BYTES:
            break
    if not size:
        raise RecipeError(f"{source.name} has no text to train a tokenizer on")
    directory = config.cache_directory / f"tokenizer-{digest.hexdigest()[:16]}"
    if not (directory / "tokenizer_config.json").is_file():
        _save_atomically(train_tokenizer(texts, config.model.vocab_size), directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
    tokenizer.model_max_length = config.n_positions
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, as GPT-2's, with one special token, `END_OF_TEXT`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def document_encoder(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` for documents, in which special tokens that a document spells out are plain text."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _save_atomically(tokenizer: Any, directory: Path) -> None:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=directory.parent))
    except OSError as error:
        raise RecipeError(f"cannot write {directory.parent}: {error.strerror}; set --data.cache_directory") from None
    try:
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, directory)
    except Exception as error:  # tokenizers raises its own
        if not directory.is_dir():  # another process may have been faster
            raise RecipeError(f"cannot write {directory}: {error}; set --data.cache_directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
