"""The loss in chunks is the loss of all logits at once: value and gradients, in every way that a step computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.allocator import allocator_peak
from recipe.model.loss import IGNORED_TARGET, summed_token_loss
from recipe.plan.memory import rows_per_chunk
from tests.support.plain_loss import plain_loss

WIDTH, ROWS, VOCABULARY = 16, 40, 33  # of the embedding: 7 rows are padding
CHUNK = rows_per_chunk("cpu")
SCALE = torch.tensor(0.37, dtype=torch.float64)
Inputs = tuple[Tensor, Tensor, Tensor, int]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.fixture
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.model.loss.rows_per_chunk", lambda device_type: 3)


def inputs_of(tokens: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Hidden states, embedding, targets of which a third is masked, vocabulary."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    embedding = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    targets[::3] = IGNORED_TARGET
    return hidden, embedding, targets, VOCABULARY


def loss_and_gradients(loss: Callable[..., Tensor], inputs: Inputs, scale: Tensor | float = 1.0) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value * scale, inputs[:2])]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in the 2-norm."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


class _Seen(TorchDispatchMode):
    """Notes what every operation gives, and the dtypes that products take."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(result.shape)} if isinstance(result, Tensor) else set()
        if func in (torch.ops.aten.mm.default, torch.ops.recipe.add_product.default):
            self.products.append(args[1].dtype)
        return result


@pytest.mark.parametrize("tokens", [7, CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_loss_and_gradients_are_those_of_all_logits_at_once(tokens: int, dtype: torch.dtype, bound: float) -> None:
    """Also with a gradient that comes in as something else than 1, from float64. Padded rows get no gradient, exactly."""
    inputs = inputs_of(tokens, dtype)
    for scale in (1.0, SCALE):
        ours, theirs = (loss_and_gradients(loss, inputs, scale) for loss in (summed_token_loss, plain_loss))
        assert [tensor.dtype for tensor in ours] == [dtype] * 3
        assert all(difference(a, b) < bound for a, b in zip(ours, theirs, strict=True))
        assert ours[2][VOCABULARY:].abs().max() == 0
        assert ours[1][::3].abs().max() == 0, "of masked targets"


def test_large_logits_do_not_overflow_and_infinite_ones_are_seen() -> None:
    """exp(88) is the last that float32 holds; an update whose loss is not finite is skipped, so it must not become finite."""
    hidden, embedding, targets, vocabulary = inputs_of(8, torch.float32)
    inputs = 1000 * hidden.detach(), embedding, targets, vocabulary
    assert difference(summed_token_loss(*inputs), plain_loss(*inputs)) < 1e-6
    inputs[0][1, 0] = float("inf")
    assert not torch.isfinite(summed_token_loss(*inputs))


@pytest.mark.usefixtures("chunks_of_three")
def test_the_gradient_is_the_derivative() -> None:
    hidden, embedding, targets, vocabulary = inputs_of(8)
    loss = lambda hidden, embedding: summed_token_loss(hidden, embedding, targets, vocabulary)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (hidden, embedding), fast_mode=True)
    value = summed_token_loss(hidden, embedding, targets, vocabulary).square()
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # rather than a second derivative that is wrong
        gradient.sum().backward()


@pytest.mark.usefixtures("chunks_of_three")
def test_a_graph_that_is_kept_can_be_used_twice() -> None:
    """A backward that is the last one multiplies the gradients in place, and an earlier one must not."""
    inputs = inputs_of(8)
    expected = torch.autograd.grad(plain_loss(*inputs), inputs[:2])
    value = summed_token_loss(*inputs)
    for factor, is_kept in ((3.0, True), (5.0, True), (7.0, False)):
        found = torch.autograd.grad(value * factor, inputs[:2], retain_graph=is_kept)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, factor * theirs)


