"""Workers: the loop of `recipe/train.py` over random tokens, and the limit of the machine, its matrix products alone."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.results import timed
from benchmarks.step.turns import Setting, Turns
from benchmarks.training import Training, linear_products, read_preset
from recipe.checkpoint import CheckpointSaver
from recipe.config.settings import PerformanceConfig
from recipe.data.blocks import split_into_micro_batches
from recipe.data.validation import ValidationSet
from recipe.evaluation.evaluate import evaluate
from recipe.model.onednn import choose_matmul, onednn_matmul
from recipe.run.ledger import LEDGER, read_lines
from recipe.step.update import clip_and_step, run_update

ACCUMULATED = (1, 4, 16, 64)
PAIRS = 4  # of pairs of updates in a turn
UPDATES = 100_000  # more than anybody asks for


class Loop(Training):
    """The loop, whose updates are done one by one.

    Args:
        setting: of the comparison.
        every_updates: between checkpoints; None: none.
    """

    def __init__(self, setting: Setting, every_updates: int | None = None) -> None:
        settings = {
            # the same on all ranks
            "run.directory": os.environ.get("BENCHMARK_RUN") or tempfile.mkdtemp(prefix="benchmark-step-"),
            "model": setting.shape,
            "data.sequence_length": setting.sequence_length,
            "batch.tokens_per_update": setting.tokens,
            "batch.micro_batch_size": setting.micro_batch_size,
            "batch.lanes": setting.blocks,
            "performance.compile": setting.compile,
            "schedule.total_tokens": UPDATES * setting.tokens,
            "schedule.warmup_tokens": 10 * setting.tokens,
            "checkpoint.every_tokens": every_updates and every_updates * setting.tokens,
            "checkpoint.every_minutes": None,
        }
        super().__init__(read_preset("benchmarks/plain.yaml", settings), setting.vocab_size)
        self.saver = CheckpointSaver(self.run, self.model, self.optimizer, self.tokenizer, on_saved=lambda *_: None)
        self.run.console.start(0)

    def next(self) -> dict[str, float]:
        """The body of the loop. Returns the seconds of its parts."""
        started = time.perf_counter()
        blocks, entry = self.update()
        assert entry.is_finite
        self.saver.finish_update(entry, blocks, [])
        self.run.console.progress(entry)
        ended = time.perf_counter()
        logging = ended - self.computed
        return {"update": ended - started, "wait for data": blocks.wait_seconds, "entry, ledger, console": logging}


def ours(setting: Setting, turns: Turns) -> None:
    """An update in each turn."""
    loop = Loop(setting)
    turns.facts["parameters"] = loop.run.plan.parameters
    while True:
        turns.tick(parts=loop.next())


def costs(setting: Setting, turns: Turns) -> None:
    """In each turn an update, an evaluation of as many tokens, and an update with a checkpoint."""
    loop = Loop(setting, every_updates=2)
    run = loop.run
    blocks = np.stack([setting.block(10**9 + number) for number in range(setting.blocks)]).astype(np.int32)
    validation = ValidationSet(blocks, setting.tokens, setting.tokens)
    while True:
        parts = loop.next()
        batch_size = setting.micro_batch_size
        parts["evaluation"] = timed(partial(evaluate, loop.model, validation, run.accelerator, batch_size, run.stop))
        written = loop.next()["entry, ledger, console"] + timed(loop.saver.finish)
        parts["checkpoint, training stands still"] = read_lines(run.directory / LEDGER)[-1]["checkpoint_stall_seconds"]
        parts["checkpoint, from its start until it is on the disk"] = written
        turns.tick(parts=parts)


def accumulation(setting: Setting, turns: Turns) -> None:
    """In each turn updates of 1, 4, 16 and 64 micro-batches, and what they consist of, timed alone."""
    training = Loop(setting)
    run, model, optimizer = training.run, training.model, training.optimizer
    one = split_into_micro_batches(training.first_blocks().batch, run.plan.update, run.rank)
    inputs, targets = one[0]

    def forward_backward() -> None:
        (model(inputs, targets) / setting.tokens).backward()

    def alone(times: int) -> dict[str, float]:
        """Seconds of each part: the first backward finds no gradient, the others add to it."""
        first, others = timed(forward_backward), timed(forward_backward, times) / times
        step = timed(lambda: clip_and_step(run, model, optimizer, torch.zeros((), device=run.device)))
        return {"into no gradient": first, "forward and backward": others, "step": step}

    while True:
        parts = {}
        for count in ACCUMULATED:
            times = max(2, count // 8)
            before = alone(times)
            seconds = timed(partial(run_update, run, model, optimizer, one * count, count * setting.tokens))
            after = alone(times)  # a machine that becomes slower slows down both
            parts[str(count)] = {"update": seconds, **{name: (before[name] + after[name]) / 2 for name in before}}
        turns.tick(parts=parts)


def noise(setting: Setting, turns: Turns) -> None:
    """In each turn updates with and without the gradients of micro-batches being measured, in turns of their own.

    Hooks stay where they are in those without, and do nothing; that costs 0.1 ms for a thousand calls.
    """
    loop = Loop(setting)
    measured, without = loop.run.noise, None
    assert measured
    while True:
        parts = {"measured": 0.0, "not measured": 0.0}
        for number in range(4 * PAIRS):
            is_measured = number % 4 in (0, 3)  # a machine that becomes slower slows down both
            loop.run.noise = measured if is_measured else without
            parts["measured" if is_measured else "not measured"] += loop.next()["update"]
        turns.tick(parts=parts)


def matrix_products(setting: Setting, turns: Turns) -> None:
    """The products of an update and nothing else, each by the faster of two libraries; the parts are those of `seconds`.

    They are `torch.mm` into memory that is there already, and oneDNN if the recipe can call it; `torch.mm` alone is timed too,
    since the peers have nothing else. Attention has six products over the T x T pairs of each head, of 2 R T d FLOPs in all
    heads together, for R tokens of width d: two forward, four backward. A causal kernel may leave out half of them, and the
    recipe's does, so the report counts half of their time. The recipe has to pay for what the kernel computes twice.
    """
    rows, heads = setting.micro_batch_size * setting.sequence_length, setting.micro_batch_size * setting.n_head
    products = list(linear_products(setting, rows))
    outputs = [torch.empty(len(left), right.shape[1]) for _, _, left, right in products]
    flops = setting.steps * sum(2 * left.numel() * right.shape[1] * count for _, count, left, right in products)
    of_attention = 12 * setting.tokens * setting.n_layer * setting.n_embd * setting.sequence_length
    turns.facts["flops"] = {"linear": flops, "linear by torch.mm": flops, "attention": of_attention}
    attention = _attention(heads, setting.sequence_length, setting.n_embd // setting.n_head)
    has_onednn = choose_matmul(PerformanceConfig(), "cpu", "fp32") == "onednn"
    while True:
        seconds = {"linear": 0.0, "linear by torch.mm": 0.0, "attention": 0.0}
        for _ in range(setting.steps):
            for (_, count, left, right), output in zip(products, outputs, strict=True):
                by_torch = timed(partial(torch.mm, left, right, out=output), count)
                fastest = by_torch
                if has_onednn:
                    fastest = min(by_torch, timed(partial(onednn_matmul, left, right), count))
                seconds["linear by torch.mm"] += by_torch
                seconds["linear"] += fastest
            seconds["attention"] += timed(attention, setting.n_layer)
        turns.tick(parts=seconds)


def _attention(heads: int, tokens: int, width: int) -> Callable[[], object]:
    """The products of one layer: scores, output; gradients of the weights and of values, queries and keys."""
    query, to_query = torch.randn(heads, tokens, width), torch.empty(heads, tokens, width)
    weights, to_weights = torch.randn(heads, tokens, tokens), torch.empty(heads, tokens, tokens)

    def products() -> None:
        for _ in range(2):
            torch.bmm(query, query.mT, out=to_weights)
        for _ in range(2):
            torch.bmm(weights, query, out=to_query)
            torch.bmm(weights.mT, query, out=to_query)

    return products
