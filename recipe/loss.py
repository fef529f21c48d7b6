"""From hidden states to the summed token loss, without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_TARGET = -100
# Rows of logits alive at once: 2,048 x 50,304 in fp32 are 412 MB, and as much again for their gradient.
ROWS_PER_CHUNK = 2048


def summed_token_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Sum of -log p(target) over the unmasked targets, in nats.

    Chunks of rows are recomputed in backward, so that logits exist for one chunk at a time.

    Args:
        hidden: [..., width], last hidden states.
        embedding: [rows, width], the tied output layer; rows from `vocabulary` on are padding and get probability 0.
        targets: [...], int64, `IGNORED_TARGET` where masked.
        vocabulary: number of tokens the tokenizer has.

    Returns: 0-d tensor, float32, or float64 for float64 hidden states.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    chunks = list(zip(hidden.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        losses = [_chunk_loss(rows, embedding, labels, vocabulary) for rows, labels in chunks]
    else:
        losses = [
            checkpoint(_chunk_loss, rows, embedding, labels, vocabulary, use_reentrant=False, preserve_rng_state=False)
            for rows, labels in chunks
        ]
    return torch.stack(losses).sum()


def _chunk_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    logits = F.linear(hidden, embedding)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if vocabulary < len(embedding):
        logits[:, vocabulary:] = float("-inf")
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
