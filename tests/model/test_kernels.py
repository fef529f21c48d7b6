"""How the step is computed: what reaches attention, how many graphs there are, what is computed again; the update stays."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.config.settings import Config, ModelConfig, OptimizerConfig, PerformanceConfig
from recipe.errors import RecipeError
from recipe.model.gpt2 import CausalLanguageModel, build_gpt2
from recipe.model.kernels import compile_model, eager, set_kernels
from recipe.model.onednn import choose_matmul, use_onednn
from recipe.plan.memory import rows_per_chunk
from tests.helpers import SCRIPT, TINY, read_events, read_ledger, run, run_ranks, train, write_texts

LENGTH = 32


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def model_of(**performance: Any) -> CausalLanguageModel:
    shape = ModelConfig(n_layer=4, n_embd=64, n_head=4, vocab_size=320, n_positions=LENGTH)
    return build_gpt2(Config(model=shape, performance=PerformanceConfig(**performance)), 300, 0)


def batch_of(rows: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(300, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(rows))
    return tokens[:, :-1], tokens[:, 1:]


def gradient(model: nn.Module, rows: int = 3) -> Tensor:
    model.zero_grad()
    model(*batch_of(rows)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class _Attention(TorchFunctionMode):
    """Notes the mask of each call of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            kwargs = kwargs or {}
            self.calls.append((kwargs.get("attn_mask") is not None or len(args) > 3, bool(kwargs.get("is_causal"))))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class _Graphs:
    """A backend for torch.compile that keeps the graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def attention(self) -> list[tuple[bool, bool]]:
        return [
            (node.kwargs.get("attn_mask") is not None or len(node.args) > 3, bool(node.kwargs.get("is_causal")))
            for graph in self.graphs
            for node in graph.graph.nodes
            if node.target is nn.functional.scaled_dot_product_attention
        ]


@pytest.mark.slow
def test_no_mask_reaches_attention() -> None:
    """A dense mask loses the flash kernel. transformers' own "sdpa" has one under torch.compile: the test sees it."""
    model = model_of()
    with _Attention() as seen:
        model(*batch_of(3))
    assert seen.calls == [(False, True)] * 4
    with _Operations() as operations:
        model(*batch_of(3)).backward()
    assert operations.counts["_scaled_dot_product_flash_attention_for_cpu.default"] == 4
    assert operations.counts["_scaled_dot_product_flash_attention_for_cpu_backward.default"] == 4

    graphs = _Graphs()
    compile_model(model, backend=graphs)
    model(*batch_of(3))
    assert graphs.attention() == [(False, True)] * 4

    masked, graphs = model_of(), _Graphs()
    gpt2: Any = masked.gpt2
    gpt2.set_attn_implementation("sdpa")
    masked.compile(dynamic=False, backend=graphs)
    masked(*batch_of(3))
    assert (True, False) in graphs.attention(), "transformers no longer makes a mask: CAUSAL_ATTENTION may go"


@pytest.mark.slow
def test_one_graph_for_each_size_of_micro_batch() -> None:
    """And no other afterwards; the shapes of an evaluation come once, and are not compiled."""
    model, counter = model_of(activation_checkpointing=2), CompileCounter()
    names = [name for name, _ in model.named_parameters()]
    expected = [gradient(model, rows) for rows in (3, 4)]
    compile_model(model, backend=counter)
    for _ in range(3):
        for rows, reference in zip((3, 4), expected, strict=True):
            torch.testing.assert_close(gradient(model, rows), reference)
    assert counter.frame_count == 2
    model.eval()
    with torch.no_grad(), eager(model):
        model(*batch_of(7))
    model.train()
    gradient(model)
    assert counter.frame_count == 2
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())[: len(names)]
    gradient(model, 5)
    assert counter.frame_count == 3, "the counter sees a recompilation"


