"""GPT-2, its loss and kernels, its optimizer, its files."""

from recipe.model.gpt2 import build_model
from recipe.model.kernels import choose_kernels
from recipe.model.optimizer import build_optimizer, set_learning_rate
from recipe.model.sharding import prepare_model, whole_model

__all__ = ["build_model", "build_optimizer", "choose_kernels", "prepare_model", "set_learning_rate", "whole_model"]
