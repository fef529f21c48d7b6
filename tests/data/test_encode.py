"""Documents to tokens: in pieces exactly as whole, special tokens as text, one thread at a time."""

from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks.text_memory import gpt2_tokenizer
from recipe.data import encode as encode_module
from recipe.data.encode import DocumentEncoder
from recipe.data.standard_library import standard_library_files
from recipe.data.tokenizer import END_OF_TEXT, train_tokenizer
from recipe.data.validation import pack_validation
from tests.support.tokenizers import make_tokenizer

SPLITTING = ["gpt2", "gpt4", "prefix_space", "metaspace", "llama", "unigram", "t5", "wordpiece", "wordlevel"]
ALL = [*SPLITTING, "ignore_merges", "wordpiece_by_space"]


def untidy_texts() -> list[str]:
    """Code, Chinese, emoji, line ends of every kind, long runs of one character, and what looks like a special token."""
    root, files = standard_library_files()
    code = [(root / name).read_text(encoding="utf-8")[:12_000] for name in files[:3]]
    draw = random.Random(0)
    chinese = "".join(
        draw.choices("的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要。\n，", k=4000)
    )
    untidy = (
        "a" + " " * 777 + "b\t\tc\n\n\n d \r\n e\r\nf  g" + "=" * 501 + "\n" + "-" * 300 + "\r\n" + "12345 67890 " * 40
    )
    return [
        *code,
        code[0].replace("\n", "\r\n"),
        code[1].replace(" ", ""),
        chinese,
        chinese.replace("\n", "\r\n"),
        "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{WOMAN} hi e\N{COMBINING ACUTE ACCENT} " * 100,
        (untidy + "x\N{NO-BREAK SPACE}y \N{ZERO WIDTH SPACE} z \N{IDEOGRAPHIC SPACE} w can't 'll don't </s> [PAD]") * 4,
        "1, 2, 3, 4" * 500,
        "",
    ]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return untidy_texts()


@pytest.fixture(scope="module")
def tokenizers(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {kind: make_tokenizer(kind, texts) for kind in ALL if kind != "gpt2"}
    gpt2 = AutoTokenizer.from_pretrained(gpt2_tokenizer(tmp_path_factory.mktemp("gpt2") / "tokenizer"))
    return {"gpt2": gpt2, **made}


def in_pieces(
    tokenizer: Any, texts: list[str], length: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[np.ndarray], int]:
    """(tokens of each text when its pieces are a little longer than `length`, how many pieces there were)."""
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "PIECE_LENGTH", length)
        patch.setattr(encode_module, "BATCH_LENGTH", 4 * length)
        encoder = DocumentEncoder(tokenizer)
        return encoder.encode(texts), sum(len(list(encoder._pieces(text))) for text in texts)


