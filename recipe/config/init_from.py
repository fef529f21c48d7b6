"""The shape of the GPT-2 that a run starts from, `model.init_from`. Imports no torch."""

import json
import os
from pathlib import Path
from typing import Any

from recipe.errors import RecipeError

# The fields of GPT2Config that a run takes over, and those it cannot change, each with the value that GPT2Config gives it if
# config.json does not have it.
SHAPE: dict[str, Any] = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257}
SHAPE |= {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
_FIXED = {"tie_word_embeddings": True, "scale_attn_weights": True}
_FIXED |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def shape_of(name: str) -> dict[str, Any]:
    """The settings of the section `model` that the config.json of a local directory or a Hub repository decides.

    vocab_size is rounded up to a multiple of 64, and gelu_new is gelu_pytorch_tanh, the same function in one kernel.

    Raises:
        RecipeError: there is no config.json, or it is not that of a GPT-2 that this recipe trains.
    """
    try:
        check_model_name(name)
        path = Path(name, "config.json")
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, path.name))
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("its config.json is no JSON object")
    except Exception as error:  # the client of the Hub has many
        raise RecipeError(f"model.init_from = {name!r}: {' '.join(str(error).split())[:300]}") from None
    if found.get("model_type") != "gpt2":
        raise RecipeError(
            f"model.init_from = {name!r} is a {found.get('model_type')} model: this recipe trains GPT-2 models"
        )
    shape = {field: found.get(field, default) for field, default in SHAPE.items()}
    wrong = [field for field, value in shape.items() if type(value) is not type(SHAPE[field])]
    fixed = {"n_inner": 4 * shape["n_embd"], **_FIXED}  # null: that value
    wrong += [field for field, value in fixed.items() if found.get(field) not in (None, value)]
    if wrong:
        fields = ", ".join(f"{field} = {json.dumps(found[field])}" for field in wrong)
        raise RecipeError(f"model.init_from = {name!r} has {fields}: this recipe cannot train such a GPT-2")
    if shape["activation_function"] == "gelu_new":
        shape["activation_function"] = "gelu_pytorch_tanh"
    return shape | {"vocab_size": -(-shape["vocab_size"] // 64) * 64}


def check_model_name(name: str) -> None:
    """Answer a mistyped directory before the Hub is asked for it.

    Raises:
        RecipeError: it can be no Hub name, and is no model directory.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not os.path.isfile(Path(name, "config.json")):  # is_file() raises for a name that is too long
        raise RecipeError(
            f"{name!r} is not a model directory: no config.json in it; give RUN/final or a Hub name user/model"
        )
