"""This recipe's training over random text: what `recipe/train.py` builds and does, by the functions that it calls."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, is_dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.random_text import random_block
from recipe.config.checks import validate
from recipe.config.settings import Config
from recipe.data.blocks import UpdateBlocks, UpdateReader, next_update
from recipe.data.lanes import Position
from recipe.model import build_model, build_optimizer, choose_kernels, prepare_model, set_learning_rate
from recipe.run import Run, start_run
from recipe.run.ledger import LedgerEntry
from recipe.run.stop import STOP_SIGNALS
from recipe.step import MicroBatches, measure_update


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """`config` with other values: `{"performance.compile": True}`, or as nested as a preset's YAML is."""
    for name, value in settings.items():
        section, _, rest = name.partition(".")
        old = getattr(config, section)
        if rest:
            value = with_settings(old, {rest: value})
        elif is_dataclass(old):
            value = with_settings(old, value)
        elif isinstance(old, float) and value is not None:
            value = float(value)  # YAML takes 2e-4 for text
        config = replace(config, **{section: value})
    return config


def read_preset(path: str, settings: Mapping[str, Any] | None = None) -> Config:
    """A preset with some settings changed, without the command line's parser.

    Raises:
        AttributeError: a name that is no setting.
    """
    import yaml

    with open(path, encoding="utf-8") as file:
        config: Config = with_settings(with_settings(Config(), yaml.safe_load(file)), settings or {})
    return config


def start_quietly(config: Config) -> Run:
    """`start_run` without its lines, also for a second run of this process. Ctrl-C ends a benchmark at once."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()  # it keeps the precision of the run before
    GradientState._reset_state()
    with redirect_stdout(io.StringIO()):
        run = start_run(config)
    run.stop.prepared()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    return run


def linear_products(model: Any, rows: int, **options: Any) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """The matrix products of the linear layers for `rows` tokens: (name, layers, left, right), with operands of `options`.

    A layer has three: its output, the gradient of its input, and that of its weight, each of 2 x rows x inputs x outputs FLOPs.
    A weight is [inputs, outputs], as GPT-2's, but the output layer's is the embedding, [vocabulary, width].
    """
    width, layers = model.n_embd, model.n_layer
    kinds = {
        "attention in": (width, 3 * width, layers),
        "attention out": (width, width, layers),
        "feed-forward in": (width, 4 * width, layers),
        "feed-forward out": (4 * width, width, layers),
        "logits": (width, model.vocab_size, 1),
    }
    for name, (inner, outer, count) in kinds.items():
        shapes = (rows, inner), (rows, outer), (outer, inner) if name == "logits" else (inner, outer)
        x, y, weight = (torch.randn(shape, **options) for shape in shapes)
        if name == "logits":
            weight = weight.t()
        to_weight = (y.t(), x) if name == "logits" else (x.t(), y)
        yield f"{name}, forward", count, x, weight
        yield f"{name}, to inputs", count, y, weight.t()
        yield f"{name}, to weight", count, *to_weight


@cache
def any_tokenizer(vocabulary: int) -> Any:
    """Some tokenizer with so many tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"word{number}": number for number in range(vocabulary)}, unk_token="word0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="word0")


class RandomLane:
    """Stands for a lane of text: the lanes deal out the blocks of the random text."""

    bad_rows, is_ready = 0, True
    source_tokens, passes, document_start, streams, skipped = np.zeros(1, dtype=np.int64), (0,), None, (), ()

    def __init__(self, index: int, lanes: int, block: Callable[[int], np.ndarray]) -> None:
        self.index, self._lanes, self._block, self._next = index, lanes, block, 0

    def state_dict(self) -> dict[str, Any]:
        """The number of its next block, as a lane's position."""
        return asdict(Position((), (), block=self._next))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self._next = state["block"]

    def next_blocks(self, count: int) -> np.ndarray:
        """The next blocks, int32 [count, sequence_length + 1]."""
        numbers = range(self._next, self._next + count)
        self._next += count
        return np.stack([self._block(number * self._lanes + self.index) for number in numbers])


class Training:
    """A run of the recipe, ready for its first update.

    Args:
        config: the settings.
        vocabulary: tokens of the tokenizer.

    Attributes:
        computed: `time.perf_counter()` when the optimizer had stepped in the last update.
    """

    computed = 0.0

    def __init__(self, config: Config, vocabulary: int) -> None:
        validate(config)
        self.run = run = start_quietly(config)
        choose_kernels(run)
        self.tokenizer = any_tokenizer(vocabulary)
        with run.device:  # a CPU needs ten seconds for 1.3 billion normal numbers
            model = build_model(run, self.tokenizer)
        self.model = self.prepared(model)
        self.optimizer = run.accelerator.prepare(build_optimizer(self.model, config.optimizer, config.run.seed))
        self.micro_batches = MicroBatches(run, self.model)
        self.model.train()

    def prepared(self, model: Any) -> Any:
        """The model as it is trained."""
        return prepare_model(self.run, model)

    def make_lanes(self) -> Any:
        """This rank's lanes, at their beginning."""
        plan = self.run.plan.update
        block = partial(random_block, vocabulary=len(self.tokenizer), sequence_length=plan.sequence_length)
        return [RandomLane(lane, plan.lanes, block) for lane in plan.lanes_of_rank(self.run.rank)]

    def first_blocks(self) -> UpdateBlocks:
        """This rank's blocks of the first update, read as the parity check reads them."""
        return next_update(self.make_lanes(), self.run.plan.update.blocks_per_lane, self.run.device)

    @cached_property
    def reader(self) -> UpdateReader:
        """Reads in the background from its first use on."""
        return UpdateReader(self.run, self.make_lanes())

    def update(self) -> tuple[UpdateBlocks, LedgerEntry]:
        """The next update, as the loop does it until it is measured."""
        started = time.perf_counter()
        blocks = self.reader.next_update()
        learning_rate = set_learning_rate(self.run, self.optimizer, blocks.update)
        result = self.micro_batches.run_update(self.optimizer, blocks)
        self.computed = time.perf_counter()
        return blocks, measure_update(self.run, result, blocks, learning_rate, started)