@pytest.mark.parametrize(("every", "computed_again"), [(None, []), (1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_every_nth_block_is_computed_again(every: int | None, computed_again: list[int]) -> None:
    model, calls = model_of(activation_checkpointing=every), []
    gpt2: Any = model.gpt2
    for number, block in enumerate(gpt2.transformer.h):
        block.ln_1.register_forward_hook(lambda *_, number=number: calls.append(number))
    found = gradient(model)
    assert sorted(calls) == sorted([0, 1, 2, 3, *computed_again])
    torch.testing.assert_close(found, gradient(model_of()), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [3, rows_per_chunk("cpu") // LENGTH + 1])
def test_products_by_onednn_are_torchs(rows: int) -> None:
    """Loss and gradient to float32 rounding; a mode that sees every operation sees no product of torch's."""
    expected, model = gradient(model_of(), rows), model_of()
    use_onednn(model)
    with _Operations() as seen:
        found = gradient(model, rows)
    assert (found - expected).norm() / expected.norm() < 1e-6
    chunks = 1 if rows == 3 else 2
    # three products: of four linear layers in each of four blocks, and of the output layer for each chunk of the loss
    assert seen.counts["_linear_pointwise.default"] == 3 * (4 * 4 + chunks)
    assert not {"mm.default", "addmm.default", "add_product.default"} & seen.counts.keys()
    with torch.no_grad():
        double = model.double()(*batch_of(rows))
    assert double.item() == pytest.approx(model_of().double()(*batch_of(rows)).item(), rel=1e-12)


def test_products_are_chosen_by_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    performance = PerformanceConfig()
    for capability, expected in (("AVX512", "onednn"), ("AVX2", "torch")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert choose_matmul(performance, "cpu", "fp32") == expected
        assert choose_matmul(performance, "cpu", "bf16") == choose_matmul(performance, "cuda", "fp32") == "torch"
        assert choose_matmul(PerformanceConfig(compile=True), "cpu", "fp32") == "torch"
        assert choose_matmul(PerformanceConfig(matmul="onednn"), "cpu", "fp32") == "onednn"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--performance.matmul", "onednn", "--precision", "bf16"],
            ["performance.matmul = onednn", "bf16", "auto"],
        ),
        (["--optimizer.state", "bf16"], ["optimizer.state = bf16", "bf16", "fp32"]),
    ],
)
def test_what_the_device_cannot_do_is_one_line(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    done = train(*TINY, "--run.directory", str(directory), *arguments)
    assert not directory.exists(), "nothing is begun"
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in done.stderr


def test_a_missing_compiler_is_named_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    config = Config(performance=PerformanceConfig(compile=True))
    with pytest.raises(RecipeError, match=r"performance\.compile needs a C\+\+ compiler.*install g\+\+, or set CXX"):
        set_kernels(config, torch.device("cpu"))


def test_a_missing_extra_is_named_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.model.kernels.find_spec", lambda name: None)
    config = Config(optimizer=OptimizerConfig(state="bf16"))
    with pytest.raises(RecipeError, match=r"optimizer\.state = bf16 needs torchao: pip install .*\[bf16-state\]"):
        set_kernels(config, torch.device("cuda"))


@pytest.mark.slow
def test_options_do_not_change_the_update(tmp_path: Path) -> None:
    """The same blocks, and the same losses to rounding."""
    write_texts(tmp_path / "texts")
    ledgers, starts = [], []
    for number, more in enumerate(
        (
            [],
            ["--performance.activation_checkpointing", "2", "--performance.deterministic", "true"],
            ["--performance.matmul", "onednn"],
        )
    ):
        given = ["--run.directory", f"{tmp_path}/{number}", "--data.text_files", f"{tmp_path}/texts/*.txt"]
        cache = ["--data.cache_directory", f"{tmp_path}/cache", "--run.max_updates", "6"]
        assert (done := train(*TINY, *given, *cache, *more)).returncode == 0, done.stderr
        ledgers.append(read_ledger(tmp_path / str(number)))
        starts += read_events(tmp_path / str(number), "start")
    chosen = "onednn" if starts[0]["cpu_instructions"] == "AVX512" else "torch"
    assert [start["matmul"] for start in starts] == [chosen, chosen, "onednn"]
    for ledger in ledgers[1:]:
        assert [e["blocks_sha256"] for e in ledger] == [e["blocks_sha256"] for e in ledgers[0]]
        assert [e["loss"] for e in ledger] == pytest.approx([e["loss"] for e in ledgers[0]], rel=1e-5)


_COMPILED = """
import sys
from recipe.errors import run_command
import recipe.train
run_command(recipe.train.main)
from torch._dynamo.utils import counters
print(dict(counters["stats"]), dict(counters["inductor"]), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_and_finds_its_code_again(tmp_path: Path) -> None:
    """On one rank, a second time, and on two, where DDP or FSDP2, checkpointed blocks and a masked row come together."""
    write_texts(tmp_path / "texts")

    def arguments(name: str, *more: str) -> list[str]:
        given = ["--run.directory", f"{tmp_path}/{name}", "--data.text_files", f"{tmp_path}/texts/*.txt"]
        cache = ["--data.cache_directory", f"{tmp_path}/cache", "--run.max_updates", "5"]
        return [*TINY, *given, *cache, "--batch.micro_batch_size", "5", *more]

    compiled = ["--performance.compile", "true", "--performance.activation_checkpointing", "2"]
    cached = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    assert train(*arguments("eager")).returncode == 0
    outputs = []
    for name in ("cold", "warm"):
        command = [sys.executable, "-c", _COMPILED, *arguments(name, *compiled)]
        done = run(command, timeout=900, **cached)  # two minutes on an idle machine of two slow cores
        assert done.returncode == 0, done.stderr
        outputs.append(done.stderr.splitlines()[-1])
    assert all("'unique_graphs': 2" in output for output in outputs), outputs
    assert "'fxgraph_cache_miss': 4" in outputs[0]
    assert "'fxgraph_cache_hit': 4" in outputs[1]
    assert "fxgraph_cache_miss" not in outputs[1]
    run_ranks(2, [SCRIPT, *arguments("two", *compiled)], **cached)
    run_ranks(2, [SCRIPT, *arguments("cut", *compiled, "--performance.sharding", "full")], **cached)
    eager_losses = [entry["loss"] for entry in read_ledger(tmp_path / "eager")]
    for name in ("cold", "warm", "two", "cut"):
        assert [entry["loss"] for entry in read_ledger(tmp_path / name)] == pytest.approx(eager_losses, rel=1e-5), name
