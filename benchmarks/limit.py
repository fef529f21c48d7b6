"""The limit of the machine: the matrix products of an update and nothing else, each by the faster of two libraries.

They are `torch.mm` into memory that is there already, and oneDNN where the recipe can call it; `torch.mm` alone is timed too,
since it is what the peers have.

A linear layer from width k to n over the R tokens of a micro-batch has three products of 2 R k n FLOPs: its output, the
gradient of its input, the gradient of its weight. Attention has six over the T x T pairs of each head, of 2 R T d FLOPs in
all heads together: two forward, four backward. A causal kernel may leave out half of them, and the recipe's does, so half of
their time is counted. What the kernel computes twice, the recipe has to pay for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.worker import Setting, Turns
from recipe.config.settings import PerformanceConfig
from recipe.model.onednn import choose_matmul, onednn_matmul


def linear_layers(setting: Setting) -> list[tuple[int, int, int]]:
    """(how many, inputs, outputs) of the kinds of linear layer; the output layer is the embedding, transposed."""
    width = setting.n_embd
    layers = setting.n_layer
    return [
        (layers, width, 3 * width),
        (layers, width, width),
        (layers, width, 4 * width),
        (layers, 4 * width, width),
        (1, width, setting.vocabulary),
    ]


def linear_flops(setting: Setting) -> int:
    """Of the linear layers in an update, forward and backward."""
    return sum(6 * setting.tokens * count * inputs * outputs for count, inputs, outputs in linear_layers(setting))


def attention_flops(setting: Setting) -> int:
    """Of attention in an update, forward and backward, over all pairs of tokens."""
    return 12 * setting.tokens * setting.n_layer * setting.n_embd * setting.sequence_length


def matrix_products(setting: Setting, turns: Turns) -> None:
    """The products of an update in each turn; the parts are `linear`, `linear by torch.mm` and `attention`, over all pairs."""
    rows, heads = setting.micro_batch_size * setting.sequence_length, setting.micro_batch_size * setting.n_head
    linear = [(count, _linear(rows, inputs, outputs)) for count, inputs, outputs in linear_layers(setting)]
    pairs = _attention(heads, setting.sequence_length, setting.n_embd // setting.n_head)
    while True:
        seconds = {"linear": 0.0, "linear by torch.mm": 0.0, "attention": 0.0}
        for _ in range(setting.steps):
            for count, products in linear:
                for libraries in products:
                    by_library = [_seconds(product, count) for product in libraries]
                    seconds["linear by torch.mm"] += by_library[0]
                    seconds["linear"] += min(by_library)
            started = time.perf_counter()
            for _ in range(setting.n_layer):
                pairs()
            seconds["attention"] += time.perf_counter() - started
        turns.tick(parts=seconds)


def _linear(rows: int, inputs: int, outputs: int) -> list[list[Callable[[], torch.Tensor]]]:
    """The products of one layer, each by torch and, if it is there, by oneDNN; a weight is [inputs, outputs], as GPT-2's."""
    x, y, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(inputs, outputs)
    to_y, to_x, to_weight = torch.empty_like(y), torch.empty_like(x), torch.empty_like(weight)
    by_torch: list[Callable[[], torch.Tensor]] = [
        lambda: torch.mm(x, weight, out=to_y),
        lambda: torch.mm(y, weight.T, out=to_x),
        lambda: torch.mm(x.T, y, out=to_weight),
    ]
    if choose_matmul(PerformanceConfig(), "cpu", "fp32") == "torch":
        return [[product] for product in by_torch]
    by_onednn: list[Callable[[], torch.Tensor]] = [
        lambda: onednn_matmul(x, weight),
        lambda: onednn_matmul(y, weight.T),
        lambda: onednn_matmul(x.T, y),
    ]
    return [list(pair) for pair in zip(by_torch, by_onednn, strict=True)]


def _seconds(action: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        action()
    return time.perf_counter() - started


def _attention(heads: int, tokens: int, width: int) -> Callable[[], None]:
    """The products of one layer: scores, output; gradients of the weights and of values, queries and keys."""
    query, to_query = torch.randn(heads, tokens, width), torch.empty(heads, tokens, width)
    weights, to_weights = torch.randn(heads, tokens, tokens), torch.empty(heads, tokens, tokens)

    def products() -> None:
        for _ in range(2):
            torch.bmm(query, query.mT, out=to_weights)
        for _ in range(2):
            torch.bmm(weights, query, out=to_query)
            torch.bmm(weights.mT, query, out=to_query)

    return products
