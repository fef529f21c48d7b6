"""The peers, each with the loop that its documentation shows. None is changed; each is told to be quiet.

All have the same text, in the same order, no dropout, fp32, AdamW with the same betas, and clip the gradient's norm at 1. What
is left as it comes is said with each of them.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.worker import Setting, Turns

RATE, BETAS, DECAY, CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0
UPDATES, WARMUP = 100_000, 10


class Blocks(Dataset[Any]):
    """The blocks as a map-style data set, as transformers wants them: the model itself shifts the labels.

    It is given as many inputs as the others, so it has one target less in each block.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def __len__(self) -> int:
        return self.setting.blocks * UPDATES

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.setting.block(number)[:-1].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


class RawBlocks(Blocks):
    """The blocks themselves, int64 [sequence_length + 1]."""

    def __getitem__(self, number: int) -> Any:
        return torch.from_numpy(self.setting.block(number).astype(np.int64))


def gpt2(setting: Setting, turns: Turns) -> Any:
    """transformers' GPT-2 as it comes: gelu_new, SDPA, all logits at once; only dropout and cache are switched off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=setting.vocabulary,
            n_positions=setting.sequence_length,
            n_embd=setting.n_embd,
            n_layer=setting.n_layer,
            n_head=setting.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )
    turns.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return model


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
    turns.facts["optimizer"] = arguments.optim.value
    trainer = Trainer(gpt2(setting, turns), arguments, train_dataset=Blocks(setting), callbacks=[Ticks()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def accelerate(setting: Setting, turns: Turns) -> None:
    """The loop of accelerate's guides on gradient accumulation and clipping, everything prepared; AdamW as it comes."""
    _accelerate(setting, turns, {})


def accelerate_fused(setting: Setting, turns: Turns) -> None:
    """The same with AdamW's fused kernel, which is one argument."""
    _accelerate(setting, turns, {"fused": True})


def _accelerate(setting: Setting, turns: Turns, options: dict[str, Any]) -> None:
    from accelerate import Accelerator
    from transformers import get_cosine_schedule_with_warmup

    accelerator = Accelerator(gradient_accumulation_steps=setting.steps, cpu=True)
    model = gpt2(setting, turns)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, **options)
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


def nanogpt(setting: Setting, turns: Turns) -> None:
    """nanoGPT's model and `configure_optimizers` as they come; without CUDA its AdamW is not the fused one."""
    _nanogpt(setting, turns)


def nanogpt_fused(setting: Setting, turns: Turns) -> None:
    """The same with AdamW's fused kernel over the same groups."""
    _nanogpt(setting, turns, is_fused=True)


def _nanogpt(setting: Setting, turns: Turns, is_fused: bool = False) -> None:
    """The steps of nanoGPT's train.py: each batch is fetched while the one before is computed, the gradient clipped."""
    if not setting.nanogpt:
        raise ImportError("nanoGPT is no package: give its model.py with --nanogpt")
    specification = importlib.util.spec_from_file_location("nanogpt_model", setting.nanogpt)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look there
    specification.loader.exec_module(module)
    torch.manual_seed(0)
    model: Any = module.GPT(
        module.GPTConfig(
            block_size=setting.sequence_length,
            vocab_size=setting.vocabulary,
            n_layer=setting.n_layer,
            n_head=setting.n_head,
            n_embd=setting.n_embd,
            dropout=0.0,
            bias=True,
        )
    )
    turns.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    optimizer = model.configure_optimizers(DECAY, RATE, BETAS, "cpu")
    if is_fused:
        optimizer = torch.optim.AdamW(optimizer.param_groups, lr=RATE, betas=BETAS, fused=True)
    if setting.compile:
        model = torch.compile(model)
    context, fetched = nullcontext(), 0

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal fetched
        rows = [setting.block(fetched + row).astype(np.int64) for row in range(setting.micro_batch_size)]
        fetched += setting.micro_batch_size
        tokens = torch.from_numpy(np.stack(rows))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    inputs, targets = get_batch()
    for update in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = _cosine(update)
        for _ in range(setting.steps):
            with context:
                _, loss = model(inputs, targets)
                loss = loss / setting.steps
            inputs, targets = get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.tick()


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
        vocab_size=setting.vocabulary,
        padded_vocab_size=setting.vocabulary,
        n_layer=setting.n_layer,
        n_head=setting.n_head,
        n_embd=setting.n_embd,
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
    turns.facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if setting.compile:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    state = {"model": model, "optimizer": fabric.setup_optimizers(optimizer), "iter_num": 0, "step_count": 0}
    loader = fabric.setup_dataloaders(DataLoader(Ticking(setting), batch_size=setting.micro_batch_size))
    held_out = fabric.setup_dataloaders(DataLoader(RawBlocks(setting), batch_size=setting.micro_batch_size))
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
        state=state,
        train_dataloader=loader,
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
