"""The checks of a configuration. Imports no torch."""

import itertools
import os
import re
from dataclasses import is_dataclass
from typing import Any, get_args

from recipe.config.settings import HELD_OUT, STANDARD_LIBRARY, Config, SourceConfig, flat_fields, value_of
from recipe.config.text_files import expand_files
from recipe.errors import RecipeError
from recipe.format import nearest_divisors

_LONGEST_NAME_BYTES, _LONGEST_PATH_BYTES = 255, 4095  # that systems have, and no address is longer either

# transformers' ACT2FN, whose module imports torch; tests/model/test_gpt2.py compares them.
ACTIVATION_FUNCTIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu"),
    *("relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu"),
)


def check_values(config: Any, prefix: str = "") -> None:
    """Check each value of a configuration class against its field: null only if the type has it, numbers within the bounds.

    `prefix` stands before the names in messages.

    Raises:
        RecipeError: naming the setting, its value and the bound.
    """
    for name, annotation in flat_fields(type(config)):
        value, bounds = value_of(config, name), getattr(annotation, "__metadata__", ())
        name = prefix + name
        plain = annotation.__origin__ if bounds else annotation
        if value is None and type(None) not in get_args(plain):
            raise RecipeError(f"{name} = null: it needs a value ({getattr(plain, '__name__', plain)})")
        for bound in bounds if isinstance(value, int | float) else ():
            if not bound.holds(value, bound.limit):
                why = f", {bound.why}" if bound.why else ""
                raise RecipeError(f"{name} = {value}: must be {bound.words} {bound.limit:,}{why}")
        if isinstance(value, tuple) and is_dataclass(next(iter(value), None)):
            for number, inner in enumerate(value):
                check_values(inner, f"{name}[{number}].")
        else:
            check_text(name, value)


def check_text(name: str, value: Any) -> None:
    """Check that texts can be written as UTF-8, and that a name, which is any text but a prompt, is one short line.

    Raises:
        RecipeError: naming the setting and the text.
    """
    if isinstance(value, dict | list | tuple):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            check_text(name, inner)
    elif isinstance(value, str):
        is_prompt = name.rpartition(".")[2].startswith("prompt")
        if wrong := re.search("[\0\ud800-\udfff]" if is_prompt else r"[\0-\x1f\x7f\ud800-\udfff]", value):
            raise RecipeError(f"{name} = {value!r}: it cannot have the character {wrong[0]!r}; give UTF-8 in one line")
        longest = max(len(part) for part in value.encode().split(b"/")) if "://" not in value else 0
        if not is_prompt and (longest > _LONGEST_NAME_BYTES or len(value.encode()) > _LONGEST_PATH_BYTES):
            limits = f"{_LONGEST_NAME_BYTES} bytes at most, a path {_LONGEST_PATH_BYTES:,}"
            raise RecipeError(f"{name} = {value!r}: it is too long; a name has {limits}")


