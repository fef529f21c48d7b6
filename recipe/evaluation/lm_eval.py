"""Tasks of lm-eval, EleutherAI's evaluation harness, through its own Python interface."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

from recipe.errors import RecipeError


def require_lm_eval() -> None:
    """Raise a RecipeError that says how to install it, where it is not."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("--tasks needs lm-eval, which is not installed: pip install --editable '.[evaluation]'")


def evaluate_tasks(
    gpt2: Any, tokenizer: Any, tasks: Sequence[str], directory: str | None, rows: int
) -> dict[str, dict[str, Any]]:
    """The metrics of each task, under lm-eval's names ("acc,none").

    Args:
        gpt2: a GPT2LMHeadModel, on its device.
        tokenizer: of the model.
        tasks: names or patterns, of lm-eval or of `directory`.
        directory: of YAML files with tasks of one's own; None: only lm-eval's.
        rows: sequences in one forward.

    Raises:
        RecipeError: an unknown task, or data that cannot be read.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that a loaded model was given
    harness_model = HFLM(pretrained=gpt2, tokenizer=tokenizer, backend="causal", batch_size=rows)
    try:
        manager = TaskManager(include_path=directory)
        results = lm_eval.simple_evaluate(
            harness_model, tasks=list(tasks), task_manager=manager, batch_size=rows, log_samples=False
        )
    except Exception as error:  # of its own, of datasets, of a task's code
        raise RecipeError(
            f"--tasks {' '.join(tasks)}: {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from error
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results["results"].items()
    }
