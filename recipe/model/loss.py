"""From hidden states to the summed token loss, without ever holding all logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recipe.data.blocks import IGNORED_TARGET
from recipe.plan.memory import rows_per_chunk

Matmul = Callable[[Tensor, Tensor], Tensor]


def summed_token_loss(
    hidden: Tensor, embedding: Tensor, targets: Tensor, vocabulary: int, matmul: Matmul = torch.mm
) -> Tensor:
    """Sum of -log p(target) over the unmasked targets, in nats.

    Forward computes the logits of a chunk of rows and turns them into their own gradient. So no logits outlive their chunk, and
    backward only multiplies by the incoming scalar. Under autocast products round as in `F.linear`; sums stay float32.

    Args:
        hidden: [..., width], last hidden states.
        embedding: [rows, width], the tied output layer; rows from `vocabulary` on are padding and get probability 0.
        targets: [...], int64, `IGNORED_TARGET` if masked.
        vocabulary: number of tokens the tokenizer has.
        matmul: computes all products.

    Returns: 0-d tensor, float32, or float64 for float64 hidden states.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if not torch.is_grad_enabled():  # autograd tells the function only whether its inputs require a gradient
        hidden, embedding = hidden.detach(), embedding.detach()
    loss: Tensor = _SummedTokenLoss.apply(hidden, embedding, targets, vocabulary, matmul)
    return loss


class _SummedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, vocabulary: int, matmul: Matmul
    ) -> Tensor:
        device, size = hidden.device.type, rows_per_chunk(hidden.device.type)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        weight, loss = embedding.to(dtype), hidden.new_zeros((), dtype=sum_dtype)
        if needs_gradient := any(ctx.needs_input_grad):
            of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(embedding, dtype=sum_dtype)
        for start in range(0, len(hidden), size):
            rows, labels = hidden[start : start + size].to(dtype), targets[start : start + size, None]
            is_masked = labels == IGNORED_TARGET
            index = labels.masked_fill(is_masked, 0)
            logits = matmul(rows, weight.t()).to(sum_dtype)
            logits[:, vocabulary:].fill_(float("-inf"))
            logits -= logits.amax(1, keepdim=True)
            of_targets = logits.gather(1, index)
            total = logits.exp_().sum(1, keepdim=True)
            # Not in place: compiled by torch 2.11, no gradient would pass such an output.
            loss = loss + (total.log() - of_targets).masked_fill(is_masked, 0).sum()
            if needs_gradient:
                logits /= total.masked_fill(is_masked, float("inf"))  # softmax, or 0 if masked
                if torch.compiler.is_compiling():  # in one pass, where scatter_ would copy
                    is_target = torch.arange(len(embedding), device=hidden.device) == labels
                    logits = torch.where(is_target, logits - 1, logits)
                else:
                    logits.scatter_(1, index, (logits.gather(1, index) - 1).masked_fill(is_masked, 0))
                logits = logits.to(dtype)  # now their own gradient
                of_hidden[start : start + size] = matmul(logits, weight)
                if matmul is torch.mm:
                    _add_product(of_weight, logits.t(), rows)
                else:
                    of_weight += matmul(logits.t(), rows)
            del logits  # before those of the next chunk are there
        if needs_gradient:
            ctx.save_for_backward(of_hidden, of_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        # In place, unless the caller keeps the graph for another backward. A compiler finds out by itself.
        in_place = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = [gradient.mul_(scale) if in_place else gradient * scale for gradient in ctx.saved_tensors]
        return *scaled, None, None, None


# An operator of its own, because torch's compiler would otherwise keep the products of all chunks and add them at the end.
@torch.library.custom_op("recipe::add_product", mutates_args=("total",))
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
