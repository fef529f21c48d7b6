"""The tokenizer in use: it adds nothing to a text, and one word or document cannot hold up its training."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertTokenizer, GPT2Config, GPT2LMHeadModel, LlamaTokenizer, pipeline

from recipe.config.settings import Config, DataConfig
from recipe.data import tokenizer as tokenizer_module
from recipe.data.encode import DocumentEncoder
from recipe.data.standard_library import standard_library_files
from recipe.data.tokenizer import load_tokenizer, train_tokenizer
from recipe.model.export import export_model
from tests.helpers import ROOT, skip_if_quick
from tests.support.tokenizers import make_tokenizer

TEXTS = [(ROOT / "README.md").read_text(encoding="utf-8")]


def of_bert(directory: Path) -> None:
    """[CLS] in front, [SEP] behind, and types of tokens."""
    words = make_tokenizer("wordpiece", TEXTS).get_vocab()
    names = [*sorted(words, key=words.__getitem__), "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    BertTokenizer(vocab={name: number for number, name in enumerate(names)}, eos_token="</s>").save_pretrained(
        directory
    )


def of_llama(directory: Path) -> None:
    """A class that makes its post-processor anew when it is loaded."""
    model = json.loads(make_tokenizer("metaspace", TEXTS).backend_tokenizer.to_str())["model"]
    vocab = model["vocab"] | {"<s>": len(model["vocab"])}
    merges = [tuple(merge) for merge in model["merges"]]
    LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, add_eos_token=True).save_pretrained(directory)


def of_template(directory: Path) -> None:
    """End-of-text behind every text."""
    tokenizer = make_tokenizer("gpt4", TEXTS)
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("write", [of_bert, of_llama, of_template])
def test_a_tokenizer_that_adds_tokens_adds_none(write: Any, tmp_path: Path) -> None:
    """In use, and as exported: what the model is given is what it was trained on."""
    write(tmp_path / "given")
    given = AutoTokenizer.from_pretrained(tmp_path / "given")
    text = "Train a GPT-2, from nothing"
    expected = given(text, add_special_tokens=False)["input_ids"]
    assert given(text)["input_ids"] != expected, "so there is something to leave out"
    used = load_tokenizer(Config(data=DataConfig(tokenizer=str(tmp_path / "given"))), None)  # type: ignore[arg-type]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(used), n_layer=1, n_head=1, n_embd=8, n_positions=32))
    export_model(gpt2, used, tmp_path / "final")
    exported = AutoTokenizer.from_pretrained(tmp_path / "final")
    for tokenizer in (used, exported):
        assert tokenizer(text)["input_ids"] == expected
        assert set(tokenizer(text)) == {"input_ids", "attention_mask"}
        assert DocumentEncoder(tokenizer).encode([text])[0].tolist() == expected
        assert tokenizer.get_vocab() == given.get_vocab()
        assert tokenizer.special_tokens_map == given.special_tokens_map
        assert tokenizer.chat_template == given.chat_template
        assert tokenizer.decode(expected) == given.decode(expected)
    prepared = pipeline("text-generation", model=str(tmp_path / "final")).preprocess(text)
    assert prepared["input_ids"].tolist() == [expected]


def test_a_tokenizer_that_adds_nothing_stays_as_it_is(tmp_path: Path) -> None:
    make_tokenizer("gpt4", TEXTS).save_pretrained(tmp_path)
    used = load_tokenizer(Config(data=DataConfig(tokenizer=str(tmp_path))), None)  # type: ignore[arg-type]
    assert type(used) is type(AutoTokenizer.from_pretrained(tmp_path))
    assert used.backend_tokenizer.to_str() == AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.to_str()


def learnt(texts: list[str]) -> Any:
    return json.loads(train_tokenizer(texts, 600).backend_tokenizer.to_str())["model"]


def test_normal_text_gives_the_tokenizer_that_it_would_give_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    root, files = standard_library_files()
    texts = [(root / name).read_text(encoding="utf-8", errors="replace") for name in files[:40]]
    monkeypatch.setattr(tokenizer_module, "_TRAINING_PIECE", 300)
    assert sum(len(list(tokenizer_module._training_pieces(text))) for text in texts) > 500
    in_pieces = learnt(texts)
    monkeypatch.setattr(tokenizer_module, "_training_pieces", lambda text: iter([text]))
    assert in_pieces == learnt(texts)


def test_long_words_and_documents_are_cut_for_the_trainer() -> None:
    text = "ab" * 50_000 + " some words " * 50_000 + " " * 5000 + "z" * 1024 + "\n" + "y" * 1025
    pieces = list(tokenizer_module._training_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < tokenizer_module._TRAINING_PIECE + 5000
    runs = [run for piece in pieces for run in re.findall(r"\S+|\s+", piece)]
    assert max(map(len, runs)) == 1024
    assert "z" * 1024 in runs
    learnt(["word", "x" * 1_000_000])  # in a moment


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["train_tokenizer([text], 4096)", "DocumentEncoder(tokenizer).encode([text] * 99)"])
def test_a_signal_ends_training_and_encoding_at_once(doing: str) -> None:
    skip_if_quick()
    program = f"""
import random
from recipe.data.encode import DocumentEncoder
from recipe.data.tokenizer import train_tokenizer
from recipe.run.stop import StopRequest
tokenizer = train_tokenizer(["some text"], 300)
text = "".join(random.choices("abcdefghij", k=12_000_000))
stop = StopRequest()
stop.listen()
stop.prepare()
print("begins", flush=True)
{doing}
print("is done", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=5) == ("", "stopped by signal 15 before training began\n")
    assert process.returncode == 128 + signal.SIGTERM
