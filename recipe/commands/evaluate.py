"""Evaluate a finished model: `python -m recipe evaluate MODEL ...`."""

from __future__ import annotations  # without it, --help prints each Annotated type in full

import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe.config.command_line import make_parser, parse
from recipe.config.settings import BatchConfig, Config, Count, CountOrNull, DataConfig
from recipe.errors import RecipeError
from recipe.evaluation.lm_eval import evaluate_tasks, find_tasks
from recipe.format import json_value
from recipe.run.launch import check_launch


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a finished model on text and tasks of lm-eval."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text: all of data.text_files, or the held-out part of data.dataset. Tokenizer and length are the model's; attention
    stays inside documents if it did in training, or with data.document_mask. With --tasks and without any of data: no text."""
    tokens: CountOrNull = None
    """Stop after this many tokens of the text, rounded to whole documents. Null: all of it."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks, or local .jsonl files in the format of HellaSwag, LAMBADA or BLiMP. Needs lm-eval."""
    task_directory: str | None = None
    """Directory of YAML files with tasks of your own for lm-eval."""
    micro_batch_size: Count = 8
    """Blocks or continuations in one forward."""
    output: str | None = None
    """JSON file for all results."""


def main() -> None:
    """The command."""
    parser = make_parser(EvaluateConfig, "python -m recipe evaluate", "Evaluate a model on text and tasks of lm-eval.")
    parser.add_argument("model", help="Directory of a finished model, or its name on the Hub.")
    config, rest = parse(parser, EvaluateConfig, sys.argv[1:])
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise RecipeError(f"output = {config.output!r}: its directory does not exist")
    if config.data.sources:
        raise RecipeError("data.sources: evaluate the sources of a mixture one by one")
    tasks = find_tasks(config.tasks)
    check_launch()

    from recipe.model.export import load_pretrained
    from recipe.run.environment import start_accelerator

    gpt2, tokenizer = load_pretrained(rest["model"])
    accelerator = start_accelerator("fp32")
    gpt2.to(accelerator.device)
    results: dict[str, Any] = {"model": rest["model"]}
    if config.data != DataConfig() or not tasks:
        results["text"] = _evaluate_text(config, gpt2, tokenizer, accelerator)
    if tasks:
        results["tasks"] = evaluate_tasks(gpt2, tokenizer, tasks, config.task_directory, config.micro_batch_size)
        for task, metrics in results["tasks"].items():
            print(f"{task}  {', '.join(f'{metric} {value:.4g}' for metric, value in metrics.items())}")
    if config.output:
        Path(config.output).write_text(
            json.dumps(json_value(results), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )


def _evaluate_text(config: EvaluateConfig, gpt2: Any, tokenizer: Any, accelerator: Any) -> dict[str, Any]:
    """Print and return the loss on the text that `config.data` names."""
    from recipe.data.sources import open_source
    from recipe.data.validation import pack_validation
    from recipe.evaluation.evaluate import evaluate
    from recipe.model.gpt2 import CausalLanguageModel
    from recipe.run.stop import StopRequest

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:  # Windows keeps a file that is mapped
        one_in = None if config.data.files else config.data.validation_one_in
        data = replace(config.data, cache_directory=config.data.cache_directory or cache, validation_one_in=one_in)
        data = replace(data, tokenizer=gpt2.name_or_path)
        source = open_source(Config(data=data, batch=BatchConfig(lanes=1)))
        documents = source.training_documents() if data.files else source.validation_documents()
        length = min(data.sequence_length, gpt2.config.n_positions)
        most = config.tokens or math.inf
        validation = pack_validation(documents, tokenizer, length, most, source.holds_pieces)
    if validation is None:
        raise RecipeError(f"no text to evaluate in {source.name}")
    if data.document_mask:
        gpt2.config.update({"document_mask": True, "eos_token_id": tokenizer.eos_token_id})
    model = accelerator.prepare(CausalLanguageModel(gpt2, len(tokenizer)))
    text = evaluate(model, validation, accelerator, config.micro_batch_size, StopRequest())
    print(f"text           {text.tokens:,} tokens, {text.text_bytes:,} bytes of {source.name}")
    print(f"loss           {text.loss:.4f} nats per token")
    print(f"perplexity     {text.perplexity:.2f}")
    print(f"bits per byte  {f'none: {lost}' if (lost := validation.loss_of_text) else f'{text.bits_per_byte:.4f}'}")
    return {"name": source.name, **asdict(text), "perplexity": text.perplexity}
