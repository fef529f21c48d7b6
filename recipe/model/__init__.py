"""GPT-2, its loss and kernels, its optimizer, its files."""

from recipe.model.build import build_model, set_kernels
from recipe.model.init_from import initial_model
from recipe.model.optimizer import build_optimizer, set_learning_rate

__all__ = ["build_model", "build_optimizer", "initial_model", "set_kernels", "set_learning_rate"]