def test_no_logits_outlive_their_chunk_and_backward_makes_no_new_tensor() -> None:
    hidden, embedding, targets, vocabulary = inputs_of(3 * CHUNK, torch.float32)
    with _Seen() as seen:
        value = summed_token_loss(hidden, embedding, targets, vocabulary)
        value.backward()
    with_vocabulary = {shape for shape in seen.shapes if ROWS in shape}
    assert with_vocabulary == {(CHUNK, ROWS), (ROWS, CHUNK), (ROWS, WIDTH), (WIDTH, ROWS)}
    with _Seen() as seen:
        plain_loss(hidden, embedding, targets, vocabulary)
    assert (3 * CHUNK, ROWS) in seen.shapes, "all logits would be seen"

    values: list[Tensor] = []
    _, forward = allocator_peak(lambda: values.append(summed_token_loss(hidden, embedding, targets, vocabulary)))
    assert forward < 4 * (CHUNK * ROWS + hidden.numel() + embedding.numel() + 2 * CHUNK * WIDTH) * 1.1
    assert allocator_peak(lambda: values[0].backward())[1] < 1000


def test_without_grad_mode_no_gradient_is_computed() -> None:
    inputs = inputs_of(2 * CHUNK, torch.float32)
    with torch.no_grad(), _Seen() as seen:
        value = summed_token_loss(*inputs)
    assert not value.requires_grad
    assert value == summed_token_loss(*inputs)
    assert len(seen.products) == 2
    with _Seen() as seen:
        summed_token_loss(*inputs)
    assert len(seen.products) == 6


def test_under_autocast_products_are_in_bf16_and_sums_in_float32() -> None:
    inputs = inputs_of(2 * CHUNK, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with _Seen() as seen:
            ours = loss_and_gradients(summed_token_loss, inputs, 0.5)
        theirs = loss_and_gradients(plain_loss, inputs, 0.5)
    assert seen.products == [torch.bfloat16] * 6
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3
    assert difference(ours[0], theirs[0]) < 1e-6
    assert all(difference(a, b) < 4e-3 for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.usefixtures("chunks_of_three")
def test_the_gradient_of_bf16_weights_is_added_up_in_float32() -> None:
    """Rounded once, at the end: 400 chunks that were added up in bf16 would lose their last bits."""
    inputs = inputs_of(1200, torch.bfloat16)
    value, of_hidden, of_embedding = loss_and_gradients(summed_token_loss, inputs, 1 / 3)
    hidden, embedding, targets, vocabulary = inputs
    exact = loss_and_gradients(plain_loss, (hidden.double(), embedding.double(), targets, vocabulary), 1 / 3)
    assert (value.dtype, of_hidden.dtype, of_embedding.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert difference(of_embedding, exact[2]) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_graph_whose_backward_multiplies(dtype: torch.dtype) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    inputs = inputs_of(2 * CHUNK, torch.float32)  # a product of one short chunk the compiler may leave to backward
    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(summed_token_loss, fullgraph=True, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = (loss_and_gradients(loss, inputs, SCALE) for loss in (compiled, summed_token_loss))
    assert all(difference(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))
    _, backward = graphs
    assert [str(n.target) for n in backward.graph.nodes if n.op == "call_function"] == ["aten.mul.Tensor"] * 2


def test_checkpointed_and_tied_it_is_the_same() -> None:
    """Run again in backward; and with an embedding that the hidden states come from as well."""
    _, embedding, targets, vocabulary = inputs_of(CHUNK + 1)
    tokens = torch.arange(len(targets)) % vocabulary

    def gradient(loss: Callable[..., Tensor]) -> Tensor:
        value = loss(embedding[tokens].tanh(), embedding, targets, vocabulary)
        return torch.autograd.grad(value * SCALE, embedding)[0]

    expected = gradient(plain_loss)
    for loss in (summed_token_loss, lambda *inputs: checkpoint(summed_token_loss, *inputs, use_reentrant=False)):
        assert difference(gradient(loss), expected) < 1e-14


def test_fully_masked_rows_give_zero_loss_and_zero_gradient() -> None:
    inputs = inputs_of(5, torch.float32)
    inputs[2].fill_(IGNORED_TARGET)
    assert [tensor.abs().max() for tensor in loss_and_gradients(summed_token_loss, inputs)] == [0, 0, 0]
