"""Interim."""

from __future__ import annotations

from typing import Any

from recipe.model import kernels
from recipe.model.gpt2 import CausalLanguageModel
from recipe.model.gpt2 import build_model as build_gpt2
from recipe.model.onednn import choose_matmul, use_onednn
from recipe.plan.memory import choose_loss
from recipe.run.run import Run


def set_kernels(run: Run) -> None:
    kernels.set_kernels(run.config, run.device, run.precision)


def build_model(run: Run, tokenizer: Any, init_from: str | None = None) -> CausalLanguageModel:
    """The model of a run, computed by the kernels that the settings and the device call for.

    Args:
        run: its settings and device; `run.kernels` is set.
        tokenizer: its size is the vocabulary.
        init_from: directory or Hub name of the initial weights; None: random ones, by the seed.

    Raises:
        RecipeError: a tokenizer larger than the embedding, or an `init_from` that cannot be loaded.
    """
    performance, device_type = run.config.performance, run.device.type
    loss = choose_loss(performance.loss, device_type, run.precision)
    model = build_gpt2(run.config, len(tokenizer), tokenizer.eos_token_id, init_from, loss=loss)
    matmul = choose_matmul(performance, device_type, run.precision)
    is_compiled = kernels.is_compiled(performance.compile, device_type)
    if matmul == "onednn":
        use_onednn(model)
    if is_compiled:
        kernels.compile_model(model)
    run.kernels = {"matmul": matmul, "is_compiled": is_compiled}
    return model
