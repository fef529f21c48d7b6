"""The tokenizer: loaded by name, or a byte-level BPE trained once on the training documents and cached."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recipe.config.settings import Config
from recipe.data.documents import Source
from recipe.data.formats import TokenIds
from recipe.errors import RecipeError
from recipe.run.alike import check_alike
from recipe.run.run import Run

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 64_000_000
# The trainer takes minutes for a word of millions of characters, and holds some hundred bytes for each byte of a document.
LONGEST_TRAINING_WORD = 1024
_LONG_RUN = re.compile(r"(?<!\S)\S{1025,}|(?<!\s)\s{1025,}")
_TRAINING_PIECE = 1 << 16  # characters
_BEFORE_WORD = re.compile(r"(?<=\S) (?=\S)")  # where the words are the same with and without a cut


def load_tokenizer(
    config: Config, sources: Sequence[Source], init_from: str | None = None, run: Run | None = None
) -> Any:
    """The fast tokenizer that `data.tokenizer` names, or that of the model in `init_from`, or one trained on the sources.

    With a `run` rank 0 alone reads the text that one is trained on, and ranks compare what they have loaded. Collective.

    Raises:
        RecipeError: it cannot be loaded or used, or is not that of `init_from`, or nothing says which it is.
    """
    tokenizer = _named_tokenizer(config, init_from)
    if tokenizer is None and init_from is not None:
        raise RecipeError(
            f"model.init_from = {config.model.init_from!r} has no tokenizer: set --data.tokenizer to the one that it was "
            "trained with"
        )
    if tokenizer is None:  # another host may have another cache
        tokenizer = run.on_main(lambda: _train_once(config, sources)) if run else _train_once(config, sources)
    tokenizer = _adding_nothing(tokenizer)
    if run:
        check_alike(
            lambda: {"the tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()}
        )
    tokenizer.model_max_length = config.n_positions
    return tokenizer


def load_token_ids(config: Config, are_packed: bool) -> TokenIds:
    """What the tokenizer that `config` names says of token ids.

    Raises:
        RecipeError: it cannot be loaded or used, or none is named.
    """
    tokenizer = _named_tokenizer(config, config.model.init_from)
    if tokenizer is None:
        raise RecipeError("token ids are read with the tokenizer that made them: set --data.tokenizer to it")
    return token_ids_of(tokenizer, str(config.data.tokenizer or config.model.init_from), are_packed)


def token_ids_of(tokenizer: Any, name: str, are_packed: bool) -> TokenIds:
    """What a tokenizer of this name says of token ids."""
    end, beginning = tokenizer.eos_token_id, tokenizer.bos_token_id
    delimiters = (end,) if beginning in (None, end) else (end, beginning)
    return TokenIds(name, vocabulary_hash(tokenizer), delimiters, len(tokenizer), are_packed)


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of all tokens and their ids, in hexadecimal."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _named_tokenizer(config: Config, init_from: str | None) -> Any:
    """That of `data.tokenizer`, or else of `init_from`; None if neither is named, or `init_from` has none."""
    name, model = config.data.tokenizer, config.model.init_from
    given = None if name is None else find_tokenizer(f"data.tokenizer = {name!r}", name)
    if name is not None and given is None:
        raise RecipeError(
            f"data.tokenizer = {name!r} has no vocabulary: give a directory or Hub name with one, or null"
        )
    its_own = None if init_from is None else find_tokenizer(f"the tokenizer of model.init_from = {model!r}", init_from)
    if given and its_own and given.get_vocab() != its_own.get_vocab():
        raise RecipeError(
            f"data.tokenizer = {name!r} ({len(given):,} tokens) has another vocabulary than that of "
            f"model.init_from = {model!r} ({len(its_own):,}): set --data.tokenizer null to take the model's"
        )
    return given or its_own


def find_tokenizer(what: str, name: str) -> Any:
    """The fast tokenizer in a local directory or Hub repository `name`, or None if it has none; `what` is for the message.

    Raises:
        RecipeError: it cannot be loaded, or is slow, or has too few tokens, a hole in its ids, or no end-of-text token.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # what is wrong is in our one line
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokens, highest = len(tokenizer), max(tokenizer.get_vocab().values(), default=-1)
        if tokens <= len(tokenizer.all_special_tokens):  # transformers makes one from files that it has not found
            return None
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception as error:  # each class of tokenizers has its own
        raise RecipeError(f"cannot load {what}: {' '.join(str(error).split())[:300]}") from error
    if not tokenizer.is_fast or tokens < 257 or tokenizer.eos_token_id is None or not ids:
        raise RecipeError(
            f"{what} cannot be used ({tokens} tokens, fast: {tokenizer.is_fast}, end-of-text token: {tokenizer.eos_token}): "
            "it has to be a fast tokenizer with a vocabulary and an end-of-text token"
        )
    if highest >= tokens:
        raise RecipeError(f"{what} has {tokens} tokens but ids up to {highest}: its ids have a hole")
    return tokenizer


def _adding_nothing(tokenizer: Any) -> Any:
    """The tokenizer, but `tokenizer(text)` has the tokens of the text alone, as the model is trained on them.

    Some add a token in front or behind, which would be new to the model or end the document, or `token_type_ids`, which GPT-2
    embeds and adds. A plain class, because others make what adds tokens anew when they are loaded.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    encoded = tokenizer("a")
    if (
        encoded["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
        and "token_type_ids" not in encoded
    ):
        return tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


def _train_once(config: Config, sources: Sequence[Source]) -> Any:
    """The tokenizer, kept in a directory of the cache that a hash of the text and of every setting names."""
    settings = {
        "vocab_size": config.model.vocab_size,
        "end_of_text": END_OF_TEXT,
        "bytes": TRAINING_BYTES,
        "version": 2,
    }
    texts: list[str] = []
    digest, size = hashlib.sha256(json.dumps(settings).encode()), 0
    for text in _texts_of(sources):
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
        texts.append(text)
        size += len(encoded)
        if size >= TRAINING_BYTES:
            break
    if not size:
        raise RecipeError(f"{' and '.join(source.name for source in sources)}: no text to train a tokenizer on")
    directory = config.cache_directory / f"tokenizer-{digest.hexdigest()[:16]}"
    if not (directory / "tokenizer_config.json").is_file():
        _save_atomically(train_tokenizer(texts, config.model.vocab_size), directory)
    return find_tokenizer(f"the tokenizer trained before (delete {directory})", str(directory))


def _texts_of(sources: Sequence[Source]) -> Iterator[str]:
    """The training documents; of several sources by weight, in characters, until each is at its end."""
    readers = {number: source.training_documents() for number, source in enumerate(sources)}
    taken = dict.fromkeys(readers, 0.0)
    while readers:
        number = min(readers, key=lambda number: taken[number])
        text = next(readers[number], None)
        if text is None:
            del readers[number]
        else:
            taken[number] += len(text) / sources[number].weight
            yield str(text)


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
    bpe.train_from_iterator((piece for text in texts for piece in _training_pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _training_pieces(text: str) -> Iterator[str]:
    """The text in pieces with the same words, but for those that are longer than `LONGEST_TRAINING_WORD`: they are cut."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        for cut in range(run.start() + LONGEST_TRAINING_WORD, run.end(), LONGEST_TRAINING_WORD):
            yield from _short_pieces(text[start:cut])
            start = cut
    yield from _short_pieces(text[start:])


def _short_pieces(text: str) -> Iterator[str]:
    start = 0
    while place := _BEFORE_WORD.search(text, start + _TRAINING_PIECE):
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


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
