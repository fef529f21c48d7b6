"""Evaluate a finished model: `python -m recipe evaluate MODEL ...`."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from recipe.config.command_line import make_parser, parse
from recipe.config.settings import AtLeast, BatchConfig, Config, DataConfig
from recipe.errors import RecipeError, run_command

if TYPE_CHECKING:
    from recipe.data.blocks import ValidationSet


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a finished model on text, on cloze files, on tasks of lm-eval."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text: all of data.text_files, or the held-out part of data.dataset. The tokenizer and length are the model's. Left
    out where --cloze or --tasks is given and nothing of data is."""
    tokens: Annotated[int | None, AtLeast(1)] = None
    """Stop after this many tokens of the text, rounded to whole documents. Null: all of it."""
    cloze: tuple[str, ...] = ()
    """.jsonl files in the format of HellaSwag, LAMBADA or BLiMP."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, which has to be installed; most of them download their data."""
    task_directory: str | None = None
    """Directory of YAML files with tasks of your own for lm-eval."""
    micro_batch_size: Annotated[int, AtLeast(1)] = 8
    """Blocks or continuations in one forward."""
    output: str | None = None
    """JSON file that all results are written to."""


def main() -> None:
    """The command."""
    parser = make_parser(
        EvaluateConfig, "python -m recipe evaluate", "Evaluate a model on text, on cloze files, on tasks of lm-eval."
    )
    parser.add_argument("model", help="Directory of a finished model, or its name on the Hub.")
    config, rest = parse(parser, EvaluateConfig, sys.argv[1:])
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise RecipeError(f"output = {config.output!r}: its directory does not exist")

    from accelerate import Accelerator

    from recipe.evaluation.cloze import cloze, read_items
    from recipe.evaluation.evaluate import evaluate
    from recipe.evaluation.lm_eval import evaluate_tasks, require_lm_eval
    from recipe.model.export import load_pretrained
    from recipe.model.gpt2 import CausalLanguageModel
    from recipe.run.launch import device_type

    if config.tasks:
        require_lm_eval()
    files = {path: read_items(path) for path in config.cloze}
    gpt2, tokenizer = load_pretrained(rest["model"])
    accelerator = Accelerator(cpu=device_type() == "cpu")
    model = accelerator.prepare(CausalLanguageModel(gpt2, len(tokenizer))).eval()
    rows = config.micro_batch_size
    results: dict[str, Any] = {"model": rest["model"]}
    if config.data != DataConfig() or not (config.cloze or config.tasks):
        name, validation = _read_text(config, tokenizer, gpt2.config.n_positions)
        text = evaluate(model, validation, accelerator=accelerator, rows=rows)
        assert text is not None  # nobody asks this command to stop
        print(f"text           {text.tokens:,} tokens, {text.text_bytes:,} bytes of {name}")
        print(f"loss           {text.loss:.4f} nats per token")
        print(f"perplexity     {text.perplexity:.2f}")
        print(f"bits per byte  {text.bits_per_byte:.4f}")
        results["text"] = {"name": name, **asdict(text), "perplexity": text.perplexity}
    for path, (format_name, items) in files.items():
        result = cloze(gpt2, tokenizer, format_name, items, rows)
        print(f"{path}  {result}")
        results.setdefault("cloze", {})[path] = asdict(result)
    if config.tasks:
        results["tasks"] = evaluate_tasks(gpt2, tokenizer, config.tasks, config.task_directory, rows)
        for task, metrics in results["tasks"].items():
            print(f"{task}  {', '.join(f'{metric} {value:.4g}' for metric, value in metrics.items())}")
    if config.output:
        Path(config.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _read_text(config: EvaluateConfig, tokenizer: Any, positions: int) -> tuple[str, ValidationSet]:
    """(name, blocks) of the text that `config.data` names."""
    from recipe.data.blocks import pack_validation
    from recipe.data.sources import open_source

    # Windows removes no file that is still mapped
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        one_in = None if config.data.text_files else config.data.validation_one_in
        data = replace(config.data, cache_directory=config.data.cache_directory or cache, validation_one_in=one_in)
        source = open_source(Config(data=data, batch=BatchConfig(lanes=1)))
        documents = source.training_documents() if data.text_files else source.validation_documents()
        length = min(data.sequence_length, positions)
        validation = pack_validation(documents, tokenizer, length, config.tokens or math.inf)
    if validation is None:
        raise RecipeError(f"no text to evaluate in {source.name}")
    return source.name, validation


if __name__ == "__main__":
    run_command(main)
