"""From hidden states to the summed token loss, without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recipe.data.blocks import IGNORED_TARGET
from recipe.plan.memory import ROWS_PER_CHUNK, LossMethod


def summed_token_loss(
    hidden: Tensor, embedding: Tensor, targets: Tensor, vocabulary: int, method: LossMethod = "chunked"
) -> Tensor:
    """Sum of -log p(target) over the unmasked targets, in nats.

    Args:
        hidden: [..., width], last hidden states.
        embedding: [rows, width], the tied output layer; rows from `vocabulary` on are padding and get probability 0.
        targets: [...], int64, `IGNORED_TARGET` where masked.
        vocabulary: number of tokens the tokenizer has.
        method: see `performance.loss`; `recipe.plan.memory.choose_loss` picks one.

    Returns: 0-d tensor, float32, or float64 for float64 hidden states.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    is_padding = torch.arange(len(embedding), device=hidden.device) >= vocabulary
    bias = torch.zeros(len(embedding), device=hidden.device, dtype=hidden.dtype).masked_fill(is_padding, float("-inf"))
    if method == "chunked":
        return _chunked(hidden, embedding, targets, bias)
    if method == "plain":
        return _plain(hidden, embedding, targets, bias)
    if method == "liger":
        return _liger(hidden, embedding, targets, bias)
    return F.linear_cross_entropy(
        hidden,
        embedding,
        targets,
        linear_bias=bias,
        reduction="sum",
        ignore_index=IGNORED_TARGET,
        options=torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=min(len(hidden), ROWS_PER_CHUNK["linear_cross_entropy"]),
            chunking_method=None,
            allow_retain_graph=torch.compiler.is_compiling(),  # it has to be there, and warns where it is not
        ),
    )


def _chunked(hidden: Tensor, embedding: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    """Chunks of rows are computed again in backward, so that logits exist for one chunk at a time."""
    rows_per_chunk = ROWS_PER_CHUNK["chunked"]
    chunks = list(zip(hidden.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        losses = [_plain(rows, embedding, labels, bias) for rows, labels in chunks]
    else:
        losses = [
            checkpoint(_plain, rows, embedding, labels, bias, use_reentrant=False, preserve_rng_state=False)
            for rows, labels in chunks
        ]
    return torch.stack(losses).sum()


def _plain(hidden: Tensor, embedding: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    logits = F.linear(hidden, embedding, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")


def _liger(hidden: Tensor, embedding: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    """Liger's kernel has no autocast rule of its own: its inputs are rounded here as `F.linear` would round them."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, embedding, bias = hidden.to(dtype), embedding.to(dtype), bias.to(dtype)
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED_TARGET, reduction="sum", accum_dtype=torch.float32)
    return fused(embedding, hidden, targets, bias)
