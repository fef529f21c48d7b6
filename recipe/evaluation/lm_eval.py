"""Tasks of lm-eval, EleutherAI's evaluation harness, on their own data or on local files."""

import glob
import importlib.util
import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.errors import RecipeError

# A task of lm-eval -> the fields that it reads. It scores a local file whose lines all have them.
_FIELDS = {
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "blimp_adjunct_island": ("sentence_good", "sentence_bad"),  # the 67 tasks of BLiMP differ in their data alone
    "lambada_openai": ("text",),
}


def find_tasks(names: Sequence[str]) -> dict[str, str]:
    """The task of lm-eval for each name: the name itself, or for a .jsonl file the task whose fields it has.

    Raises:
        RecipeError: a file cannot be read or is in no known format, or lm-eval is not installed.
    """
    tasks = {name: _task_of_file(name) if name.endswith(".jsonl") else name for name in names}
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("--tasks needs lm-eval, which is not installed: pip install --editable '.[evaluation]'")
    return tasks


def _task_of_file(path: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--tasks: cannot read {path!r}: {getattr(error, 'strerror', None) or error}") from None
    tasks = list(_FIELDS)
    for number, line in enumerate(lines, start=1):
        if line.strip() or number == 1:
            tasks = [task for task in tasks if _has_fields(line, _FIELDS[task])]
        if not tasks:
            raise RecipeError(
                f"--tasks: line {number} of {path!r} does not fit: give one JSON object a line, with the fields of HellaSwag "
                "(activity_label, ctx_a, ctx_b, endings, label), of BLiMP (sentence_good, sentence_bad) or of LAMBADA (text)"
            )
    return tasks[0]


def _has_fields(line: str, fields: Sequence[str]) -> bool:
    try:
        return None not in map(json.loads(line).get, fields)
    except (ValueError, AttributeError):  # not JSON, or not an object
        return False


def evaluate_tasks(
    gpt2: Any, tokenizer: Any, tasks: Mapping[str, str], directory: str | None, batch_size: int
) -> dict[str, dict[str, float]]:
    """The metrics of each task, under lm-eval's names ("acc,none").

    `tasks` are those of `find_tasks`; `directory` holds YAML files of other tasks; `batch_size` sequences are in one forward.

    Raises:
        RecipeError: an unknown task, or data that cannot be read.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)  # it warns that a loaded model was given
    try:
        manager = TaskManager(include_path=directory)
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=gpt2, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
            tasks=[task if task == name else _with_data(manager, task, name) for name, task in tasks.items()],
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,  # for the standard error of LAMBADA's perplexity: its default of 100,000 takes minutes
        )
    except Exception as error:  # of its own, of datasets, of a task's code
        failed = traceback.extract_tb(error.__traceback__)[-1].line  # some assertions have no message
        raise RecipeError(f"--tasks {' '.join(tasks)}: {(str(error) or str(failed))[:300]}") from error
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in results["results"].items()
    }


def _with_data(manager: Any, task: str, path: str) -> Any:
    """lm-eval's `task`, named `path`, with that file in place of its data."""
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": glob.escape(path)}}}
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    # lm-eval takes a task with other settings only as the member of a group.
    (local,) = manager.load({"group": path, "task": [{"task": task, **data, **splits}]})["tasks"].values()
    local.set_config("task", path)
    return local
