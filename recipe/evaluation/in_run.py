"""Evaluation in a run: the loss on the held-out documents and on other text, and samples."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from recipe.config.settings import HELD_OUT, Config
from recipe.data.documents import Source, hash_number
from recipe.data.formats import Ids
from recipe.data.sources import identity_of, open_source
from recipe.data.validation import ValidationSet, pack_once, pack_validation
from recipe.errors import RecipeError
from recipe.evaluation.evaluate import Evaluation, evaluate, mean_by_weight
from recipe.evaluation.sample import GenerateConfig, generate, tokens_to_generate
from recipe.model.sharding import whole_model
from recipe.plan.schedule import crosses
from recipe.run.ledger import EVENTS, LEDGER, LedgerEntry, read_events, read_lines, source_columns
from recipe.run.run import Run
from recipe.run.stop import Stopped


def read_validation_sets(config: Config, sources: Sequence[Source], tokenizer: Any) -> dict[str, ValidationSet]:
    """The held-out documents, of a mixture those of each source, and those of each of `evaluation.sets`, by name.

    Raises:
        RecipeError: files that cannot be read, or without text; a source of a mixture without held-out documents.
    """

    def pack(documents: Iterator[str | Ids], are_pieces: bool = False) -> ValidationSet | None:
        return pack_validation(documents, tokenizer, config.data.sequence_length, config.evaluation.tokens, are_pieces)

    sets = {}
    for source in sources:
        if held_out := _pack_held_out(config, source, tokenizer, pack):
            sets[source.label or HELD_OUT] = held_out
        elif source.label and config.data.validation_one_in:
            raise RecipeError(
                f"data.sources: {source.label} has no held-out documents, of which each source of a mixture has its own "
                "validation loss: set --data.validation_one_in to less, or null for no validation"
            )
    for name, pattern in config.evaluation.sets.items():
        data = replace(config.data, sources=(), validation_one_in=None)
        one_lane = replace(config, data=data, batch=replace(config.batch, lanes=1))
        source = open_source(one_lane, config.data.validation_set(pattern))
        packed = pack(source.training_documents(), source.holds_pieces)
        if packed is None:
            raise RecipeError(f"evaluation.sets.{name}: no text in {pattern!r}")
        sets[name] = packed
    return sets


def _pack_held_out(config: Config, source: Source, tokenizer: Any, pack: Any) -> ValidationSet | None:
    def pack_it() -> Any:
        return pack(source.validation_documents(), source.holds_pieces)

    if not source.is_remote:
        return pack_it()
    tokens, length = config.evaluation.tokens, config.data.sequence_length
    key = [identity_of(source), source.validation_one_in, tokens, length, tokenizer.backend_tokenizer.to_str()]
    name = f"{hash_number(json.dumps(key).encode()):016x}.npz"
    return pack_once(config.cache_directory / "validation" / name, pack_it)


def _columns(name: str) -> tuple[str, str]:
    """The ledger's columns of a validation set."""
    return f"validation/{name}/loss", f"validation/{name}/bits_per_byte"


