"""`model.init_from`: the shape comes from the model's config.json, before torch is imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipe.commands.plan import planned
from recipe.config.command_line import load_config, write_config
from recipe.errors import RecipeError
from tests.helpers import ROOT, TINY, run
from tests.support.hub_server import HubServer, Repository

# config.json of openai-community/gpt2, where it says something about the function.
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
OTHER = {"n_layer": 3, "n_embd": 96, "n_head": 3, "n_positions": 128, "vocab_size": 400, "layer_norm_epsilon": 1e-6}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write GPT-2's config.json with changes, into tmp_path/model; returns the name to give to `--model.init_from`."""

    def to_disk(**changes: Any) -> str:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/config.json").write_text(json.dumps(GPT2 | changes), encoding="utf-8")
        return str(tmp_path / "model")

    return to_disk


def refusal(*arguments: str) -> str:
    with pytest.raises(RecipeError) as refused:
        load_config([*TINY, *arguments])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_shape_is_that_of_the_model_whatever_the_settings_say(write: Write) -> None:
    name = write(**OTHER, activation_function="relu")
    model = load_config([*TINY, "--model.init_from", name, "--model.dropout", "0.1"]).model
    found = {field: getattr(model, field) for field in (*OTHER, "activation_function", "dropout", "init_from")}
    rounded = {"vocab_size": 448, "activation_function": "relu"}
    assert found == {**OTHER, **rounded, "dropout": 0.1, "init_from": name}


def test_the_shape_of_gpt2_itself(write: Write) -> None:
    """Its gelu_new is the same function as gelu_pytorch_tanh; what its file leaves out is as GPT2Config has it."""
    model = load_config([*TINY, "--model.init_from", write(n_inner=None)]).model
    assert (model.n_layer, model.n_embd, model.n_head, model.n_positions) == (12, 768, 12, 1024)
    assert (model.vocab_size, model.activation_function) == (50_304, "gelu_pytorch_tanh")
    lines = planned([*TINY, "--model.init_from", str(model.init_from)])
    assert "124,475,904" in lines, "(50,304 + 1,024) x 768 + 12 blocks + the last layer norm"


def test_what_a_file_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    from transformers import GPT2Config

    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    model, theirs = load_config([*TINY, "--model.init_from", str(tmp_path)]).model, GPT2Config()
    assert (theirs.n_inner, theirs.tie_word_embeddings, theirs.scale_attn_weights) == (None, True, True)
    assert not theirs.scale_attn_by_inverse_layer_idx
    assert not theirs.add_cross_attention
    assert theirs.activation_function == "gelu_new"
    for field in ("n_layer", "n_embd", "n_head", "n_positions", "layer_norm_epsilon"):
        assert getattr(model, field) == getattr(theirs, field)
    assert 0 <= model.vocab_size - theirs.vocab_size < 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, "is a gpt_neox model"),
        ({"n_inner": 100}, "has n_inner = 100"),
        ({"tie_word_embeddings": False}, "has tie_word_embeddings = false"),
        ({"scale_attn_weights": False}, "has scale_attn_weights = false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx = true"),
        ({"add_cross_attention": True}, "has add_cross_attention = true"),
        ({"n_layer": "twelve"}, 'has n_layer = "twelve"'),
        ({"n_head": 0}, "model.n_head = 0: must be at least 1"),
        ({"activation_function": "geglu"}, "model.activation_function = 'geglu' is unknown: choose among gelu,"),
        ({"n_positions": 32}, "longer than model.n_positions = 32 of"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(changes: dict[str, Any], words: str, write: Write) -> None:
    assert words in refusal("--model.init_from", write(**changes))


def test_a_longer_block_than_the_model_has_positions_for_is_refused_with_the_one_way_out(write: Write) -> None:
    message = refusal("--model.init_from", write(n_positions=32))
    assert message.endswith("set --data.sequence_length 32 or less")


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no config.json in it; give RUN/final"), ("no/where", "model.init_from = 'no/where': ")],
)
def test_a_model_that_is_not_there_is_refused(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert words in refusal("--model.init_from", name)


def test_a_damaged_file_is_refused(write: Write) -> None:
    name = write()
    Path(name, "config.json").write_text("[1, 2", encoding="utf-8")
    assert f"model.init_from = {name!r}: Expecting" in refusal("--model.init_from", name)


def test_a_model_of_the_hub_is_read_without_torch(tmp_path: Path) -> None:
    """By the plan too, which prints its parameters. Nothing else of the repository is downloaded."""
    code = "import sys; from recipe.commands.plan import main; main(); sys.exit('torch' in sys.modules)"
    with HubServer() as server:
        server.repositories["me/gpt2"] = Repository(private=False)
        files = {"config.json": json.dumps(GPT2).encode(), "model.safetensors": b"large"}
        server.repositories["me/gpt2"].commit("main", "first", files)
        command = [sys.executable, "-c", code, *TINY, "--model.init_from", "me/gpt2", "--json"]
        done = run(command, timeout=60, cwd=ROOT, **server.environment(HF_HOME=str(tmp_path)))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["plan"]["parameters"]["value"] == 124_475_904
        assert done.stderr == ""
        assert not any("safetensors" in request for request in server.requests)


def test_a_run_that_goes_on_needs_the_model_no_more(write: Write, tmp_path: Path) -> None:
    """Its own config.yaml has the shape. A new run, one from another model, and one that starts again need it."""
    name, directory = write(**OTHER), tmp_path / "run"
    arguments = ["--run.directory", str(directory), "--model.init_from", name]
    first = load_config([*TINY, *arguments])
    Path(name, "config.json").unlink()
    assert "no config.json in it" in refusal(*arguments), "nothing has begun"
    directory.mkdir()
    write_config(first, directory / "config.yaml")
    assert load_config([*TINY, *arguments]) == first
    assert "no config.json in it" in refusal(*arguments, "--resume", "fresh")
    write_config(replace(first, model=replace(first.model, init_from="me/another")), directory / "config.yaml")
    assert "no config.json in it" in refusal(*arguments)


def test_a_given_checkpoint_is_compared_with_the_stated_shape(write: Write, tmp_path: Path) -> None:
    """On another machine there may be neither the model nor the run's directory, but its config.yaml has travelled."""
    name = write(**OTHER)
    config = load_config([*TINY, "--model.init_from", name])
    write_config(config, tmp_path / "travelled.yaml")
    Path(name, "config.json").unlink()
    elsewhere = ["--config", str(tmp_path / "travelled.yaml"), "--run.directory", str(tmp_path / "new")]
    for checkpoint in (str(ROOT), "hf://me/model@step-4"):
        assert load_config([*elsewhere, "--resume", checkpoint]).model == config.model
