"""Attention inside documents: a document in a packed block is computed as it is alone, by every way that it can be computed."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.checkpoint.resume import find_resume_point
from recipe.commands import evaluate as evaluate_command
from recipe.config.command_line import load_config
from recipe.config.settings import Config, DataConfig, ModelConfig, PerformanceConfig
from recipe.data.blocks import MicroBatch, document_starts, make_lanes, next_update, to_tensors
from recipe.data.sources import open_source
from recipe.data.tokenizer import load_tokenizer
from recipe.errors import RecipeError
from recipe.model import attention
from recipe.model.attention import causal_attention, document_mask, document_ranges, inside_documents
from recipe.model.gpt2 import CausalLanguageModel, build_gpt2
from recipe.model.kernels import compile_model
from recipe.plan.memory import takes_ranges
from tests.helpers import TINY, read_events, read_ledger, run_ranks, train, write_texts
from tests.support.lanes import config_for, run_on

LAYERS, LENGTH, END = 2, 32, 0
CPU = torch.device("cpu")
# Ends of text among the inputs: none, so a document longer than the block; at its start and its end; two and three in a row.
PLACES: tuple[tuple[int, ...], ...] = ((), (0, 31), (5, 6, 20), (0, 1, 2, 17), (30,))


def blocks_of(places: tuple[tuple[int, ...], ...], seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(1, 300, (len(places), LENGTH + 1))
    for block, ends in zip(blocks, places, strict=True):
        block[list(ends)] = END
    return blocks


def model_of(document_mask: bool = True, **performance: Any) -> CausalLanguageModel:
    """With weights so large that each token in sight counts."""
    shape = ModelConfig(n_layer=LAYERS, n_embd=64, n_head=4, vocab_size=320, n_positions=LENGTH, initializer_range=0.2)
    data = DataConfig(document_mask=document_mask)
    return build_gpt2(Config(data=data, model=shape, performance=PerformanceConfig(**performance)), 300, END)


def gradient(loss: Tensor, model: CausalLanguageModel) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def logits(model: CausalLanguageModel, batch: MicroBatch) -> Tensor:
    inside = inside_documents(model.gpt2, batch[2], LENGTH)
    return F.linear(
        model.gpt2.transformer(batch[0], use_cache=False, **inside).last_hidden_state, model.gpt2.lm_head.weight
    )


def alone(blocks: np.ndarray) -> list[tuple[int, int, Tensor, Tensor]]:
    """(row, start, inputs, targets) of each document, found token by token, as a batch of one without any mask."""
    found = []
    for row, block in enumerate(blocks):
        begins = [place for place in range(LENGTH) if place == 0 or block[place] == END]
        for begin, end in zip(begins, [*begins[1:], LENGTH], strict=True):
            tokens = torch.from_numpy(block[begin : end + 1])[None]
            found.append((row, begin, tokens[:, :-1], tokens[:, 1:]))
    return found


@pytest.fixture(params=["dense", "checkpointed", "ranges", pytest.param("compiled", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CausalLanguageModel:
    """Each way to compute it; by ranges with the kernel that is only on CUDA spelled out."""
    torch._dynamo.reset()
    model = model_of(activation_checkpointing=2 if request.param == "checkpointed" else None)
    if request.param == "compiled":
        compile_model(model, backend="aot_eager")
    if request.param == "ranges":
        monkeypatch.setattr(attention, "takes_ranges", lambda *_: True)
        monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attention)
    return model


def plain_varlen_attention(query: Tensor, key: Tensor, value: Tensor, *ranges: Any, **options: Any) -> Tensor:
    """`varlen_attn` as its documentation has it, for what is asked of it here."""
    first, second, *longest = ranges
    assert (options.pop("window_size"), first.dtype) == ((-1, 0), torch.int32)
    assert first is second
    assert min(longest) >= int(first.diff().max())
    parts = first.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(0, 1)
        for q, k, v in zip(*(x.transpose(0, 1).split(parts, dim=1) for x in (query, key, value)), strict=True)
        if q.shape[1]
    ]
    return torch.cat(outputs)


def test_a_document_in_a_block_is_computed_as_it_is_alone(model: CausalLanguageModel) -> None:
    """Its logits, the loss and the gradient."""
    blocks = blocks_of(PLACES)
    batch = to_tensors(blocks, CPU, model.document_start)
    found, plain, losses = logits(model, batch), model_of(document_mask=False), []
    for row, begin, inputs, targets in alone(blocks):
        expected = plain.gpt2(inputs).logits[0]
        torch.testing.assert_close(found[row, begin : begin + len(expected)], expected, rtol=1e-5, atol=1e-5)
        losses.append(plain(inputs, targets))
    expected_loss, loss = torch.stack(losses).sum(), model(*batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert loss.item() != pytest.approx(plain(*batch[:2]).item(), rel=1e-3), "without the mask it is another"
    expected_gradient = gradient(expected_loss, plain)
    assert (gradient(loss, model) - expected_gradient).norm() / expected_gradient.norm() < 1e-6


def test_starts_are_padded_to_a_constant_number_of_places() -> None:
    starts = document_starts(blocks_of(PLACES), END)
    assert starts.shape == (len(PLACES), 16)
    for row, places in zip(starts.tolist(), PLACES, strict=True):
        begins = sorted({0, *places})
        assert row == begins + [LENGTH] * (16 - len(begins))
    assert document_starts(blocks_of(((*range(16),),)), END).shape == (1, 16)
    for ends in ((*range(1, 17),), (*range(LENGTH),)):
        starts = document_starts(blocks_of(((), ends)), END)
        assert starts.shape == (2, 32), "the longest row decides"
        assert starts[1, 16] == 16
    behind = blocks_of(((LENGTH,),))
    assert document_starts(behind, END).tolist() == [[0] + [LENGTH] * 15], "the last target is no input"


def test_the_starts_come_with_the_blocks(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", count=8)
    for has_mask in (False, True):
        config = config_for(tmp_path, f"{tmp_path}/texts/*.txt", lanes=4, document_mask=has_mask, tokenizer=None)
        source = open_source(config)
        tokenizer = load_tokenizer(config, [source])
        update = next_update(make_lanes(run_on(config, 8), [source], tokenizer), 2, CPU)
        inputs, targets, *starts = update.batch
        assert inputs.shape == targets.shape
        assert [x.tolist() for x in starts] == [
            document_starts(update.blocks, tokenizer.eos_token_id).tolist()
        ] * has_mask


def test_ranges_and_positions_say_what_the_mask_says() -> None:
    random = np.random.default_rng(1)
    for share in (0.0, 0.05, 0.3, 0.9):
        blocks = random.integers(1, 300, (4, LENGTH + 1))
        blocks[random.random(blocks.shape) < share] = END
        starts = torch.from_numpy(document_starts(blocks, END))
        document = torch.from_numpy((blocks[:, :-1] == END).cumsum(axis=1))
        ranges = document_ranges(starts, LENGTH)
        assert (ranges[0], ranges[-1], len(ranges)) == (0, 4 * LENGTH, starts.numel() + 1)
        sees = torch.zeros(4 * LENGTH, 4 * LENGTH, dtype=torch.bool)
        positions = torch.zeros(4 * LENGTH, dtype=torch.int64)
        for begin, end in zip(ranges[:-1].tolist(), ranges[1:].tolist(), strict=True):
            sees[begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
            positions[begin:end] = torch.arange(end - begin)
        rows = sees.unflatten(1, (4, LENGTH)).unflatten(0, (4, LENGTH))  # [row, token, row, token]
        assert rows.sum() == sum(rows[row, :, row].sum() for row in range(4)), "no range goes on into the next row"
        torch.testing.assert_close(
            torch.stack([rows[row, :, row] for row in range(4)])[:, None], document_mask(document)
        )
        inside = inside_documents(model_of().gpt2, starts, LENGTH)
        torch.testing.assert_close(inside["position_ids"].flatten(), positions)
        torch.testing.assert_close(inside["attention_mask"] == 0, document_mask(document))


def test_the_kernel_for_ranges_takes_what_it_gets() -> None:
    """By shape, forward and backward, where there is no GPU."""
    shape = 3, 4, LENGTH, 16
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    ranges = document_ranges(torch.from_numpy(document_starts(blocks_of(PLACES[:3]), END)), LENGTH).to("meta")
    output, _ = causal_attention(torch.nn.Identity(), query, key, value, None, ranges=ranges, scaling=0.25)
    assert (output.shape, output.dtype) == ((3, LENGTH, 4, 16), torch.bfloat16)
    assert [x.shape for x in torch.autograd.grad(output.sum(), (query, key, value))] == [shape] * 3


def test_where_ranges_are_taken() -> None:
    assert takes_ranges("cuda", "bf16", 0.0, 64)
    for other in (("cpu", "bf16", 0.0, 64), ("cuda", "fp32", 0.0, 64), ("mps", "bf16", 0.0, 64)):
        assert not takes_ranges(*other)
    for dropout, head_width in ((0.1, 64), (0.0, 257), (0.0, 60)):
        assert not takes_ranges("cuda", "bf16", dropout, head_width)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn is for CUDA")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_ranges_on_a_gpu_are_the_mask(is_compiled: bool) -> None:
    """Loss and gradient to bf16 rounding; far less than what the mask changes."""
    batch = to_tensors(blocks_of(PLACES), torch.device("cuda"), END)
    model = model_of().cuda()
    expected, whole = (gradient(model(*batch[:n]), model) for n in (3, 2))
    if is_compiled:
        compile_model(model)
    with torch.autocast("cuda", torch.bfloat16):
        assert "ranges" in inside_documents(model.gpt2, batch[2], LENGTH)
        found = gradient(model(*batch), model)
    assert (found - expected).norm() / expected.norm() < 0.05
    assert (found - whole).norm() / expected.norm() > 0.2


class _Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_mask_for_all_layers_and_no_wait_for_the_device(precision: str) -> None:
    model, batch = model_of(), to_tensors(blocks_of(PLACES), CPU, END)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with _Operations() as plain:
            model(*batch[:2]).backward()
        with _Operations() as seen:
            model(*batch).backward()
    assert seen.counts["_scaled_dot_product_flash_attention_for_cpu.default"] == LAYERS
    assert seen.counts["_scaled_dot_product_flash_attention_for_cpu_backward.default"] == LAYERS
    assert (seen.counts - plain.counts)["masked_fill.Scalar"] == 1
    assert not {"where.self", "where.ScalarSelf", "_local_scalar_dense.default"} & (seen.counts - plain.counts).keys()


@pytest.mark.slow
def test_other_documents_are_no_other_graph() -> None:
    torch._dynamo.reset()
    model, counter = model_of(), CompileCounter()
    compile_model(model, backend=counter)
    for seed, places in enumerate((PLACES, PLACES[::-1], ((),) * len(PLACES))):
        model(*to_tensors(blocks_of(places, seed), CPU, END))
    assert counter.frame_count == 1
    model(*to_tensors(blocks_of(((*range(LENGTH),), *PLACES[1:])), CPU, END))
    assert counter.frame_count == 2, "the counter sees a recompilation"


def test_dropout_keeps_to_the_document() -> None:
    """No token of another document reaches it: its gradient with respect to their embeddings is 0."""
    model = model_of()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    batch = to_tensors(blocks_of(((5, 6, 20),)), CPU, END)
    embeddings = model.gpt2.transformer.wte(batch[0]).detach().requires_grad_()
    inside = inside_documents(model.gpt2, batch[2], LENGTH)
    model.gpt2.transformer(inputs_embeds=embeddings, use_cache=False, **inside).last_hidden_state[0, 15, 0].backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0].abs().sum(dim=-1).nonzero().flatten().tolist() == list(range(6, 16))


def test_what_generates_a_model_knows_no_mask() -> None:
    """With a cache, a token at a time, as without the mask: a prompt is one document."""
    prompt = torch.tensor([[END, 5, 7, 9]])
    outputs = [
        model_of(document_mask).eval().gpt2.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=END)
        for document_mask in (True, False)
    ]
    assert outputs[0].tolist() == outputs[1].tolist()


def test_a_run_is_masked_everywhere_and_its_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerate_state: None
) -> None:
    """In updates, validation and the check of a resume, on one rank and on two, and by `recipe evaluate`."""
    write_texts(tmp_path / "texts")
    own = tmp_path / "own.jsonl"
    own.write_text(
        "".join(json.dumps({"text": word * 9}) + "\n" for word in ("a b ", "", "def f(): ") * 9), encoding="utf-8"
    )
    where = ["--run.directory", str(tmp_path / "run"), "--data.text_files", f"{tmp_path}/texts/*.txt"]
    run = [*TINY, *where, "--evaluation.sets.own", str(own), "--data.cache_directory", str(tmp_path / "cache")]
    masked = [*run, "--data.document_mask", "true"]
    done = train(*masked, "--run.max_updates", "3", "--run.parity_check", "true", "--batch.micro_batch_size", "auto")
    assert done.returncode == 0, done.stderr
    with pytest.raises(RecipeError, match=r"data\.document_mask was True and is False"):
        find_resume_point(load_config(run))
    run_ranks(2, ["recipe/train.py", *masked, "--run.max_updates", "5"])
    ledger = read_ledger(tmp_path / "run")
    assert [entry["update"] for entry in ledger] == [1, 2, 3, 4, 5]
    assert len(read_events(tmp_path / "run", "resume")) == 1

    def loss(*more: str) -> float:
        output = tmp_path / "output.json"
        text = ["--data.text_files", str(own), "--data.sequence_length", "64", "--output", str(output)]
        monkeypatch.setattr("sys.argv", ["recipe", str(tmp_path / "run/final"), *text, *more])
        evaluate_command.main()
        return float(json.loads(output.read_text(encoding="utf-8"))["text"]["loss"])

    in_run = ledger[-1]["validation/own/loss"]
    assert loss() == pytest.approx(in_run, rel=1e-6)
    path = tmp_path / "run/final/config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert settings.pop("document_mask") is True
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert not math.isclose(loss(), in_run, rel_tol=1e-4), "without a mask it is another"
    assert loss("--data.document_mask", "true") == pytest.approx(in_run, rel=1e-6)
