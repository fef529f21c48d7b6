"""Loss, perplexity and bits per byte of a model on text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recipe.data.blocks import PADDING, to_tensors
from recipe.data.validation import ValidationSet
from recipe.model.kernels import eager
from recipe.model.sharding import is_sharded, reshard
from recipe.run.stop import StopRequest


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a validation set."""

    loss: float  # mean over the targets, in nats per token
    # Total bits over the UTF-8 bytes of the text; comparable between tokenizers. None if the tokenizer does not keep the text
    bits_per_byte: float | None
    tokens: int  # targets
    text_bytes: int  # UTF-8 bytes

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        nats = f"{self.loss:.4f} nats per token"
        return nats if self.bits_per_byte is None else f"{nats}, {self.bits_per_byte:.4f} bits per byte"


def mean_by_weight(parts: Sequence[tuple[Evaluation, float]]) -> Evaluation:
    """Of text that is mixed of several, whose weights are those of its tokens."""
    total = sum(weight for _, weight in parts)
    loss = sum(part.loss * weight for part, weight in parts) / total
    bytes_per_token = sum(part.text_bytes / part.tokens * weight for part, weight in parts) / total
    has_bits = all(part.bits_per_byte is not None for part, _ in parts)
    bits_per_byte = loss / math.log(2) / bytes_per_token if has_bits else None
    tokens, text_bytes = (sum(getattr(part, name) for part, _ in parts) for name in ("tokens", "text_bytes"))
    return Evaluation(loss, bits_per_byte, tokens, text_bytes)


def evaluate(model: Any, validation: ValidationSet, accelerator: Any, batch_size: int, stop: StopRequest) -> Evaluation:
    """Evaluate on all ranks, each with its share of the blocks. Collective.

    The model is prepared, and gets its train or eval mode back. `batch_size` blocks are in one forward.

    Raises:
        Stopped: a rank was asked to stop meanwhile.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    blocks = validation.blocks
    share = blocks[len(blocks) * rank // ranks : len(blocks) * (rank + 1) // ranks]
    plain = accelerator.unwrap_model(model)  # keeps autocast, leaves DDP: ranks may hold unequal numbers of blocks
    was_training = plain.training
    plain.eval()
    losses, cut = [], is_sharded(plain)
    count = -(-len(blocks) // ranks) if cut else len(share)  # all ranks forward as often
    masked = np.full_like(blocks[:1], PADDING)
    with torch.no_grad(), eager(plain):
        for first in range(0, count, batch_size):
            if stop.signal and not cut:
                break
            held = share[first : first + batch_size]
            batch = to_tensors(held if len(held) else masked, accelerator.device, plain.document_start)
            losses.append(plain(*batch).float())
    reshard(plain)
    plain.train(was_training)
    stop.agree()
    local = torch.stack(losses).sum() if losses else torch.zeros((), device=accelerator.device)
    nats = float(accelerator.reduce(local, reduction="sum"))
    return Evaluation(
        loss=nats / validation.tokens,
        bits_per_byte=nats / math.log(2) / validation.text_bytes if validation.is_exact else None,
        tokens=validation.tokens,
        text_bytes=validation.text_bytes,
    )