def are_equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    assert all(ids.dtype == np.int32 for ids in ours)
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", SPLITTING)
def test_a_document_in_pieces_has_the_tokens_of_the_whole(
    tokenizers: dict[str, Any], texts: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers[kind]
    whole = DocumentEncoder(tokenizer).encode(texts)  # all of them are shorter than a piece
    plain = tokenizer.backend_tokenizer.encode(texts[0], add_special_tokens=False).ids
    assert whole[0].tolist() == plain, "the tokenizer's own"
    found, pieces = in_pieces(tokenizer, texts, 500, monkeypatch)
    assert are_equal(found, whole)
    assert pieces > sum(map(len, texts)) / 1500, "there is a place in almost every stretch"


def test_a_cut_anywhere_would_be_seen(
    tokenizers: dict[str, Any], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: no place to cut is looked for."""
    monkeypatch.setattr(DocumentEncoder, "_cut", lambda self, text, start: (start + 500, ""))
    for kind in SPLITTING:
        whole = DocumentEncoder(tokenizers[kind]).encode(texts)
        assert not are_equal(in_pieces(tokenizers[kind], texts, 500, monkeypatch)[0], whole), kind


def test_a_word_longer_than_the_longest_piece_is_cut_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "LONGEST_PIECE", 1000)
    tokenizer = train_tokenizer(["some text to train on"], 300)
    (ids,), pieces = in_pieces(tokenizer, ["ab" * 1250], 100, monkeypatch)
    assert pieces == 3
    assert tokenizer.decode(ids) == "ab" * 1250


def test_batches_are_bounded_in_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one call of `tokenizers` holds, of many documents as of one."""
    monkeypatch.setattr(encode_module, "PIECE_LENGTH", 100)
    monkeypatch.setattr(encode_module, "BATCH_LENGTH", 400)
    encoder = DocumentEncoder(train_tokenizer(["some text to train on"], 300))
    backend, lengths = encoder._encoder, list[int]()

    class Watched:
        def encode_batch_fast(self, batch: list[str], **options: Any) -> Any:
            lengths.append(sum(map(len, batch)))
            return backend.encode_batch_fast(batch, **options)

    encoder._encoder = Watched()
    documents = ["word " * n for n in (1, 500, 3, 70, 7)] * 3
    assert [len(ids) for ids in encoder.encode(documents)] == [len(backend.encode(t).ids) for t in documents]
    assert max(lengths) <= max(400, 8 * encode_module._CONTEXT)


@pytest.mark.parametrize("kind", [*ALL, "byte_level"])
def test_special_tokens_that_a_document_spells_out_are_text(
    tokenizers: dict[str, Any], kind: str, texts: list[str]
) -> None:
    tokenizer = train_tokenizer(texts, 400) if kind == "byte_level" else tokenizers[kind]
    special = sorted(set(tokenizer.all_special_tokens) | {END_OF_TEXT})
    text = " ".join([f"before{token}after {token} {token}{token}" for token in special])
    (ids,) = DocumentEncoder(tokenizer).encode([text])
    unknown = {tokenizer.unk_token_id} if kind not in ("gpt2", "byte_level") else set()
    assert not (set(tokenizer.all_special_ids) - unknown) & set(ids.tolist())
    if kind in ("gpt2", "gpt4", "prefix_space", "byte_level"):  # which can represent every text
        assert tokenizer.decode(ids).strip() == text
        assert tokenizer.unk_token_id is None or kind == "gpt2" or tokenizer.unk_token_id not in ids


def test_a_special_token_made_of_merges_is_text_too() -> None:
    """A BPE whose merges lead to it, and which has it as an added token with a later id than others."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<", "/", "s", ">", "a", "</", "s>", "</s>", "sa"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("s", "a")]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(letters)}, merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="[PAD]")
    assert tokenizer.backend_tokenizer.encode("</s>sa").ids == [7, 8]
    (ids,) = DocumentEncoder(tokenizer).encode(["</s>sa[PAD]"])
    assert ids.tolist()[:3] == [5, 6, 8]
    assert set(ids[3:].tolist()).isdisjoint({7, tokenizer.pad_token_id})


def test_threads_share_an_encoder(tokenizers: dict[str, Any], texts: list[str]) -> None:
    encoder = DocumentEncoder(tokenizers["gpt2"])
    expected = encoder.encode(texts)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(encoder.encode, [texts] * 8):
            assert are_equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "text", "is_exact", "unknown"),
    [
        ("gpt2", "Any t\N{LATIN SMALL LETTER E WITH ACUTE}xt \N{GRINNING FACE}\r\n </s>", True, 0),
        ("gpt4", "Any t\N{LATIN SMALL LETTER E WITH ACUTE}xt \N{GRINNING FACE}\r\n  ", True, 0),
        ("llama", "some words  and more", True, 0),
        ("llama", "some \N{GRINNING FACE} words", True, 0),
        ("wordpiece", "Capitals are lost", False, 0),
        ("wordpiece", "the import, of a class", True, 0),
        ("t5", "\N{LATIN SMALL LIGATURE FI}n", False, 0),
        ("wordlevel", "neverseen neverheard", False, 2),
        ("unigram", "a \N{SNOWMAN} b", False, 1),
    ],
)
def test_bits_per_byte_are_for_text_that_the_tokens_give_back(
    tokenizers: dict[str, Any], kind: str, text: str, is_exact: bool, unknown: int
) -> None:
    validation = pack_validation(iter([text]), tokenizers[kind], 16, float("inf"))
    assert validation is not None
    assert (validation.is_exact, validation.unknown_tokens) == (is_exact, unknown)
    assert (validation.loss_of_text is None) == is_exact
    if unknown:
        assert f"{100 * unknown / validation.tokens:.2g} % of the tokens are unknown" in str(validation.loss_of_text)


def test_a_very_long_text_is_compared_by_its_beginning(
    tokenizers: dict[str, Any], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = DocumentEncoder(tokenizers["gpt2"])
    for decoded in range(1000, 1030):
        monkeypatch.setattr(encode_module, "_DECODED", decoded)
        for text in texts:
            (ids,) = encoder.encode([text])
            assert encode_module.gives_back(tokenizers["gpt2"], ids, text)
            assert not encode_module.gives_back(tokenizers["gpt2"], ids, f"x{text}")


def test_an_encoder_in_another_process_finds_no_special_token_in_a_text_either() -> None:
    """Of the tokens that are not in the model's own vocabulary a `tokenizers.Tokenizer` forgets that on the way."""
    tokenizer = train_tokenizer(["some text"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mask>"]})
    encoder = DocumentEncoder(tokenizer)
    (ids,) = encoder.encode(["a <mask> b"])
    assert tokenizer.convert_tokens_to_ids("<mask>") not in ids
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(encoder)).encode(["a <mask> b"])[0], ids)
