"""The finished model: GPT-2's real vocabulary, padding that can never be sampled, exact weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.text_memory import gpt2_tokenizer
from recipe.config.settings import Config, DataConfig, ModelConfig
from recipe.data.blocks import to_tensors
from recipe.data.tokenizer import load_tokenizer
from recipe.data.validation import pack_validation
from recipe.errors import RecipeError
from recipe.evaluation.sample import GenerateConfig, generate, tokens_to_generate
from recipe.model.export import export_model, load_pretrained
from recipe.model.gpt2 import build_gpt2

TEXTS = ["The quick brown fox jumps over the lazy dog.", "def main() -> None:\n    pass\n"] * 8


@pytest.fixture(scope="module")
def gpt2_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with GPT-2's own vocabulary, from a package that ships it."""
    return Path(gpt2_tokenizer(tmp_path_factory.mktemp("gpt2") / "tokenizer"))


@pytest.fixture(scope="module")
def built(gpt2_vocabulary: Path) -> tuple[Any, Any]:
    """A tiny padded model, whose padding would win every draw if it could, and GPT-2's tokenizer."""
    shape = ModelConfig(n_layer=1, n_embd=16, n_head=2, vocab_size=50_304)
    config = Config(model=shape, data=DataConfig(tokenizer=str(gpt2_vocabulary), sequence_length=64))
    tokenizer = load_tokenizer(config, None)  # type: ignore[arg-type]  # no source: nothing is trained
    model = build_gpt2(config, len(tokenizer), tokenizer.eos_token_id)
    model.gpt2.transformer.wte.weight.data[50_257:] = 30 * torch.randn(47, 16)
    return model.eval(), tokenizer


def test_gpt2_vocabulary_is_the_real_one(built: tuple[Any, Any]) -> None:
    _, tokenizer = built
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.eos_token) == (50_257, 50_256, "<|endoftext|>")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]


def test_exported_model_is_the_same_function_without_the_padding(built: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = built
    export_model(model.gpt2, tokenizer, tmp_path / "final")
    loaded, its_tokenizer = load_pretrained(str(tmp_path / "final"))
    assert loaded.config.vocab_size == len(its_tokenizer) == 50_257
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, weight in loaded.named_parameters():
        expected = model.gpt2.get_parameter(name)
        assert torch.equal(weight, expected[: len(weight)]), name
    validation = pack_validation(iter(TEXTS), tokenizer, 64, float("inf"))
    assert validation is not None
    inputs, targets = to_tensors(validation.blocks, torch.device("cpu"))
    with torch.no_grad():
        ours = model(inputs, targets) / validation.tokens
        logits = loaded(inputs).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no temporary directory is left"


def test_padding_is_never_sampled(built: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the model in training, and not by plain `generate` of the exported one, greedy or at any temperature."""
    model, tokenizer = built
    prompt = torch.tensor([[464]])
    assert model.gpt2(prompt).logits[0, -1].argmax() >= 50_257, "the padding would win"
    decoded: list[torch.Tensor] = []

    def decode(ids: torch.Tensor, **_: object) -> str:
        decoded.append(ids)
        return ""

    monkeypatch.setattr(tokenizer, "decode", decode)
    for temperature in (0.0, 1.0, 100.0):
        generate(model.gpt2, tokenizer, GenerateConfig("The", max_new_tokens=40, temperature=temperature, top_k=0))
    assert torch.cat(decoded).max() < 50_257
    export_model(model.gpt2, tokenizer, tmp_path / "final")
    loaded, _ = load_pretrained(str(tmp_path / "final"))
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 100.0, "top_k": 0}):
        ids = loaded.generate(prompt, max_new_tokens=40, **options)
        assert ids.max() < 50_257


def test_generation_uses_a_cache_that_agrees_with_none(built: tuple[Any, Any]) -> None:
    """Our attention without a mask, one query at a time, against the whole sequence at once."""
    model, _ = built
    prompt = torch.tensor([[464, 2068, 7586, 21831]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": list(range(50_257, 50_304))}
    cached = model.gpt2.generate(prompt, use_cache=True, **options)
    plain = model.gpt2.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_a_prompt_is_kept_whole_and_less_is_generated(built: tuple[Any, Any]) -> None:
    """The model has 64 positions; each "word" is a token."""
    model, tokenizer = built
    prompt = "first" + " word" * 59
    answer = generate(model.gpt2, tokenizer, GenerateConfig(prompt, max_new_tokens=16, top_k=0))
    assert answer.startswith(prompt)
    assert tokens_to_generate(model.gpt2, tokenizer, GenerateConfig(prompt, max_new_tokens=16)) == 4
    assert tokens_to_generate(model.gpt2, tokenizer, GenerateConfig(prompt, max_new_tokens=3)) == 3
    assert generate(model.gpt2, tokenizer, GenerateConfig("word", max_new_tokens=500))
    assert generate(model.gpt2, tokenizer, GenerateConfig("first" + " word" * 62))
    with pytest.raises(RecipeError, match=r"has 64 tokens, and the model 64 positions .* of 63 tokens or fewer"):
        generate(model.gpt2, tokenizer, GenerateConfig("first" + " word" * 63))


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_the_old_one(
    built: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = built
    export_model(model.gpt2, tokenizer, tmp_path / "final")
    (tmp_path / "blocked").write_text("a file where a directory would have to be")
    with pytest.raises(RecipeError, match="cannot write the model"):
        export_model(model.gpt2, tokenizer, tmp_path / "blocked/final")
    again = replace(GenerateConfig("The"), max_new_tokens=2)
    assert generate(load_pretrained(str(tmp_path / "final"))[0], tokenizer, again)


def test_a_tokenizer_with_a_hole_in_its_ids_is_refused(gpt2_vocabulary: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((gpt2_vocabulary / "vocab.json").read_text(encoding="utf-8"))
    moved = {token: number + 30 * (number > 50_000) for token, number in vocabulary.items()}
    shutil.copytree(gpt2_vocabulary, tmp_path / "hole")
    (tmp_path / "hole/vocab.json").write_text(json.dumps(moved), encoding="utf-8")
    config = Config(data=DataConfig(tokenizer=str(tmp_path / "hole")))
    with pytest.raises(RecipeError, match="its ids have a hole"):
        load_tokenizer(config, None)  # type: ignore[arg-type]


def test_an_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers can build a tokenizer of one token from files it did not find."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8")
    config = Config(data=DataConfig(tokenizer=str(tmp_path)))
    with pytest.raises(RecipeError, match=r"data\.tokenizer = "):
        load_tokenizer(config, None)  # type: ignore[arg-type]
