"""The model that a run goes on training, `model.init_from`: it has to be the GPT-2 that the settings describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.model.export import check_model_name
from recipe.model.gpt2 import gpt2_config

_SETTINGS = ("n_layer", "n_embd", "n_head", "n_positions", "layer_norm_epsilon", "activation_function")
_FIXED = (
    "n_inner",
    "tie_word_embeddings",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
)
_SAME_FUNCTION = {"gelu_new": "gelu_pytorch_tanh"}  # the second in one fused kernel


def initial_model(config: Config, checkpoint: Path | None) -> str | None:
    """Directory or Hub name of the first weights and of the tokenizer; None where the run starts from nothing.

    A run that is resumed has both in its checkpoint, and needs `model.init_from` no longer.

    Raises:
        RecipeError: it cannot be read, or its shape is not that of the settings.
    """
    name = config.model.init_from
    if name is None or checkpoint is not None:
        return name and str(checkpoint)
    from transformers import AutoConfig

    try:
        check_model_name(name)
        found = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise RecipeError(f"model.init_from = {name!r}: {' '.join(str(error).split())[:300]}") from error
    check_shape(config, found)
    return name


def check_shape(config: Config, found: Any) -> None:
    """Compare the transformers configuration of `model.init_from` with the settings.

    Raises:
        RecipeError: with every setting to change in one line.
    """
    name = config.model.init_from
    if found.model_type != "gpt2":
        raise RecipeError(f"model.init_from = {name!r} is a {found.model_type} model: this recipe trains GPT-2 models")
    found.n_inner = found.n_inner or 4 * found.n_embd
    stated = gpt2_config(config, end_of_text=0)
    fixed = [
        f"{field} = {getattr(found, field)}" for field in _FIXED if getattr(found, field) != getattr(stated, field)
    ]
    if fixed and found.n_embd == stated.n_embd:  # which n_inner follows
        raise RecipeError(f"model.init_from = {name!r} has {', '.join(fixed)}: this recipe cannot train such a GPT-2")
    changes = {
        f"model.{field}": getattr(found, field)
        for field in _SETTINGS
        if _function_of(getattr(found, field)) != _function_of(getattr(stated, field))
    }
    if found.vocab_size > stated.vocab_size:
        changes["model.vocab_size"] = -(-found.vocab_size // 64) * 64
    if config.data.sequence_length > found.n_positions:
        changes["data.sequence_length"] = found.n_positions
    if changes:
        flags = " ".join(f"--{setting} {value}" for setting, value in changes.items())
        raise RecipeError(f"model.init_from = {name!r} has another shape than the settings: set {flags}")


def _function_of(value: Any) -> Any:
    return _SAME_FUNCTION.get(value, value)
