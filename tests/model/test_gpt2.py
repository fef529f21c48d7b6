"""Parameter counts, initialisation, padding of the vocabulary, precision of the parameters."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from recipe.config.checks import ACTIVATION_FUNCTIONS
from recipe.config.command_line import load_config
from recipe.config.settings import Config, ModelConfig, OptimizerConfig
from recipe.errors import RecipeError
from recipe.model.gpt2 import build_gpt2, gpt2_config
from recipe.model.optimizer import build_optimizer, seed_dropout
from recipe.plan.run_plan import flops_per_token, make_plan, parameter_count
from tests.helpers import ROOT

PARAMETERS = {
    "quickstart": 1_088_256,
    "gpt2-124m": 125_262_336,
    "gpt2-355m": 355_919_872,
    "gpt2-774m": 775_400_960,
    "gpt2-1.3b": 1_315_819_520,
    "gpt2-1.5b": 1_559_324_800,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_of_each_preset_on_the_meta_device(name: str) -> None:
    from transformers import GPT2LMHeadModel

    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config(["--config", str(path)])
    with torch.device("meta"):
        model = GPT2LMHeadModel(gpt2_config(config, 0))
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameter_count(config.model, config.n_positions) == PARAMETERS[name]
    first_number = re.search(r"[\d,]{5,}", path.read_text(encoding="utf-8"))
    assert first_number is not None
    assert first_number[0] == f"{counted:,}", "the comment of the preset"


def test_every_preset_is_covered_and_the_large_ones_share_the_contract() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == set(PARAMETERS)
    for name in PARAMETERS:
        if name == "quickstart":
            continue
        config = load_config(["--config", str(ROOT / f"configs/{name}.yaml")])
        tokens = 262_144 if name == "gpt2-124m" else 524_288
        assert (config.data.sequence_length, config.batch.tokens_per_update) == (2048, tokens)
        assert config.precision == "bf16"
        assert (config.model.dropout, config.model.vocab_size, config.data.tokenizer) == (0.0, 50_304, "gpt2")
        optimizer = config.optimizer
        assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.max_grad_norm) == (
            0.9,
            0.95,
            0.1,
            1.0,
        )
        plan = make_plan(config, 1)
        sample = "sample-100BT" if plan.total_tokens > 10**10 else "sample-10BT"
        assert config.data.dataset == f"HuggingFaceFW/fineweb-edu:{sample}", "no document twice"
        assert 20 <= plan.total_tokens / plan.parameters < 20.01


def test_the_1_3b_preset_shows_its_64_steps() -> None:
    path = ROOT / "configs/gpt2-1.3b.yaml"
    assert "524,288 / (4 x 2,048) = 64" in path.read_text(encoding="utf-8")
    plan = make_plan(load_config(["--config", str(path)]), 1)
    assert plan.update.gradient_accumulation_steps == 64
    assert plan.flops_per_token / 1e9 == pytest.approx(9.1, abs=0.05)


def small(**model: object) -> Config:
    defaults = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 320, "n_positions": 32}
    return Config(model=ModelConfig(**{**defaults, **model}))  # type: ignore[arg-type]


def test_residual_projections_start_smaller_by_the_root_of_twice_the_layers() -> None:
    """Radford et al., 2019, section 2.3; transformers 5.0 to 5.14 did not scale them (huggingface/transformers#47458)."""
    gpt2 = build_gpt2(small(n_layer=8), 320, 0).gpt2
    for name, weight in gpt2.named_parameters():
        if name.endswith("c_proj.weight"):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        elif weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        elif name.endswith("bias"):
            assert weight.abs().max() == 0
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_initial_loss_is_near_the_logarithm_of_the_vocabulary() -> None:
    """Of the tokens, not of the padded rows: those have probability 0."""
    model = build_gpt2(small(vocab_size=1024), 300, 0)
    tokens = torch.randint(300, (8, 33))
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item() / tokens[:, 1:].numel()
    assert loss == pytest.approx(math.log(300), abs=0.1)
    assert abs(loss - math.log(1024)) > 1


def test_padded_rows_get_no_probability_and_no_gradient() -> None:
    model = build_gpt2(small(), 300, 0)
    model.gpt2.transformer.wte.weight.data[300:] = 7.0  # would win every argmax
    tokens = torch.randint(300, (2, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = model(inputs, targets)
    loss.backward()
    logits = model.gpt2(inputs, use_cache=False).logits[..., :300].double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = model.gpt2.transformer.wte.weight.grad
    assert gradient[300:].abs().max() == 0
    assert gradient[:300].abs().max() > 0


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"50,257 tokens .* --model\.vocab_size 50304"):
        build_gpt2(small(), 50_257, 0)


def test_the_names_of_activation_functions_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    assert sorted(ACTIVATION_FUNCTIONS) == sorted(ACT2FN)


def test_only_matrices_and_embeddings_decay() -> None:
    model = build_gpt2(small(), 320, 0)
    decayed, kept = build_optimizer(model, OptimizerConfig()).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in kept["params"]} == {"bias", "weight"}
    assert all("ln_" in names[id(p)] for p in kept["params"] if names[id(p)].endswith("weight"))
    assert len(decayed["params"]) == 2 + 4 * 4


def test_flops_formula() -> None:
    model = ModelConfig(n_layer=24, n_embd=2048, n_head=16)
    assert flops_per_token(model, 2048) == 6 * (1_315_819_520 - 2048 * 2048) + 12 * 24 * 2048 * 2048


def test_flops_are_those_of_nanogpt() -> None:
    """Its estimate_mfu for its own GPT-2, of which get_num_params() counts 123.69M, all but wpe: 6 N + 12 L H Q T."""
    model = ModelConfig(n_layer=12, n_embd=768, n_head=12, vocab_size=50_304, n_positions=1024)
    expected = 6 * 123_689_472 + 12 * 12 * 12 * 64 * 1024
    assert flops_per_token(model, 1024) == expected
    assert flops_per_token(replace(model, n_positions=4096), 1024) == expected, "more positions are no work"


def test_dropout_is_a_function_of_seed_update_and_rank() -> None:
    def draw(*key: int) -> torch.Tensor:
        seed_dropout(*key)
        return torch.rand(4)

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    assert len({tuple(draw(*key).tolist()) for key in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3))}) == 4
