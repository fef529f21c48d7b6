"""Three updates with bf16 state on every rank, and whether all ranks then hold the same bits; writes RESULT."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object

from recipe.config.settings import BatchConfig, Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from recipe.data.blocks import split_into_micro_batches, to_tensors
from recipe.errors import run_command
from recipe.model.gpt2 import build_gpt2
from recipe.model.optimizer import build_optimizer, seed_dropout
from recipe.step.update import run_update
from tests.support.gradients import LENGTH, VOCABULARY, make_blocks
from tests.support.runs import make_run


def main() -> None:
    """Write the hash of the parameters of each rank, and the bytes of each kind of state per parameter."""
    plugin = GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False)
    accelerator: Any = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_plugin=plugin)
    shape = ModelConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=320, n_positions=LENGTH)
    batch = BatchConfig(tokens_per_update=8 * LENGTH, lanes=8, micro_batch_size=2)
    data, optimizer_config = DataConfig(sequence_length=LENGTH), OptimizerConfig(state="bf16")
    schedule = ScheduleConfig(warmup_tokens=0)
    config = Config(batch=batch, data=data, model=shape, optimizer=optimizer_config, schedule=schedule)
    plain = build_gpt2(config, VOCABULARY, 0)
    model, optimizer = accelerator.prepare(plain, build_optimizer(plain, config.optimizer, seed=5))
    run = make_run(config, accelerator)
    plan = run.plan.update
    held = plan.blocks_of_rank(run.rank)
    blocks = to_tensors(make_blocks(8)[held.start : held.stop], torch.device("cpu"))
    for update in range(1, 4):
        seed_dropout(5, update, run.rank)  # as in a run: another seed on each rank
        run_update(run, model, optimizer, split_into_micro_batches(blocks, plan, run.rank), plan.tokens_per_update)
    parameters = list(plain.parameters())
    digest = sha256(b"".join(p.detach().view(torch.int16).numpy().tobytes() for p in parameters)).hexdigest()
    model(*(tokens[:1] for tokens in blocks)).backward()
    count = sum(p.numel() for p in parameters)
    bytes_per_parameter = {
        "parameters": sum(p.nbytes for p in parameters) / count,
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None) / count,
        "moments": sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")) / count,
    }
    digests = gather_object([digest])
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps({"digests": digests, **bytes_per_parameter}), encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
