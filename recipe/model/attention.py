"""Causal attention: over a whole block, or inside each of its documents."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from recipe.plan.memory import takes_ranges

# transformers makes no mask for an attention it does not know. For its own "sdpa" it looks on the host, in every forward,
# whether the position ids restart: a device synchronisation per micro-batch, and under torch.compile a dense mask that
# loses the flash kernel. Our blocks are causal, and what else they are the attention is told: see `inside_documents`.
CAUSAL_ATTENTION = "causal_sdpa"


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention of [batch, heads, tokens, head width]; returns [batch, tokens, heads, head width], no weights.

    A single query token with a cache sees all keys. Padding is not supported.
    """
    tokens, scale = query.shape[2], options.get("scaling")
    assert tokens in (1, key.shape[2]), (query.shape, key.shape)
    ranges = options.get("ranges")
    if ranges is not None:
        query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        output = varlen_attn(query, key, value, ranges, ranges, tokens, tokens, scale=scale, window_size=(-1, 0))
        assert isinstance(output, Tensor)  # alone, if no log-sum-exp is asked for
        return output.unflatten(0, (-1, tokens)), None
    is_causal, dropout = attention_mask is None and tokens > 1, options.get("dropout", 0.0)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=is_causal, dropout_p=dropout, scale=scale
    )
    return output.transpose(1, 2).contiguous(), None


def inside_documents(gpt2: Any, starts: Tensor, tokens: int) -> dict[str, Tensor]:
    """What GPT-2's transformer has to be given so that attention stays inside documents and positions begin anew with each.

    On CUDA in bf16 that are the documents' ranges, for a kernel that takes them; elsewhere a mask, made once for all layers.
    Nothing of it waits for the device, and all shapes are those of `starts`.

    `starts` are those of `recipe.data.blocks.document_starts`, for rows of `tokens` tokens.
    """
    weight, model = gpt2.transformer.wte.weight, gpt2.config
    kind, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    place = torch.arange(tokens, device=starts.device)
    document = (starts[:, :, None] <= place).sum(dim=1) - 1  # of each token, in its row
    positions = place - starts.gather(1, document)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    dropout = model.attn_pdrop if gpt2.training else 0.0
    is_ours = model._attn_implementation == CAUSAL_ATTENTION  # others know no ranges, but every one knows a mask
    if is_ours and takes_ranges(kind, precision, dropout, model.n_embd // model.n_head):
        return {"position_ids": positions, "ranges": document_ranges(starts, tokens)}
    # Numbers: of a mask of booleans SDPA makes one of numbers in each layer, and keeps it for backward.
    mask = document_mask(document).logical_not()
    return {
        "position_ids": positions,
        "attention_mask": torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf),
    }


def document_mask(document: Tensor) -> Tensor:
    """Which tokens see which, bool [rows, 1, tokens, tokens]: those before them of the same number in `document`."""
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def document_ranges(starts: Tensor, tokens: int) -> Tensor:
    """Where each document begins in the tokens of all rows, one after the other, and the end of the last: int32.

    The places that `starts` does not need become ranges of no token at the end of a row.
    """
    row = torch.arange(len(starts), device=starts.device)[:, None] * tokens
    begins = (row + starts.clamp(max=tokens)).flatten()
    return F.pad(begins, (0, 1), value=len(starts) * tokens).to(torch.int32)
