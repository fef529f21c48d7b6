"""Evaluation in a run: the loss on the held-out documents and on other text, and samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from recipe.config.settings import Config
from recipe.data.blocks import ValidationSet, pack_validation
from recipe.data.sources import Source, open_source
from recipe.errors import RecipeError
from recipe.evaluation.evaluate import Evaluation, evaluate
from recipe.evaluation.sample import GenerateConfig, generate
from recipe.run.console import Console
from recipe.run.ledger import Ledger
from recipe.run.stop import StopRequest

# The name of the set that the source itself holds out; no name in evaluation.sets may have a space.
HELD_OUT = "held out"


def read_validation_sets(config: Config, source: Source, tokenizer: Any) -> dict[str, ValidationSet]:
    """The held-out documents, where there are any, and those of each of `evaluation.sets`, by name.

    Raises:
        RecipeError: files that cannot be read, or without text.
    """

    def pack(documents: Iterator[str]) -> ValidationSet | None:
        return pack_validation(documents, tokenizer, config.data.sequence_length, config.evaluation.tokens)

    held_out = pack(source.validation_documents())
    sets = {HELD_OUT: held_out} if held_out else {}
    for name, pattern in config.evaluation.sets.items():
        data = replace(
            config.data, text_files=(pattern,), validation_one_in=None, cache_directory=str(config.cache_directory)
        )
        documents = open_source(replace(config, data=data, batch=replace(config.batch, lanes=1))).training_documents()
        packed = pack(documents)
        if packed is None:
            raise RecipeError(f"evaluation.sets.{name}: no text in {pattern!r}")
        sets[name] = packed
    return sets


def ledger_values(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """The fields of a `LedgerEntry` that evaluations fill."""
    held_out = evaluations.get(HELD_OUT)
    others = {
        name: {"loss": evaluation.loss, "bits_per_byte": evaluation.bits_per_byte}
        for name, evaluation in evaluations.items()
        if name != HELD_OUT
    }
    return {
        "validation_loss": held_out.loss if held_out else None,
        "bits_per_byte": held_out.bits_per_byte if held_out else None,
        "validation": others or None,
    }


class RunEvaluation:
    """Evaluates the model of a run.

    Args:
        config: of the run.
        sets: by name; the same on every rank.
        model: prepared.
        tokenizer: of the run.
        accelerator: knows the ranks.
        stop: looked at between forwards, and between samples.
        ledger: receives the samples.
        console: says the losses.
    """

    def __init__(
        self,
        config: Config,
        sets: dict[str, ValidationSet],
        model: Any,
        tokenizer: Any,
        *,
        accelerator: Any,
        stop: StopRequest,
        ledger: Ledger,
        console: Console,
    ) -> None:
        self.config, self.sets, self.model, self.tokenizer = config, sets, model, tokenizer
        self.accelerator, self.stop, self.ledger, self.console = accelerator, stop, ledger, console
        self.samples: dict[str, str] = {}  # the last of each prompt

    def validate(self, update: int, rows: int) -> dict[str, Evaluation]:
        """Evaluate each set after `update` updates, `rows` blocks in a forward; none where asked to stop. Collective."""
        evaluations = {}
        for name, blocks in self.sets.items():
            evaluation = evaluate(self.model, blocks, accelerator=self.accelerator, rows=rows, stop=self.stop)
            if evaluation is None:
                return {}
            on = "" if name == HELD_OUT else f", {name}"
            self.console.say(f"validation after {update:,} updates{on}: {evaluation}")
            evaluations[name] = evaluation
        return evaluations

    def sample(self, update: int) -> None:
        """Continue each prompt, on rank 0 alone, and write it to the ledger. Training is not changed by it."""
        settings = self.config.evaluation
        if not self.accelerator.is_main_process or not settings.sample_tokens:
            return
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        for prompt in settings.prompts:
            if self.stop.signal:
                break
            sampling = GenerateConfig(prompt, settings.sample_tokens, seed=self.config.run.seed)
            self.samples[prompt] = generate(model.gpt2, self.tokenizer, sampling)
            self.ledger.event("sample", update, prompt=prompt, text=self.samples[prompt])
        model.train(was_training)
