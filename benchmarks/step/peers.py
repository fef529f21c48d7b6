"""The peers, each with the loop that its documentation shows. None is changed; their log lines are switched off.

All have the same text, in the same order, no dropout, fp32, AdamW with the same betas, and clip the gradient's norm at 1. The
docstring of each says what is left as it comes.
"""

from __future__ import annotations

import importlib
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.step.turns import Setting, Turns

RATE, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0
UPDATES, WARMUP = 100_000, 10


class Blocks(Dataset[Any]):
    """The blocks as a map-style data set, as transformers wants them: the model itself shifts the labels.

    It has as many inputs as the others, so one target less in each block.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __len__(self) -> int:
        return self.setting.blocks * UPDATES

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.setting.block(number)[:-1])
        return {"input_ids": tokens, "labels": tokens}


class RawBlocks(Blocks):
    """The blocks themselves, int64 [sequence_length + 1]."""

    def __getitem__(self, number: int) -> Any:
        return torch.from_numpy(self.setting.block(number))


def gpt2(setting: Setting, turns: Turns) -> Any:
    """transformers' GPT-2 as it comes: gelu_new, SDPA, all logits at once; only dropout and cache are off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    changes = {"n_positions": setting.sequence_length, "use_cache": False}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**setting.shape, **changes, **dropout, bos_token_id=0, eos_token_id=0))
    count_parameters(model, turns)
    return model


def count_parameters(model: torch.nn.Module, turns: Turns) -> None:
    """For the table: peers' models should be as large as ours."""
    turns.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())


def trainer(setting: Setting, turns: Turns) -> None:
    """`transformers.Trainer`, its defaults but for what the comparison fixes (its AdamW is the fused one)."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.tick()

    arguments = TrainingArguments(
        tempfile.mkdtemp(prefix="benchmark-step-"),
        max_steps=UPDATES,
        per_device_train_batch_size=setting.micro_batch_size,
        gradient_accumulation_steps=setting.steps,
        learning_rate=RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        train_sampling_strategy="sequential",
        use_cpu=True,
        torch_compile=setting.compile,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(gpt2(setting, turns), arguments, train_dataset=Blocks(setting), callbacks=[Ticks()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def accelerate(setting: Setting, turns: Turns, **optimizer_options: Any) -> None:
    """The loop of accelerate's guides on gradient accumulation and clipping, everything prepared; AdamW as it comes."""
    from accelerate import Accelerator
    from transformers import get_cosine_schedule_with_warmup

    accelerator = Accelerator(gradient_accumulation_steps=setting.steps, cpu=True)
    model = gpt2(setting, turns)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, **optimizer_options)
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP, UPDATES)
    loader = DataLoader(Blocks(setting), batch_size=setting.micro_batch_size)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            turns.tick()


accelerate_fused = partial(accelerate, fused=True)  # AdamW's fused kernel


def nanogpt(setting: Setting, turns: Turns, is_fused: bool = False) -> None:
    """nanoGPT's model, `configure_optimizers` and the steps of its train.py; without CUDA its AdamW is not the fused one.

    Each batch is fetched while the one before is computed, and the gradient is clipped.
    """
    if not setting.nanogpt:
        raise ImportError("nanoGPT is no package: give its model.py with --nanogpt")
    sys.path.append(str(Path(setting.nanogpt).parent))
    module = importlib.import_module(Path(setting.nanogpt).stem)
    torch.manual_seed(0)
    sizes = module.GPTConfig(**setting.shape, block_size=setting.sequence_length, dropout=0.0, bias=True)
    model: Any = module.GPT(sizes)
    count_parameters(model, turns)
    optimizer = model.configure_optimizers(DECAY, RATE, BETAS, "cpu")
    if is_fused:  # over the same groups
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=RATE, betas=BETAS, fused=True)
    if setting.compile:
        model = torch.compile(model)
    fetched = 0

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal fetched
        rows = [setting.block(fetched + row) for row in range(setting.micro_batch_size)]
        fetched += setting.micro_batch_size
        tokens = torch.from_numpy(np.stack(rows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    inputs, targets = get_batch()
    for update in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = _cosine(update)
        for _ in range(setting.steps):
            _, loss = model(inputs, targets)
            loss = loss / setting.steps
            inputs, targets = get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.tick()


nanogpt_fused = partial(nanogpt, is_fused=True)


def litgpt(setting: Setting, turns: Turns) -> None:
    """litgpt's `fit`, the loop of its `pretrain`, over its GPT with the same sizes and a tied output layer.

    It has rotary positions, and the fused AdamW, which `pretrain` would take on CUDA only. `pretrain` always compiles.
    """
    from lightning.fabric import Fabric  # type: ignore[import-not-found]
    from litgpt.args import EvalArgs, TrainArgs  # type: ignore[import-not-found]
    from litgpt.config import Config  # type: ignore[import-not-found]
    from litgpt.model import GPT  # type: ignore[import-not-found]
    from litgpt.pretrain import fit, initialize_weights  # type: ignore[import-not-found]

    class Ticking(RawBlocks):
        """The loop asks for a batch when it is done with the one before."""

        def __getitem__(self, number: int) -> Any:
            if number and number % setting.blocks == 0:
                turns.tick()
            return super().__getitem__(number)

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    config = Config(
        name="GPT-2's sizes",
        block_size=setting.sequence_length,
        padded_vocab_size=setting.vocab_size,
        **setting.shape,
        intermediate_size=4 * setting.n_embd,
        bias=True,
        lm_head_bias=False,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        parallel_residual=False,
        gelu_approximate="tanh",
        rotary_percentage=1.0,
    )
    with fabric.init_module(empty_init=True):
        model: Any = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = setting.sequence_length
    count_parameters(model, turns)
    if setting.compile:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    data = [DataLoader(blocks, setting.micro_batch_size) for blocks in (Ticking(setting), RawBlocks(setting))]
    training, held_out = fabric.setup_dataloaders(*data)
    train = TrainArgs(
        save_interval=None,
        log_interval=UPDATES,
        global_batch_size=setting.blocks,
        micro_batch_size=setting.micro_batch_size,
        lr_warmup_steps=WARMUP,
        max_tokens=UPDATES * setting.tokens,
        max_norm=CLIP,
        tie_embeddings=True,
    )
    fit(
        fabric=fabric,
        devices=1,
        state={"model": model, "optimizer": fabric.setup_optimizers(optimizer), "iter_num": 0, "step_count": 0},
        train_dataloader=training,
        val_dataloader=held_out,
        out_dir=Path(tempfile.mkdtemp(prefix="benchmark-step-")),
        tokenizer_dir=None,
        train=train,
        eval=EvalArgs(interval=UPDATES, max_iters=1, final_validation=False),
    )


def _cosine(update: int) -> float:
    if update < WARMUP:
        return RATE * (update + 1) / WARMUP
    return RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * update / UPDATES)))
