"""The GPU benchmark, as far as a CPU can tell: every row runs, faults show, and the result names what failed or was cut off."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

import recipe.model.attention
import recipe.model.gpt2
from benchmarks.gpu.__main__ import FIRST, LATER, PADDING, PARITY, PRESET, VOCABULARY, Benchmark, differences
from benchmarks.gpu.profile import covered, kind_of, summarize
from benchmarks.gpu.trial import Row, Trial
from benchmarks.training import read_preset, with_settings
from recipe.config.command_line import load_config
from recipe.step.parity import TOLERANCE
from tests.helpers import ROOT, environment

# Hides what the benchmark has to do without, also from those who only ask whether it is installed.
SITECUSTOMIZE = """
import sys

HIDDEN = {"datasets", "jsonargparse", "pyarrow", "pandas", "altair"}

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", None)
        return [] if find is None or context.name in HIDDEN else find(context)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def gpu_sh(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """`benchmarks/gpu.sh --dry_run ...` without datasets, jsonargparse, pyarrow, pandas and altair; its JSON."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    command = [str(ROOT / "benchmarks/gpu.sh"), "--dry_run", "--out", str(tmp_path), *arguments]
    variables = environment(PYTHON=sys.executable) | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    (path,) = tmp_path.glob("*-gpu-dry-run.json") if not done.returncode else [None]
    return done, json.loads(path.read_text(encoding="utf-8")) if path else {}


@pytest.mark.slow
def test_dry_run_measures_every_row_without_datasets_or_jsonargparse(tmp_path: Path) -> None:
    done, values = gpu_sh(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not {"datasets", "jsonargparse", "pyarrow"} & set(values["machine"]["versions"])
    rows = {row["name"]: row for row in values["rows"]}
    assert list(rows) == [row.name for row in (*FIRST, *LATER)]
    unmeasured = {name: row["reason"] for name, row in rows.items() if row["status"] != "measured"}
    cannot = dict.fromkeys(("attention cudnn", "attention mem_efficient"), "needs CUDA")
    if importlib.util.find_spec("torchao") is None:
        assert "torchao" in unmeasured.pop("bf16 state")
    # which micro-batch is the fastest, and doubled later, is a matter of time
    too_large = [name for name, row in rows.items() if row["micro_batch_size"] > 32]
    cannot |= dict.fromkeys(too_large, "only 32 blocks are compared with the baseline")
    assert unmeasured == cannot
    parameters = 512 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64  # of 2 layers, 64 wide, without positions
    flops_per_token = 6 * parameters + 12 * 2 * 64 * 32
    for name, row in rows.items():
        if row["status"] == "measured":
            assert row["agrees"], (name, row["differences"])
            assert row["profile"]["attention_ran"] == ["flash"]
            assert not row["profile"]["mask_reached_attention"]
            assert row["mfu"] == pytest.approx(
                flops_per_token * row["tokens_per_second"] / values["machine"]["peak_flops"]
            )
            update_seconds = sorted(row["micro_batch_seconds"])[1] * row["micro_batches_per_update"]
            update_seconds += sorted(row["step_seconds"])[1]
            assert row["tokens_per_second"] == pytest.approx(1024 / update_seconds)
    assert set(values["parity"]) == {"fp32", "bf16"}
    for precision, check in values["parity"].items():
        assert check["reference"] == "accumulate, micro-batch 4 x 8 steps"
        ways = {way for way, _ in check["differences"]}
        assert {"accumulate, micro-batch 3 x 11 steps", "manual, micro-batch 4 x 8 steps"} <= ways
        assert all(difference <= TOLERANCE[precision] for _, difference in check["differences"])
    best = values["best"]
    assert best["tokens_per_second"] == max(update["tokens_per_second"] for update in best["whole_updates"])
    assert all(update["is_finite"] for update in best["whole_updates"])
    assert all(product["flops_per_second"] > 0 for product in values["limits"]["matrix_products"])


@pytest.mark.slow
def test_without_time_everything_is_skipped_and_said(tmp_path: Path) -> None:
    done, values = gpu_sh(tmp_path, "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in values["rows"]] == [row.name for row in (*FIRST, *LATER)]
    outcomes = [row["status"] for row in values["rows"]]
    outcomes += [values[part]["status"] for part in ("limits", "parity", "best")]
    assert set(outcomes) == {"skipped", "unavailable"}
    assert outcomes.count("unavailable") == 2  # the kernels that need CUDA


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Benchmark]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made = Benchmark(tmp_path / "gpu.json", 1e6, {"model.n_layer": 4})
    made.peak = 1e12
    yield made
    torch._dynamo.reset()


def last_row(benchmark: Benchmark) -> dict[str, Any]:
    return json.loads(benchmark.path.read_text(encoding="utf-8"))["rows"][-1]


def break_attention(monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> None:
    right = F.scaled_dot_product_attention

    def attention(*tensors: Any, **options: Any) -> Any:
        return right(*tensors, **options | wrong)

    monkeypatch.setattr(recipe.model.attention, "F", SimpleNamespace(scaled_dot_product_attention=attention))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["not causal", "scale", "not a number", "targets"])
def test_a_row_that_computes_something_else_does_not_become_the_best(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    benchmark.row(Row("baseline", on_best=False))
    benchmark.row(Row("the same"))
    assert last_row(benchmark)["agrees"]
    benchmark.best = None
    if fault == "targets":
        right = recipe.model.gpt2.summed_token_loss

        def loss(hidden: Any, embedding: Any, targets: Any, *rest: Any) -> Any:
            is_left_out = torch.arange(targets.numel()).view(targets.shape) % 16 == 0
            return right(hidden, embedding, targets.masked_fill(is_left_out, -100), *rest)

        monkeypatch.setattr(recipe.model.gpt2, "summed_token_loss", loss)
    else:
        wrong: dict[str, dict[str, Any]] = {
            "not causal": {"is_causal": False},
            "scale": {"scale": 1.0},
            "not a number": {"scale": float("nan")},
        }
        break_attention(monkeypatch, **wrong[fault])
    benchmark.row(Row("wrong"))
    assert last_row(benchmark)["status"] == "measured"
    assert not last_row(benchmark)["agrees"]
    assert benchmark.best is None


@pytest.mark.slow
def test_a_mask_is_seen(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    length = benchmark.preset.data.sequence_length
    break_attention(monkeypatch, is_causal=False, attn_mask=torch.ones(length, length).tril().bool())
    benchmark.row(Row("baseline", on_best=False))
    assert last_row(benchmark)["profile"]["mask_reached_attention"]


def test_out_of_memory_is_a_result_and_leaves_nothing_behind(benchmark: Benchmark) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fail() -> dict[str, Any]:
        tensor = torch.zeros(1000)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB")

    outcome = benchmark.attempt(fail)
    assert outcome["status"] == "out of memory"
    assert "3.07 GiB" in outcome["reason"]
    gc.collect()
    assert held[0]() is None


def test_a_row_that_takes_too_long_is_cut_off(benchmark: Benchmark) -> None:
    def compile_for_ever() -> dict[str, Any]:
        while True:
            try:
                time.sleep(0.05)
            except Exception:  # as compilers do
                continue

    benchmark.ends = time.perf_counter() + 0.3
    started = time.perf_counter()
    assert benchmark.attempt(compile_for_ever)["status"] == "cut off"
    assert time.perf_counter() - started < 5
    assert benchmark.attempt(compile_for_ever)["status"] == "skipped"


def test_larger_micro_batches_are_not_tried_if_smaller_ones_did_not_fit(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    def does_not_fit(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB")

    monkeypatch.setattr(recipe.model.gpt2, "summed_token_loss", does_not_fit)
    benchmark.row(Row("micro-batch 8", {"batch.micro_batch_size": 8}, on_best=False))
    assert last_row(benchmark)["status"] == "out of memory"
    benchmark.row(Row("micro-batch 16", {"batch.micro_batch_size": 16}, on_best=False))
    assert last_row(benchmark)["reason"] == "micro-batches of 8 ran out of memory"


@pytest.mark.slow
def test_each_attention_row_uses_its_kernel_alone(benchmark: Benchmark) -> None:
    kernels = {"baseline": None, "attention math": "math", "attention flash": "flash"}
    for name, kernel in kernels.items():
        benchmark.row(Row(name, attention=kernel, is_candidate=False))
        assert last_row(benchmark)["agrees"]
        assert last_row(benchmark)["profile"]["attention_ran"] == [kernel or "flash"]


def test_preset_is_read_as_the_command_line_reads_it() -> None:
    preset = read_preset(PRESET)
    assert preset == load_config(["--config", PRESET])
    changed = with_settings(preset, {"performance.compile": True, "batch.micro_batch_size": 8})
    assert differences(changed, preset) == {"performance.compile": True, "batch.micro_batch_size": 8}
    assert differences(preset, preset) == {}
    assert all(with_settings(preset, row.settings) for row in (*FIRST, *LATER))  # names and values that there are
    assert preset.model.vocab_size >= VOCABULARY


def test_the_parity_model_of_a_gpu_can_be_built() -> None:
    config = with_settings(read_preset(PRESET), PARITY | {"precision": "fp32", "performance.compile": False})
    assert len(Trial(config, config.model.vocab_size - PADDING, Row("parity")).steps) == 16


KERNELS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute": "matrix products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn_align8>": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>": "matrix products",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>, false, true>": "attention, forward",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention, backward",
    "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, ...>": "attention, backward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": "attention, forward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x128x128": "attention, backward",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)": "attention, forward",
    "fmha_cutlassB_bf16_aligned_128x64_k128_sm80(...)": "attention, backward",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>": "layer norm",
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel_32x32<float, float>": "layer norm",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)>": "gelu",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>": "loss",
    "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float>": "loss",
    "liger_cross_entropy_kernel": "loss",
    "void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4, ADAMW>>": "optimizer and clipping",
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<...>>": "optimizer and clipping",
    "Memcpy DtoD (Device -> Device)": "copies and casts",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>": "copies and casts",
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>": "copies and casts",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "sums and other elementwise",
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<...sum_functor>>": "sums and other elementwise",
    "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long>": "embedding",
    "void at::native::(anonymous namespace)::compute_grad_weight<float> embedding_backward": "embedding",
    "triton_red_fused_native_layer_norm_native_layer_norm_backward_3": "fused by the compiler",
    "triton_poi_fused__to_copy_gelu_2": "fused by the compiler",
    "triton_tem_fused_addmm_5": "matrix products",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_told_apart_by_their_names(name: str) -> None:
    assert kind_of(name) == KERNELS[name]


def test_profile_counts_kernels_once_and_time_without_them_as_idle() -> None:
    def event(
        name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA, **more: Any
    ) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=False, **more)

    shapes = [[4, 16, 64, 128]] * 3
    events = [
        event("aten::_scaled_dot_product_cudnn_attention", 0, 5, DeviceType.CPU, input_shapes=[*shapes, [], [], []]),
        event("nvjet_tst_128", 100, 400),
        event("triton_poi_fused_0", 300, 500),  # on another stream, at the same time
        event("Optimizer.step#AdamW.step", 100, 1100),  # a range, no kernel
        event("Memcpy DtoD", 900, 1100),
    ]
    found = summarize(events, wall_seconds=2.0, is_cuda=True)
    assert found["span_seconds"] == pytest.approx(1000e-6)
    assert found["idle_share"] == pytest.approx(0.4)
    assert found["seconds_by_kind"] == pytest.approx(
        {"matrix products": 300e-6, "fused by the compiler": 200e-6, "copies and casts": 200e-6}
    )
    assert (found["attention_ran"], found["mask_reached_attention"]) == (["cudnn"], False)
    assert covered([(5, 6), (0, 3), (2, 4)]) == 5