def validate(config: Config) -> None:
    """Check how the values fit together. `recipe.plan.budget` checks the divisions of the budget, which it makes.

    Raises:
        RecipeError: naming the setting, its value, and a valid one.
    """
    model, data = config.model, config.data
    if model.n_embd % model.n_head:
        raise RecipeError(
            f"model.n_head = {model.n_head} does not divide model.n_embd = {model.n_embd}: choose n_head among "
            f"{nearest_divisors(model.n_embd, model.n_head)}"
        )
    if model.activation_function not in ACTIVATION_FUNCTIONS:
        raise RecipeError(
            f"model.activation_function = {model.activation_function!r} is unknown: choose among "
            f"{', '.join(ACTIVATION_FUNCTIONS)}"
        )
    if data.sequence_length > config.n_positions:
        ways = [f"--data.sequence_length {model.n_positions} or less"]
        if model.init_from is None:
            ways.insert(0, f"--model.n_positions {data.sequence_length} or more")
        raise RecipeError(
            f"data.sequence_length = {data.sequence_length} is longer than model.n_positions = {model.n_positions}"
            f"{'' if model.init_from is None else f' of {model.init_from}'}: set {', or '.join(ways)}"
        )
    if config.run.skip_tokens and not config.run.branch:
        raise RecipeError(f"run.skip_tokens = {config.run.skip_tokens:,} is of a branch alone: set --run.branch true")
    if config.run.branch and config.resume == "fresh":
        raise RecipeError("run.branch goes on from a checkpoint: give its path, --resume PATH, not fresh")
    if not config.run.directory.strip():
        raise RecipeError("run.directory is empty: give the directory that the run is written to")
    for number, source in enumerate(data.mixture):
        check_source(source, f"data.sources[{number}]" if data.sources else "data")
    _check_names(config)
    starts = [change.from_tokens for change in config.batch.schedule]
    for number, (before, start) in enumerate(itertools.pairwise(starts), start=1):
        if start <= before:
            raise RecipeError(
                f"batch.schedule[{number}].from_tokens = {start:,} is not behind the {before:,} of the entry before it: give "
                "them in ascending order"
            )
    if data.tokenizer is None and model.vocab_size < 257:
        raise RecipeError(
            f"model.vocab_size = {model.vocab_size} is too small to train a byte-level tokenizer, "
            "which needs 256 bytes and the end-of-text token: set --model.vocab_size 257 or more"
        )
    if config.optimizer.state == "bf16" and (config.optimizer.name != "adamw" or config.precision != "bf16"):
        raise RecipeError(
            f"optimizer.state = bf16 is AdamW in bf16: it needs --optimizer.name adamw and --precision bf16, not "
            f"{config.optimizer.name} and {config.precision}"
        )
    if config.performance.sharding != "none" and (config.optimizer.name == "muon" or config.optimizer.state == "bf16"):
        what = (
            "optimizer.name = muon orthogonalises"
            if config.optimizer.name == "muon"
            else "optimizer.state = bf16 rounds"
        )
        raise RecipeError(
            f"{what} whole matrices, which no rank has with performance.sharding = {config.performance.sharding}: set it to "
            "none, or take --optimizer.name adamw --optimizer.state fp32"
        )
    if config.hub.repo_id is not None:
        check_repo_id("hub.repo_id", config.hub.repo_id)
    if (
        config.resume not in ("auto", "fresh")
        and not config.resume.startswith("hf://")
        and not os.path.isdir(config.resume)  # which never raises
    ):
        raise RecipeError(f"resume = {config.resume!r} is no directory: give auto, fresh, or the path of a checkpoint")
    for name, pattern in config.evaluation.sets.items():
        if not re.fullmatch(r"[\w-]+", name) or name == HELD_OUT:
            raise RecipeError(
                f"evaluation.sets: {name!r} cannot be the name of a set: use letters, digits, _ and -, and not {HELD_OUT}, "
                "the name of the held-out documents"
            )
        expand_files(data.validation_set(pattern), "", f"evaluation.sets.{name}")


def check_source(source: SourceConfig, section: str) -> None:
    """Check what says where text or tokens come from; `section` is the part of the settings that does.

    Raises:
        RecipeError: naming the setting, its value and what would be valid.
    """
    if source.text_files and source.token_files:
        raise RecipeError(f"{section}: give text_files or token_files, not both; data.sources mixes several sources")
    if source.files:
        expand_files(source, section)
    elif not re.fullmatch(r"[^:\s]+(:[^:\s]+)?", source.dataset or ""):
        raise RecipeError(
            f"{section}.dataset = {source.dataset!r}: give user/name, user/name:configuration or {STANDARD_LIBRARY}, or set "
            "text_files or token_files"
        )
    elif source.repository == STANDARD_LIBRARY and source.configuration:
        raise RecipeError(f"{section}.dataset = {source.dataset!r}: {STANDARD_LIBRARY} has no configurations")
    if source.encoding is not None:
        try:
            "".encode(source.encoding)
        except LookupError:
            raise RecipeError(
                f"{section}.encoding = {source.encoding!r} is no encoding of text that Python knows, such as latin-1 or "
                "utf-16-le"
            ) from None


def _check_names(config: Config) -> None:
    """Sources of a mixture have names of their own, since each is a column of the ledger and a validation set."""
    data, taken = config.data, {HELD_OUT, *config.evaluation.sets}
    if data.sources and data.files:
        raise RecipeError("data.sources takes the place of data.text_files and data.token_files: give one of them")
    for number, source in enumerate(data.sources):
        if source.label in taken or not re.fullmatch(r"[\w-]+", source.label):
            raise RecipeError(
                f"data.sources[{number}].name = {source.label!r}: give a name of letters, digits, _ and -, and no other's: "
                f"{', '.join(sorted(taken))} are taken"
            )
        taken.add(source.label)


def check_repo_id(name: str, repo_id: str | None) -> None:
    """Check the form of a repository's name on the Hub.

    Raises:
        RecipeError: naming the setting and the form.
    """
    if repo_id is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise RecipeError(f"{name} = {repo_id!r}: give the name of a model repository, user/name")
