"""The finished model as a plain Hugging Face directory, and back."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from recipe.config.init_from import check_model_name
from recipe.data.tokenizer import find_tokenizer
from recipe.errors import RecipeError
from recipe.model.sharding import fill
from recipe.run.files import new_directory, sync, where_supported

PADDED = ("transformer.wte.weight", "lm_head.weight")  # tied: rows beyond the tokenizer's are padding


def export_model(gpt2: Any, tokenizer: Any, directory: Path) -> None:
    """Write a finished model; the directory appears whole or not at all. One that is a link or a mount stays one.

    Raises:
        RecipeError: the directory cannot be written.
    """
    try:
        with new_directory(directory, may_be_place=True) as temporary:
            write_model(gpt2.state_dict(), gpt2.config, tokenizer, temporary)
            for path in (*temporary.iterdir(), temporary):
                sync(path)
        sync(directory.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"cannot write the model to {directory}: {reason}; once it can be, the same command goes on and writes it"
        ) from error


def write_model(state: dict[str, Tensor], gpt2_config: Any, tokenizer: Any, directory: Path) -> None:
    """Write safetensors, config.json, generation_config.json and tokenizer files into `directory`.

    Padding rows of the embedding are left out. They had probability 0 in training, so the written model is the same
    function, and nothing that loads it can ever sample them.
    """
    import transformers
    from transformers import GenerationConfig, GPT2LMHeadModel

    transformers.utils.logging.disable_progress_bar()
    config = type(gpt2_config).from_dict(gpt2_config.to_dict())
    config.vocab_size = len(tokenizer)
    config.n_ctx = config.n_positions  # its older name, which llama.cpp's converter to GGUF asks for
    config.use_cache = True
    with torch.device("meta"):
        exported = GPT2LMHeadModel(config)
    rows = {name: tensor[: len(tokenizer)] if name in PADDED else tensor for name, tensor in state.items()}
    exported.load_state_dict({name: tensor.detach().cpu().contiguous() for name, tensor in rows.items()}, assign=True)
    exported.tie_weights()
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    exported.generation_config = GenerationConfig(**ends, do_sample=True, temperature=0.8, top_k=50)
    exported.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):  # which safetensors makes private; config.json is not
        with where_supported():
            path.chmod((directory / "config.json").stat().st_mode & 0o777)
    tokenizer.save_pretrained(directory)


def load_weights(gpt2: Any, tensors: dict[str, Tensor], name: str) -> None:
    """Load tensors, by their names in a model directory, into a GPT2LMHeadModel of their precision, in place and bit for bit.

    Rows of the embedding that the tensors do not have are padding, and set to 0.

    Raises:
        RecipeError: other tensors than this model has.
    """
    with torch.no_grad():
        for parameter_name, parameter in gpt2.named_parameters():
            source = tensors.get(parameter_name)
            rows = len(source) if source is not None and parameter_name in PADDED else len(parameter)
            if source is None or (source.shape, source.dtype) != (parameter[:rows].shape, parameter.dtype):
                found = "missing" if source is None else f"{source.dtype} {tuple(source.shape)}"
                raise RecipeError(
                    f"{name} does not fit this model: {parameter_name} is {found}, not {parameter.dtype} "
                    f"{tuple(parameter.shape)}"
                )
            fill(parameter, torch.cat([source, source.new_zeros(len(parameter) - rows, *source.shape[1:])]))


def load_pretrained(name: str) -> tuple[Any, Any]:
    """(GPT2LMHeadModel in float32, tokenizer) of a local directory or a Hub repository.

    Raises:
        RecipeError: there is none, it is not a GPT-2, or they do not belong together.
    """
    gpt2, tokenizer = load_model(name), find_tokenizer(f"the tokenizer of {name!r}", name)
    if tokenizer is None:
        raise RecipeError(f"{name!r} has no tokenizer: copy tokenizer.json and tokenizer_config.json into it")
    check_vocabulary(len(tokenizer), gpt2, name)
    return gpt2, tokenizer


def load_model(name: str) -> Any:
    """The GPT2LMHeadModel in float32 of a local directory or a Hub repository, which decides nothing about how it generates.

    Raises:
        RecipeError: there is none, or it is not a GPT-2.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what is wrong is in our one line
    check_model_name(name)
    options = {"generation_config": transformers.GenerationConfig(), "trust_remote_code": False}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:
        raise RecipeError(f"cannot load the model {name!r}: {' '.join(str(error).split())[:300]}") from error
    if model.config.model_type != "gpt2":
        raise RecipeError(f"{name!r} is a {model.config.model_type} model; this command reads GPT-2 models")
    if info["missing_keys"]:  # drawn at random, with a warning
        raise RecipeError(f"the model {name!r} is incomplete: it lacks {', '.join(sorted(info['missing_keys']))}")
    if any(key.endswith("mlp.c_fc.weight") for key in info["unexpected_keys"]):  # left out, with a warning
        raise RecipeError(f"the model {name!r} has more layers in its weights than n_layer = {model.config.n_layer}")
    return model


def check_vocabulary(tokens: int, gpt2: Any, name: str) -> None:
    """Check that a tokenizer with so many tokens can be that of a model, whose embedding may be padded.

    Raises:
        RecipeError: it has more tokens than there are embeddings, or less than half as many.
    """
    rows = gpt2.config.vocab_size
    if not tokens <= rows <= 2 * tokens:
        raise RecipeError(
            f"the tokenizer has {tokens:,} tokens but {name} has embeddings of {rows:,}: it needs the one that it was trained "
            "with, in its directory or as --data.tokenizer of a training"
        )
