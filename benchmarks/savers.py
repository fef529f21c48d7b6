"""Four ways to save and bring back one training: this recipe's, accelerate's, Trainer's, and torch's asynchronous one."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.results import timed
from benchmarks.training import Training, read_preset, with_settings
from recipe.checkpoint import CheckpointSaver, restore
from recipe.checkpoint.resume import find_resume_point

UPDATE_TOKENS = 128  # of the updates during which a checkpoint is written: one short block each


class SavedTraining(Training):
    """One model and one optimizer with its moments, which every way saves and brings back.

    Args:
        preset: of the model.
        settings: what is not as in the preset.
        directory: of the run.
    """

    def __init__(self, preset: str, settings: Mapping[str, Any], directory: Path) -> None:
        config = read_preset(preset, settings)
        changes = {
            "run.directory": str(directory),
            "precision": "fp32",
            "model.n_positions": config.n_positions,
            "data.sequence_length": UPDATE_TOKENS,
            "batch.tokens_per_update": UPDATE_TOKENS,
            "batch.lanes": 1,
            "performance.compile": False,
            "checkpoint.every_tokens": 1,
        }
        super().__init__(with_settings(config, changes), config.model.vocab_size)  # no padding: all save the same bytes
        self.run.console.enabled = False
        self.gpt2: Any = self.run.accelerator.unwrap_model(self.model).gpt2
        self.blocks, self.entry = self.update()

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


class Way:
    """One way to save a training, any number of times, in directories below `root`.

    `save` gives (seconds that training stands still, seconds until the way says that the checkpoint is written), `load` the
    seconds from a model that is built until the next update could begin.
    """

    name: str

    def __init__(self, training: SavedTraining, root: Path) -> None:
        self.training, self.root = training, root / self.name
        self.optimizer: torch.optim.Optimizer = training.optimizer.optimizer

    def path(self, number: int) -> Path:
        """Final name of checkpoint `number`."""
        return self.root / str(number)


class Ours(Way):
    """`recipe.checkpoint`, as `recipe/train.py` calls it."""

    name = "this recipe"

    def __init__(self, training: SavedTraining, root: Path) -> None:
        super().__init__(training, root)
        parts = training.run, training.model, training.optimizer, training.tokenizer
        self.saver = CheckpointSaver(*parts, on_saved=lambda *_: None)

    def path(self, number: int) -> Path:
        return self.saver.root / f"step-{number:06d}"

    def begin(self, number: int) -> float:
        """Seconds that training stands still; the checkpoint is then written in the background."""
        entry = replace(self.training.entry, update=number)
        return timed(lambda: self.saver.finish_update(entry, self.training.blocks, []))

    def save(self, number: int) -> tuple[float, float]:
        stall_seconds = self.begin(number)
        return stall_seconds, stall_seconds + timed(self.saver.finish)

    def load(self, number: int) -> float:
        training = self.training

        def resume() -> None:
            point = find_resume_point(training.run.config)
            assert point.update == number, point
            restore(training.run, point, training.model, training.optimizer, training.make_lanes())

        return timed(resume)


class Accelerate(Way):
    """`save_state` and `load_state` as they come: the model in safetensors, the rest pickled."""

    name = "accelerate.save_state"

    def save(self, number: int) -> tuple[float, float]:
        seconds = timed(lambda: self.training.run.accelerator.save_state(str(self.path(number))))
        return seconds, seconds

    def load(self, number: int) -> float:
        return timed(lambda: self.training.run.accelerator.load_state(str(self.path(number))))


class HuggingFaceTrainer(Way):
    """A real `transformers.Trainer` over the same model and optimizer, one step and a save; timed by a callback."""

    name = "transformers.Trainer"

    def path(self, number: int) -> Path:
        return self.root / str(number) / "checkpoint-1"

    def save(self, number: int) -> tuple[float, float]:
        times = self._train(number, steps=1)
        seconds = times["saved"] - times["step ends"]
        return seconds, seconds

    def load(self, number: int) -> float:
        """From `train()` to its first step."""
        times = self._train(number, steps=2, checkpoint=str(self.path(number)))
        return times["step begins"] - times["start"]

    def _train(self, number: int, steps: int, checkpoint: str | None = None) -> dict[str, float]:
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        times: dict[str, float] = {}

        class Stopwatch(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                times["step begins"] = time.perf_counter()
                if checkpoint:
                    raise InterruptedError  # before the step changes what was loaded

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times["step ends"] = time.perf_counter()

            def on_save(self, *_: Any, **__: Any) -> None:
                times["saved"] = time.perf_counter()

        arguments = TrainingArguments(
            str(self.path(number).parent),
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=1,
            use_cpu=self.training.run.device.type == "cpu",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data: Any = [dict.fromkeys(("input_ids", "labels"), torch.arange(32))] * 8
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        optimizers, callbacks = (self.optimizer, schedule), [Stopwatch()]
        trainer = Trainer(self.training.gpt2, arguments, train_dataset=data, optimizers=optimizers, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        times["start"] = time.perf_counter()
        with suppress(InterruptedError):
            trainer.train(resume_from_checkpoint=checkpoint)
        return times


class TorchAsync(Way):
    """`torch.distributed.checkpoint.async_save` as it comes."""

    name = "torch async_save"

    def save(self, number: int) -> tuple[float, float]:
        started = time.perf_counter()
        future: Any = dcp.async_save(self._state(), checkpoint_id=self.path(number), no_dist=True)
        stall_seconds = time.perf_counter() - started
        return stall_seconds, stall_seconds + timed(future.result)

    def load(self, number: int) -> float:
        def resume() -> None:
            state = self._state()
            dcp.load(state, checkpoint_id=self.path(number), no_dist=True)
            parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
            set_state_dict(self.training.gpt2, self.optimizer, **parts)

        return timed(resume)

    def _state(self) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(self.training.gpt2, self.optimizer), strict=True))