class RunEvaluation:
    """Evaluates the model when it is due: before the first update, whenever enough tokens have been seen, after the last.

    Attributes:
        latest: the last evaluation of each set.
        samples: the last sample of each prompt.
    """

    def __init__(self, run: Run, sets: dict[str, ValidationSet], model: Any, tokenizer: Any) -> None:
        self.run, self.sets, self.model, self.tokenizer = run, sets, model, tokenizer
        # Of a mixture: the weight of each source. What is held out of all of them has the mean of their losses by weight.
        self.weights = {source.label: source.weight for source in run.config.data.sources if source.label in sets}
        self.names = [*([HELD_OUT] if self.weights else []), *sets]
        self.latest: dict[str, Evaluation] = {}
        self.samples: dict[str, str] = {}
        if HELD_OUT not in self.names:
            run.console.say("no validation on held-out documents: there are none")
        for name, blocks in sets.items():
            if lost := blocks.loss_of_text:
                run.console.say(f"no bits per byte of {'validation' if name == HELD_OUT else name}: {lost}")
        self.prompts = self._prompts_with_room()

    def begin(self, update: int) -> None:
        """Evaluate before training, for the ledger's line of update 0; or do what was due after `update`. Collective.

        If a stop has kept evaluation or samples from the record of that update, they get there now.

        Raises:
            Stopped: a rank was asked to stop meanwhile.
            RecipeError: the ledger cannot be written.
        """
        run = self.run
        if update == 0:
            if self.sets:
                no_sources = dict.fromkeys(source_columns(run.config))
                run.ledger.write(LedgerEntry(0, 0, sources=no_sources, validation=self._validate(0, self.sets)))
            return
        if not self._is_due(update):
            return
        line, samples = run.on_main(lambda: self._record(update))
        if not line and update < run.plan.planned_updates:
            return  # it goes on from the checkpoint of another directory
        self.latest, self.samples = self.of_line(line), samples
        if missing := [name for name in self.sets if name not in self.latest]:
            values = self._validate(update, missing)
            if line:
                run.ledger.amend(update, values)
        self._sample(update, [prompt for prompt in self.prompts if prompt not in samples])

    def add_to(self, entry: LedgerEntry) -> LedgerEntry:
        """The entry with its validation columns, null if none is due now or a rank is asked to stop meanwhile. Collective."""
        values: dict[str, float | None] = {column: None for name in self.names for column in _columns(name)}
        if self._is_due(entry.update):
            with suppress(Stopped):  # this update is done and has to be written down; the next one stops
                values = self._validate(entry.update, self.sets)
                self._sample(entry.update, self.prompts)
        return replace(entry, validation=values)

    def _prompts_with_room(self) -> list[str]:
        """The prompts that leave the model positions for a continuation; says which leave none, or few."""
        wanted, prompts = self.run.config.evaluation.sample_tokens, list[str]()
        gpt2 = self.run.accelerator.unwrap_model(self.model).gpt2
        if wanted is None:
            return prompts
        for prompt in self.run.config.evaluation.prompts:
            try:
                count = tokens_to_generate(gpt2, self.tokenizer, GenerateConfig(prompt, wanted))
            except RecipeError as error:
                self.run.console.say(f"no samples of one of evaluation.prompts: {error}")
                continue
            prompts.append(prompt)
            if count < wanted:
                self.run.console.say(
                    f"samples of {prompt[:40]!r}: {count:,} tokens at most (evaluation.sample_tokens = "
                    f"{wanted:,}): the model has {gpt2.config.n_positions:,} positions"
                )
        return prompts

    def of_line(self, line: dict[str, Any]) -> dict[str, Evaluation]:
        """What a line of the ledger says of each set; it may have been evaluated by another start of the run."""
        found = {}
        for name, blocks in self.sets.items():
            loss, bits_per_byte = (line.get(column) for column in _columns(name))
            if loss is not None:
                found[name] = Evaluation(loss, bits_per_byte, blocks.tokens, blocks.text_bytes)
        return self._with_mixture(found)

    def _with_mixture(self, evaluations: dict[str, Evaluation]) -> dict[str, Evaluation]:
        """The same, and what is held out of all sources if each of them is there."""
        if not self.weights or self.weights.keys() - evaluations.keys():
            return evaluations
        mean = {HELD_OUT: mean_by_weight([(evaluations[name], weight) for name, weight in self.weights.items()])}
        return mean | evaluations | mean  # in front of the others, and in place of an earlier one

    def _is_due(self, update: int) -> bool:
        plan, every = self.run.plan, self.run.config.evaluation.every_tokens
        return update == plan.planned_updates or crosses(
            plan.tokens_after(update - 1), plan.tokens_after(update), every
        )

    def _record(self, update: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The ledger's line of an update, empty if there is none, and its samples by prompt."""
        lines = [line for line in read_lines(self.run.directory / LEDGER) if line["update"] == update]
        samples = read_events(self.run.directory / EVENTS, "sample", update)
        return (lines or [{}])[-1], {event["prompt"]: event["text"] for event in samples if event["update"] == update}

    def _validate(self, update: int, names: Iterable[str]) -> dict[str, float | None]:
        """Evaluate these sets; the ledger's columns."""
        run, values = self.run, dict[str, float | None]()
        for name in names:
            size = run.plan.update.micro_batch_size
            evaluation = evaluate(self.model, self.sets[name], run.accelerator, size, run.stop)
            on = "" if name == HELD_OUT else f", {name}"
            run.console.say(f"validation after {update:,} updates{on}: {evaluation}")
            self.latest[name] = evaluation
        self.latest = self._with_mixture(self.latest)
        if self.weights:
            run.console.say(f"validation after {update:,} updates, all sources by weight: {self.latest[HELD_OUT]}")
        for name in self.names:
            if found := self.latest.get(name):
                values |= zip(_columns(name), (found.loss, found.bits_per_byte), strict=True)
        return values

    def _sample(self, update: int, prompts: Iterable[str]) -> None:
        """Continue these prompts, on rank 0 alone, and write it down. Training is not changed by it. Collective.

        Raises:
            Stopped: a rank was asked to stop meanwhile; samples may be missing, also behind the last update.
        """
        run, settings = self.run, self.run.config.evaluation
        if not self.prompts or settings.sample_tokens is None:
            return
        model = whole_model(run, run.accelerator.unwrap_model(self.model))
        was_training = self.model.training
        self.model.eval()
        if model:
            model.eval()
        for prompt in prompts if run.is_main else ():
            if run.stop.signal:
                break
            sampling = GenerateConfig(prompt, settings.sample_tokens, seed=run.config.run.seed)
            self.samples[prompt] = generate(model.gpt2, self.tokenizer, sampling)
            run.ledger.event("sample", update, prompt=prompt, text=self.samples[prompt])
        self.model.train(was_training)
        run.stop.agree()
