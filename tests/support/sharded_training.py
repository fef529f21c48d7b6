"""Updates of random tokens on ranks that may hold a model together, for what is measured of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from recipe.config.settings import Config
from recipe.data.blocks import split_into_micro_batches, to_tensors
from recipe.model.gpt2 import build_gpt2
from recipe.model.optimizer import build_optimizer
from recipe.model.sharding import prepare_model
from recipe.run.run import Run
from recipe.step.update import run_update
from tests.support.gradients import make_accelerator
from tests.support.runs import make_run


def sharded_training(config: Config) -> tuple[Run, Any, Any, Callable[[], None]]:
    """A run of `config` on this launch's ranks, its model, its optimizer, and what does one update."""
    accelerator = make_accelerator()
    run = make_run(config, accelerator)
    run.stop.connect(accelerator.num_processes)
    plan, vocabulary = run.plan.update, config.model.vocab_size - 47
    model = prepare_model(run, build_gpt2(config, vocabulary, 0)).train()
    optimizer = accelerator.prepare(build_optimizer(model, config.optimizer))

    def update() -> None:
        blocks = np.random.randint(vocabulary, size=(len(plan.blocks_of_rank(run.rank)), plan.sequence_length + 1))
        batch = to_tensors(blocks, run.device, model.document_start)
        run_update(run, model, optimizer, split_into_micro_batches(batch, plan, run.rank))

    return run, model, optimizer, update
