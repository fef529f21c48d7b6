"""This recipe as a benchmark's worker: what `recipe/train.py` builds and does, over lanes of random tokens."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from recipe.run.launch import announced_world_size, start_accelerator, warm_up_ddp

from benchmarks.savers import Ours
from benchmarks.worker import Setting, Turns
from recipe.config.command_line import load_config
from recipe.data.blocks import UpdateReader, ValidationSet, split_into_micro_batches
from recipe.evaluation.evaluate import evaluate
from recipe.model.gpt2 import build_gpt2, build_optimizer, set_learning_rate
from recipe.model.kernels import compile_model, is_compiled, set_kernels
from recipe.model.onednn import choose_matmul, use_onednn
from recipe.model.seeds import seed_dropout
from recipe.plan.memory import choose_loss
from recipe.plan.run_plan import make_plan
from recipe.plan.schedule import learning_rate
from recipe.run.console import Console
from recipe.run.ledger import Ledger, entry_of
from recipe.run.stop import StopRequest
from recipe.step.micro_batches import MicroBatches
from recipe.step.update import run_update

PRECISION = "fp32"
ACCUMULATED = (1, 4, 16, 64)
UPDATES = 100_000  # as many as anybody asks for


class BlockLane:
    """Stands for a lane of text; gives one block to each update, and the lanes give the blocks in order."""

    def __init__(self, setting: Setting, lane: int) -> None:
        self._setting, self._next = setting, lane

    def state_dict(self) -> dict[str, Any]:
        """The number of the next block."""
        return {"next": self._next}

    def next_blocks(self, count: int) -> np.ndarray:
        """Int32 [1, sequence_length + 1]."""
        assert count == 1
        block = self._setting.block(self._next)
        self._next += self._setting.blocks
        return block[None]


class RecipeTraining:
    """A run of the recipe, in the order of `recipe/train.py`, whose updates are done one by one."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        directory = Path(tempfile.mkdtemp(prefix="benchmark-step-"))
        self.config = load_config(_arguments(setting, directory))
        self.stop = StopRequest()
        self.plan = make_plan(self.config, announced_world_size())
        self.cut = self.plan.update
        self.accelerator = start_accelerator(self.config, PRECISION)
        self.stop.connect(self.accelerator.num_processes)
        self.rank = self.accelerator.process_index
        set_kernels(self.config, self.accelerator.device, PRECISION)
        loss = choose_loss(self.config.performance.loss, self.accelerator.device.type, PRECISION)
        model = build_gpt2(self.config, setting.vocabulary, 0, loss=loss)
        if choose_matmul(self.config.performance, self.accelerator.device.type, PRECISION) == "onednn":
            use_onednn(model)
        if is_compiled(self.config.performance.compile, "cpu"):
            compile_model(model)
        optimizer = build_optimizer(model, self.config.optimizer, self.config.run.seed)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        warm_up_ddp(self.model, self.accelerator, self.cut.sequence_length)
        lanes: Any = [BlockLane(setting, lane) for lane in self.cut.lanes_of_rank(self.rank)]
        device = self.accelerator.device
        self.reader = UpdateReader(lanes, self.cut.blocks_per_lane, UPDATES, device, stop=self.stop, rank=self.rank)
        self.ledger = Ledger(directory / "ledger.jsonl", self.accelerator, 1)
        self.console = Console(self.accelerator.is_main_process, UPDATES)
        self.memory = MicroBatches(self.cut, self.rank, stop=self.stop, ledger=self.ledger, console=self.console)
        self.model.train()
        self.console.start(0)
        self.done = 0

    def update(self) -> dict[str, float]:
        """The body of the loop. Returns the seconds of its parts."""
        self.done += 1
        started = time.perf_counter()
        blocks = self.reader.next_update()
        assert blocks is not None
        self.blocks = blocks
        tokens = self.done * self.cut.tokens_per_update
        rate = learning_rate(tokens, self.plan.total_tokens, self.config.optimizer, self.config.schedule)
        set_learning_rate(self.optimizer, rate)
        seed_dropout(self.config.run.seed, self.done, self.rank)
        result = self.run_update(self.memory.split(blocks.batch))
        computed = time.perf_counter()
        entry = entry_of(
            self.done,
            result,
            blocks,
            accelerator=self.accelerator,
            cut=self.memory.cut,
            flops_per_token=self.plan.flops_per_token,
            learning_rate=rate,
            started=started,
            peak=None,
        )
        self.ledger.write(entry)
        self.console.progress(entry)
        return {"waiting": blocks.wait_seconds, "logging": time.perf_counter() - computed}

    def run_update(self, micro_batches: list[Any]) -> Any:
        """As the loop calls it."""
        result = run_update(
            self.model,
            self.optimizer,
            micro_batches,
            accelerator=self.accelerator,
            scaling=self.config.batch.scaling,
            max_grad_norm=self.config.optimizer.max_grad_norm,
            target_tokens=self.cut.tokens_per_update,
            stop=self.stop,
        )
        assert result is not None
        assert result.is_finite
        return result


