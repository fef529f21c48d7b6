"""Four ways to save and bring back one training: this recipe's, accelerate's, Trainer's, and torch's asynchronous one."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from recipe.run.launch import start_accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from recipe.checkpoint.resume import find_resume_point, restore
from recipe.checkpoint.saver import CheckpointSaver
from recipe.config.command_line import load_config
from recipe.data.blocks import next_update, to_tensors
from recipe.hub.background import Pusher
from recipe.model.gpt2 import build_gpt2, build_optimizer
from recipe.plan.run_plan import make_plan
from recipe.run.console import Console
from recipe.run.ledger import Ledger, gather_hash
from recipe.step.update import run_update


class RandomLane:
    """Stands for a lane of text: random tokens, the same at every reading."""

    def __init__(self, index: int, vocabulary: int, tokens: int) -> None:
        self.index, self._vocabulary, self._tokens = index, vocabulary, tokens

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def next_blocks(self, count: int) -> np.ndarray:
        """Int32 [count, tokens + 1]."""
        generator = np.random.default_rng(self.index)
        return generator.integers(self._vocabulary, size=(count, self._tokens + 1), dtype=np.int32)


class Training:
    """One model and one optimizer with its moments, that every way saves and brings back.

    Args:
        arguments: the recipe's settings.
        directory: of the run.
    """

    def __init__(self, arguments: list[str], directory: Path) -> None:
        self.config = load_config([*arguments, "--run.directory", str(directory), "--checkpoint.every_tokens", "1"])
        self.plan = make_plan(self.config, 1)
        self.accelerator = start_accelerator(self.config, "fp32")
        vocabulary, tokens = self.config.model.vocab_size, self.config.data.sequence_length
        model = build_gpt2(self.config, vocabulary, 0)  # nothing is padding, so that all save the same bytes
        self.gpt2: Any = model.gpt2
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, self.config.optimizer))
        self.lanes: Any = [RandomLane(lane, vocabulary, tokens) for lane in range(self.plan.update.lanes)]
        self.blocks = next_update(self.lanes, self.plan.update.blocks_per_lane, self.accelerator.device)
        self.train(1, 32)

    def train(self, updates: int, tokens: int) -> float:
        """Seconds of so many updates of one block of `tokens`."""
        started = time.perf_counter()
        for _ in range(updates):
            batch = to_tensors(self.blocks.blocks[:1, : tokens + 1], self.accelerator.device)
            run_update(
                self.model, self.optimizer, [batch], accelerator=self.accelerator, scaling="manual", max_grad_norm=1.0
            )
        return time.perf_counter() - started

    def tensors(self) -> list[Tensor]:
        """Weights and moments."""
        parameters, state = list(self.gpt2.parameters()), self.optimizer.optimizer.state
        return parameters + [state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]

    def fingerprint(self) -> list[int]:
        """A sum of the bits of each tensor."""
        return [int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for tensor in self.tensors()]

    def forget(self) -> None:
        """As in a process that has just built its model: no moments, other weights."""
        self.optimizer.optimizer.state.clear()
        with torch.no_grad():
            for parameter in self.gpt2.parameters():
                parameter.zero_()
        gc.collect()


class Way(Protocol):
    """One way to save a training, any number of times."""

    name: str

    def path(self, number: int) -> Path:
        """Final name of checkpoint `number`."""

    def save(self, number: int) -> tuple[float, float]:
        """Seconds that training stands still, and seconds until the checkpoint is said to be written."""

    def load(self, number: int) -> float:
        """Seconds from a model that is built until the next update could begin."""


class Ours:
    """`recipe.checkpoint.saver` and `recipe.checkpoint.resume`, called as `recipe/train.py` calls them."""

    name = "this recipe"

    def __init__(self, training: Training, root: Path) -> None:
        self.training = training
        self.ledger = Ledger(Path(training.config.run.directory) / "ledger.jsonl", training.accelerator, 1)
        self.hash = gather_hash(training.accelerator, training.plan.update, training.blocks)
        console = Console(False, 0)
        self.saver = CheckpointSaver(
            training.config,
            training.plan,
            training.model,
            training.optimizer,
            _tokenizer(training.config.model.vocab_size),
            Pusher(training.config, self.ledger, console, is_main=True),
            accelerator=training.accelerator,
            ledger=self.ledger,
            console=console,
        )

    def path(self, number: int) -> Path:
        return self.saver.root / f"step-{number:06d}"

    def begin(self, number: int) -> float:
        started = time.perf_counter()
        assert self.saver.snapshot(number, self.training.blocks, self.hash) is not None
        self.saver.write()
        return time.perf_counter() - started

    def save(self, number: int) -> tuple[float, float]:
        started = time.perf_counter()
        stall_seconds = self.begin(number)
        self.saver.finish()
        return stall_seconds, time.perf_counter() - started

    def load(self, number: int) -> float:
        training = self.training
        started = time.perf_counter()
        start = find_resume_point(training.config)
        assert start.update == number, start
        restore(
            start,
            training.model,
            training.optimizer,
            training.lanes,
            accelerator=training.accelerator,
            plan=training.plan.update,
            precision="fp32",
        )
        return time.perf_counter() - started


class Accelerate:
    """`save_state` and `load_state` as they come: the model in safetensors, the rest pickled."""

    name = "accelerate.save_state"

    def __init__(self, training: Training, root: Path) -> None:
        self.training, self.root = training, root / "accelerate"

    def path(self, number: int) -> Path:
        return self.root / str(number)

    def save(self, number: int) -> tuple[float, float]:
        started = time.perf_counter()
        self.training.accelerator.save_state(str(self.path(number)))
        seconds = time.perf_counter() - started
        return seconds, seconds

    def load(self, number: int) -> float:
        started = time.perf_counter()
        self.training.accelerator.load_state(str(self.path(number)))
        return time.perf_counter() - started


class HuggingFaceTrainer:
    """A real `transformers.Trainer` over the same model and optimizer, one step and a save; timed by a callback."""

    name = "transformers.Trainer"

    def __init__(self, training: Training, root: Path) -> None:
        self.training, self.root = training, root / "trainer"
        self.data: Any = [dict.fromkeys(("input_ids", "labels"), torch.arange(32))] * 8

    def path(self, number: int) -> Path:
        return self.root / str(number) / "checkpoint-1"

    def save(self, number: int) -> tuple[float, float]:
        times = self._train(number, steps=1)
        seconds = times["saved"] - times["step ends"]
        return seconds, seconds

    def load(self, number: int) -> float:
        """From `train()` to its first step."""
        times = self._train(number, steps=2, checkpoint=self.path(number))
        return times["step begins"] - times["start"]

    def _train(self, number: int, steps: int, checkpoint: Path | None = None) -> dict[str, float]:
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        times: dict[str, float] = {}

        class Stopwatch(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                times["step begins"] = time.perf_counter()
                if checkpoint:
                    raise _ResumedError  # before the step changes what was loaded

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times["step ends"] = time.perf_counter()

            def on_save(self, *_: Any, **__: Any) -> None:
                times["saved"] = time.perf_counter()

        arguments = TrainingArguments(
            str(self.path(number).parent),
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=1,
            use_cpu=self.training.accelerator.device.type == "cpu",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        optimizer = self.training.optimizer.optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = Trainer(
            self.training.gpt2,
            arguments,
            train_dataset=self.data,
            optimizers=(optimizer, schedule),
            callbacks=[Stopwatch()],
        )
        trainer.remove_callback(PrinterCallback)
        times["start"] = time.perf_counter()
        with suppress(_ResumedError):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return times


class _ResumedError(Exception):
    pass


class TorchAsync:
    """`torch.distributed.checkpoint.async_save` as it comes."""

    name = "torch async_save"

    def __init__(self, training: Training, root: Path) -> None:
        self.training, self.root = training, root / "torch"

    def path(self, number: int) -> Path:
        return self.root / str(number)

    def save(self, number: int) -> tuple[float, float]:
        started = time.perf_counter()
        future: Any = dcp.async_save(self._state(), checkpoint_id=self.path(number), no_dist=True)
        stall_seconds = time.perf_counter() - started
        future.result()
        return stall_seconds, time.perf_counter() - started

    def load(self, number: int) -> float:
        started = time.perf_counter()
        state = self._state()
        dcp.load(state, checkpoint_id=self.path(number), no_dist=True)
        set_state_dict(
            self.training.gpt2,
            self.training.optimizer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return time.perf_counter() - started

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.gpt2, self.training.optimizer.optimizer)
        return {"model": model, "optimizer": optimizer}


def _tokenizer(vocabulary: int) -> Any:
    """Some tokenizer of that size; a checkpoint holds one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"word{number}": number for number in range(vocabulary)}, unk_token="word0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="word0")
