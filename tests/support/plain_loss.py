"""The token loss from all logits at once: what the recipe's loss has to be equal to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.model.loss import IGNORED_TARGET


def plain_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Arguments and result as of `recipe.model.loss.summed_token_loss`."""
    logits = F.linear(hidden, embedding).flatten(0, -2)[:, :vocabulary]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")
