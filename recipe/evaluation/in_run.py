"""Evaluation in a run: the loss on the held-out documents and on other text, and samples."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from recipe.config.settings import HELD_OUT, Config
from recipe.data.blocks import ValidationSet, pack_validation
from recipe.data.documents import Source
from recipe.data.sources import open_source
from recipe.errors import RecipeError
from recipe.evaluation.evaluate import Evaluation, evaluate
from recipe.evaluation.sample import GenerateConfig, generate
from recipe.plan.schedule import crosses
from recipe.run.ledger import LedgerEntry
from recipe.run.run import Run
from recipe.run.stop import Stopped


def read_validation_sets(config: Config, source: Source, tokenizer: Any) -> dict[str, ValidationSet]:
    """The held-out documents, if there are any, and those of each of `evaluation.sets`, by name.

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


class RunEvaluation:
    """Evaluates the model when it is due: before the first update, whenever enough tokens have been seen, after the last.

    Attributes:
        latest: the last evaluation of each set.
        samples: the last sample of each prompt.
    """

    def __init__(self, run: Run, sets: dict[str, ValidationSet], model: Any, tokenizer: Any) -> None:
        self.run, self.sets, self.model, self.tokenizer = run, sets, model, tokenizer
        self.latest: dict[str, Evaluation] = {}
        self.samples: dict[str, str] = {}
        if HELD_OUT not in sets:
            run.console.say("no validation on held-out documents: there are none")

    def begin(self, update: int) -> None:
        """Evaluate before training, for the ledger's line of update 0; and if no update is left. Collective.

        Raises:
            Stopped: a rank was asked to stop meanwhile.
        """
        if update not in (0, self.run.plan.planned_updates):
            return
        values = self._validate(update)
        if update == 0 and values:
            self.run.ledger.write(LedgerEntry(update=0, tokens=0, validation=values))

    def add_to(self, entry: LedgerEntry) -> LedgerEntry:
        """The entry with its validation columns, null if none is due now or a rank is asked to stop meanwhile. Collective."""
        plan, every = self.run.plan, self.run.config.evaluation.every_tokens
        before = entry.tokens - plan.update.tokens_per_update
        values: dict[str, float | None] = dict.fromkeys(self._columns())
        if entry.update == plan.planned_updates or crosses(before, entry.tokens, every):
            with suppress(Stopped):  # this update is done and has to be written down; the next one stops
                values = self._validate(entry.update)
                self._sample(entry.update)
        return replace(entry, validation=values)

    def _columns(self) -> list[str]:
        return [f"validation/{name}/{value}" for name in self.sets for value in ("loss", "bits_per_byte")]

    def _validate(self, update: int) -> dict[str, float | None]:
        """Evaluate each set; the ledger's columns."""
        run, values = self.run, list[float]()
        for name, blocks in self.sets.items():
            size = run.plan.update.micro_batch_size
            evaluation = evaluate(self.model, blocks, run.accelerator, size, run.stop)
            on = "" if name == HELD_OUT else f", {name}"
            run.console.say(f"validation after {update:,} updates{on}: {evaluation}")
            self.latest[name] = evaluation
            values += [evaluation.loss, evaluation.bits_per_byte]
        return dict(zip(self._columns(), values, strict=True))

    def _sample(self, update: int) -> None:
        """Continue each prompt, on rank 0 alone, and write it down. Training is not changed by it."""
        run, settings = self.run, self.run.config.evaluation
        if not run.is_main or settings.sample_tokens is None:
            return
        model = run.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        for prompt in settings.prompts:
            if run.stop.signal:
                break
            sampling = GenerateConfig(prompt, settings.sample_tokens, seed=run.config.run.seed)
            self.samples[prompt] = generate(model.gpt2, self.tokenizer, sampling)
            run.ledger.event("sample", update, prompt=prompt, text=self.samples[prompt])
        model.train(was_training)