def ours(setting: Setting, turns: Turns) -> None:
    """An update of the recipe in each turn."""
    training = RecipeTraining(setting)
    turns.facts["parameters"] = training.plan.parameters
    while True:
        turns.tick(parts=training.update())


def costs(setting: Setting, turns: Turns) -> None:
    """In each turn an update, an evaluation of as many tokens, and a checkpoint."""
    training = RecipeTraining(setting)
    blocks = np.stack([setting.block(10**9 + number) for number in range(setting.blocks)])
    validation = ValidationSet(blocks, setting.tokens, setting.tokens)
    training.update()
    saver = Ours(training, training.ledger.path.parent)  # type: ignore[arg-type]
    while True:
        started = time.perf_counter()
        parts = training.update()
        parts["update"] = time.perf_counter() - started
        started = time.perf_counter()
        evaluate(training.model, validation, accelerator=training.accelerator, rows=setting.micro_batch_size)
        parts["evaluation"] = time.perf_counter() - started
        parts["checkpoint stall"], parts["checkpoint written"] = saver.save(training.done)
        turns.tick(parts=parts)


def accumulation(setting: Setting, turns: Turns) -> None:
    """In each turn updates of 1, 4, 16 and 64 micro-batches, and what they consist of, timed alone."""
    training = RecipeTraining(setting)
    model, optimizer = training.model, training.optimizer
    blocks = training.reader.next_update()
    assert blocks is not None
    one = split_into_micro_batches(blocks.batch, training.cut, 0)
    inputs, targets = one[0]

    def forward_backward() -> float:
        started = time.perf_counter()
        (model(inputs, targets) / setting.tokens).backward()
        return time.perf_counter() - started

    def step() -> float:
        started = time.perf_counter()
        training.accelerator.clip_grad_norm_(model.parameters(), training.config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def alone(times: int) -> dict[str, float]:
        """Seconds of each: the first finds no gradient, the others add to it."""
        first = forward_backward()
        others = [forward_backward() for _ in range(times)]
        return {"into no gradient": first, "forward and backward": mean(others), "step": step()}

    while True:
        parts = {}
        for count in ACCUMULATED:
            times = max(2, count // 8)
            before = alone(times)
            started = time.perf_counter()
            training.run_update(one * count)
            seconds = time.perf_counter() - started
            after = alone(times)  # a machine that becomes slower slows both
            parts[str(count)] = {"update": seconds, **{name: (before[name] + after[name]) / 2 for name in before}}
        turns.tick(parts=parts)


def _arguments(setting: Setting, directory: Path) -> list[str]:
    values = {
        "config": "configs/quickstart.yaml",
        "run.directory": directory,
        "run.parity_check": "false",
        "precision": PRECISION,
        "model.n_layer": setting.n_layer,
        "model.n_embd": setting.n_embd,
        "model.n_head": setting.n_head,
        "model.vocab_size": setting.vocabulary,
        "data.sequence_length": setting.sequence_length,
        "batch.tokens_per_update": setting.tokens,
        "batch.micro_batch_size": setting.micro_batch_size,
        "batch.lanes": setting.blocks,
        "performance.compile": str(setting.compile).lower(),
        "schedule.total_tokens": UPDATES * setting.tokens,
        "schedule.warmup_tokens": 10 * setting.tokens,
        "checkpoint.every_tokens": 1,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]
