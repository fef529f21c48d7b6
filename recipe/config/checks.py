"""The checks of a configuration that a type cannot make. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

from recipe.config.settings import MOST_RETRY_SECONDS, Config, flat_fields, value_of
from recipe.config.text_files import expand_text_files
from recipe.errors import RecipeError


def validate(config: Config) -> None:
    """Check what a type cannot say. The budget's divisions are checked in `recipe.plan.budget`, where they are made.

    Raises:
        RecipeError: naming the setting, its value, and a valid one.
    """
    for name, setting in flat_fields(type(config)):
        if value_of(config, name) is None and "None" not in str(setting.type):
            raise RecipeError(f"{name} = null: it needs a value ({setting.type})")
    check_bounds(config, _BOUNDS)
    model, data = config.model, config.data
    if model.n_embd % model.n_head:
        raise RecipeError(
            f"model.n_head = {model.n_head} does not divide model.n_embd = {model.n_embd}: choose n_head among "
            f"{[h for h in range(1, model.n_embd + 1) if model.n_embd % h == 0]}"
        )
    if data.sequence_length > config.n_positions:
        raise RecipeError(
            f"data.sequence_length = {data.sequence_length} is longer than model.n_positions = {model.n_positions}: "
            f"set --model.n_positions {data.sequence_length} or more, or --data.sequence_length {model.n_positions} or less"
        )
    if config.schedule.final_learning_rate_fraction > 1:
        raise RecipeError(
            f"schedule.final_learning_rate_fraction = {config.schedule.final_learning_rate_fraction}: must be at most 1"
        )
    if config.run.seed >= 2**32:
        raise RecipeError(f"run.seed = {config.run.seed}: must be below 2**32 = {2**32}")
    if not config.run.directory.strip():
        raise RecipeError("run.directory is empty: give the directory that the run is written to")
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
    if config.hub.repo_id is not None:
        check_repo_id("hub.repo_id", config.hub.repo_id)
    for name in ("data.retry_seconds", "hub.wait_seconds"):
        if value_of(config, name) > MOST_RETRY_SECONDS:
            raise RecipeError(
                f"{name} = {value_of(config, name):g}: must be at most {MOST_RETRY_SECONDS}, since the other ranks wait "
                "for the one that tries, for half an hour"
            )
    if data.text_files:
        expand_text_files(data.text_files)
    for name, pattern in config.evaluation.sets.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise RecipeError(f"evaluation.sets: {name!r} is no name: use letters, digits, _ and -")
        expand_text_files([pattern], f"evaluation.sets.{name}")


def check_repo_id(name: str, repo_id: str | None) -> None:
    """Check the form of a repository's name on the Hub.

    Raises:
        RecipeError: naming the setting and the form.
    """
    if repo_id is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise RecipeError(f"{name} = {repo_id!r}: give the name of a model repository, user/name")


# (smallest valid value, is it exclusive) of every number, by dotted name.
_BOUNDS: dict[str, tuple[float, bool]] = {
    "run.max_updates": (1, False),
    "run.seed": (0, False),
    "batch.tokens_per_update": (1, False),
    "batch.micro_batch_size": (1, False),
    "batch.lanes": (1, False),
    "data.sequence_length": (2, False),
    "data.shuffle_window": (1, False),
    "data.validation_one_in": (1, False),
    "data.retry_seconds": (0, False),
    "model.n_layer": (1, False),
    "model.n_embd": (1, False),
    "model.n_head": (1, False),
    "model.n_positions": (1, False),
    "model.vocab_size": (2, False),
    "model.dropout": (0, False),
    "performance.activation_checkpointing": (1, False),
    "model.initializer_range": (0, True),
    "model.layer_norm_epsilon": (0, True),
    "optimizer.learning_rate": (0, True),
    "optimizer.beta1": (0, False),
    "optimizer.beta2": (0, False),
    "optimizer.epsilon": (0, True),
    "optimizer.weight_decay": (0, False),
    "optimizer.max_grad_norm": (0, True),
    "schedule.total_tokens": (1, False),
    "schedule.tokens_per_parameter": (0, True),
    "schedule.warmup_tokens": (0, False),
    "schedule.final_learning_rate_fraction": (0, False),
    "stability.max_skipped_updates": (1, False),
    "stability.spike_window": (4, False),
    "stability.spike_score": (0, True),
    "stability.rollback_updates": (1, False),
    "stability.max_rollbacks": (1, False),
    "checkpoint.every_tokens": (1, False),
    "checkpoint.every_minutes": (0, True),
    "checkpoint.keep": (1, False),
    "checkpoint.keep_every_tokens": (1, False),
    "hub.every_tokens": (1, False),
    "hub.wait_seconds": (0, False),
    "evaluation.every_tokens": (1, False),
    "evaluation.tokens": (1, False),
    "evaluation.sample_tokens": (1, False),
}
_BELOW_ONE = ("model.dropout", "optimizer.beta1", "optimizer.beta2")


def check_bounds(config: Any, bounds: dict[str, tuple[float, bool]]) -> None:
    """Check numbers against (smallest valid value, is it exclusive), by dotted name.

    Raises:
        RecipeError: naming the setting, its value and its bound.
    """
    for name, (smallest, exclusive) in bounds.items():
        value = value_of(config, name)
        if value is None or value == "auto":
            continue
        if not (value > smallest if exclusive else value >= smallest):
            raise RecipeError(f"{name} = {value}: must be {'greater than' if exclusive else 'at least'} {smallest:g}")
        if name in _BELOW_ONE and value >= 1:
            raise RecipeError(f"{name} = {value}: must be below 1")
