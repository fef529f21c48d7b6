"""The finished model in other people's hands: the start of another run, transformers' pipelines, llama.cpp's converter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipe.checkpoint.resume import find_resume_point
from recipe.config.command_line import load_config
from recipe.config.settings import Config, DataConfig, ModelConfig
from recipe.data.tokenizer import load_tokenizer, train_tokenizer
from recipe.errors import RecipeError
from recipe.model.export import load_pretrained
from recipe.model.gpt2 import build_gpt2
from tests.helpers import TINY, read_ledger, train

VOCABULARY = 380  # of `finished`; a run that starts from its model has 384 rows, four of them padding


@pytest.fixture(scope="module")
def final(finished: Path) -> Path:
    return finished / "final"


def settings(final: Path) -> Config:
    """Those of a run from `final`."""
    model = ModelConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=384, init_from=str(final))
    return Config(model=model, data=DataConfig(tokenizer=None, sequence_length=64))


def validation(run: Path) -> dict[str, Any]:
    """Before and after it, on the held-out documents."""
    values: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))["validation"]["held_out"]
    return values


def test_a_run_begins_where_the_one_it_starts_from_ended_and_goes_on_without_it(
    finished: Path, texts: Path, tmp_path: Path
) -> None:
    """The shape that the settings state does not count; the vocabulary is padded. Then resumed when the first model is gone."""
    moved, second = shutil.copytree(finished / "final", tmp_path / "moved"), tmp_path / "second"
    command = [
        *[*TINY, "--run.directory", str(second), "--data.text_files", f"{texts}/*.txt"],
        *[
            "--data.validation_one_in",
            "10",
            "--model.init_from",
            str(moved),
            "--model.n_layer",
            "5",
            "--model.n_embd",
            "64",
        ],
    ]
    done = train(*command, "--run.max_updates", "2")
    assert done.returncode == 0, done.stderr
    first = validation(finished)
    assert validation(second)["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-5)
    assert first["after"]["loss"] < first["before"]["loss"] - 0.1, "so it says something"
    assert (moved / "tokenizer.json").read_bytes() == (second / "final/tokenizer.json").read_bytes()
    shutil.rmtree(moved)
    done = train(*command, "--run.max_updates", "3")
    assert done.returncode == 0, done.stderr
    assert [entry["update"] for entry in read_ledger(second)] == [1, 2, 3]


def test_weights_of_a_bf16_file_are_trained_in_float32(final: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(final, tmp_path / "bf16")
    AutoModelForCausalLM.from_pretrained(final).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16, "as transformers has it"
    config = settings(tmp_path / "bf16")
    model = build_gpt2(config, VOCABULARY, 0, config.model.init_from)
    saved = load_file(final / "model.safetensors")
    for name, parameter in model.gpt2.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter[: len(saved[name])], saved[name].bfloat16().float()), name
    assert model.gpt2.transformer.wte.weight[VOCABULARY:].abs().max() == 0
    assert len(model.gpt2.transformer.wte.weight) == 384


def test_a_file_that_lacks_a_weight_is_refused(final: Path, tmp_path: Path) -> None:
    """transformers would draw it at random, with a warning."""
    from safetensors.torch import save_file

    shutil.copytree(final, tmp_path / "lacking")
    tensors = load_file(final / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_pretrained(str(tmp_path / "lacking"))


def test_another_tokenizer_than_the_models_is_refused(final: Path, tmp_path: Path) -> None:
    config = settings(final)
    train_tokenizer(["other text " * 50], 300).save_pretrained(tmp_path / "other")
    other = replace(config, data=replace(config.data, tokenizer=str(tmp_path / "other")))
    with pytest.raises(RecipeError, match=r"another vocabulary than that of .* set --data\.tokenizer null") as refused:
        load_tokenizer(other, None, str(final))  # type: ignore[arg-type]  # no source: nothing is trained
    assert "\n" not in str(refused.value)
    same = replace(config, data=replace(config.data, tokenizer=str(shutil.copytree(final, tmp_path / "same"))))
    for accepted in (config, same):
        tokenizer = load_tokenizer(accepted, None, str(final))  # type: ignore[arg-type]
        assert len(tokenizer) == VOCABULARY


def test_a_run_under_way_does_not_start_from_another_model(finished: Path) -> None:
    config = load_config(["--config", str(finished / "config.yaml"), "--model.init_from", str(finished / "final")])
    with pytest.raises(RecipeError, match=r"model\.init_from was None and is "):
        find_resume_point(config)


def test_pipeline_and_generate_take_the_finished_model(final: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    (answer,) = pipeline("text-generation", model=str(final))("import os", max_new_tokens=8, do_sample=False)
    assert answer["generated_text"].startswith("import os")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    output = model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0], skip_special_tokens=True) == answer["generated_text"]


def test_final_holds_a_model_and_nothing_of_its_training(final: Path) -> None:
    names = {path.name for path in final.rglob("*")}
    assert names == {
        *("model.safetensors", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    wanted = {name for name, _ in load_pretrained(str(final))[0].named_parameters()}
    assert set(load_file(final / "model.safetensors")) == wanted


def test_llama_cpps_names_for_every_tensor_and_a_gguf_file_that_reads_back(final: Path, tmp_path: Path) -> None:
    """What convert_hf_to_gguf.py does for GPT2LMHeadModel, with the package it does it with.

    Its own look at the pre-tokenizer is not here: it knows GPT-2's vocabulary, and not one that was trained on other text.
    """
    import gguf

    config = json.loads((final / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GPT2LMHeadModel"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    tensors = {}
    for name, tensor in load_file(final / "model.safetensors").items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        is_transposed = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        tensors[mapped] = (tensor.T if is_transposed else tensor).numpy()
    assert {"token_embd.weight", "position_embd.weight", "output_norm.weight", "blk.1.attn_qkv.bias"} <= set(tensors)

    vocabulary = load_pretrained(str(final))[1].get_vocab()
    special = gguf.SpecialVocab(final, load_merges=True)
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert len(special.merges) == config["vocab_size"] - 256 - 1  # all but the bytes and the end-of-text token
    assert all("".join(merge.split(" ")) in vocabulary for merge in special.merges)
    assert special.special_token_ids["eos"] == vocabulary["<|endoftext|>"]

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_ctx"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    special.add_to_gguf(writer, quiet=True)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(tensors)
    for written in reader.tensors:
        assert np.array_equal(written.data, tensors[written.name]), written.name
    assert reader.fields["gpt2.context_length"].contents() == 64
    assert reader.fields["tokenizer.ggml.merges"].contents() == special.merges
