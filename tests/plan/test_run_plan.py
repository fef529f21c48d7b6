"""The plan of a run and the command that prints it."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.commands.plan import planned
from recipe.config.command_line import load_config
from recipe.errors import RecipeError
from recipe.format import size_text
from recipe.plan.budget import UpdatePlan
from recipe.plan.devices import DEVICES, bf16_peak_flops
from recipe.plan.memory import USABLE_SHARE, estimate_memory, largest_micro_batch
from recipe.plan.run_plan import make_plan
from tests.helpers import ROOT, run, run_and_time

LARGE = ["--config", str(ROOT / "configs/gpt2-1.3b.yaml")]
PLAIN = ["--config", str(ROOT / "benchmarks/plain.yaml")]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def table(*arguments: str) -> dict[str, str]:
    """The command's lines, by what stands first in them."""
    lines = [line[2:] for line in planned(arguments).splitlines() if line.startswith("  ")]
    return {name.strip(): rest.strip() for name, rest in (re.split(r"  +", f"{line}  ", maxsplit=1) for line in lines)}


def values(*arguments: str) -> dict[str, Any]:
    """The command's JSON: table -> key -> value, and of the memory table -> state -> key -> value."""

    def plain(entry: dict[str, Any]) -> Any:
        return entry["value"] if "value" in entry else {key: plain(inner) for key, inner in entry.items()}

    return {table: plain(entries) for table, entries in json.loads(planned([*arguments, "--json"])).items()}


def test_the_plan_takes_under_a_second_and_no_torch() -> None:
    code = (
        "import sys; from recipe.commands.plan import main; main(); sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    )
    arguments = [*LARGE, "--device", "h100", "--world_size", "8", "--price_per_hour", "2"]
    seconds = []
    for _ in range(3):
        done, spent = run_and_time([sys.executable, "-c", code, *arguments])
        seconds.append(spent)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1


def test_the_classic_table_and_what_the_1_3b_preset_has_instead() -> None:
    lines = table(*LARGE)
    assert lines["all in 16 bits"].startswith("2.6 GB parameters + 2.6 GB gradients + 5.2 GB optimizer = 10.4 GB")
    assert lines["state"].startswith("5.3 GB parameters + 5.3 GB gradients + 10.5 GB optimizer = 21.1 GB per rank")
    states = values(*LARGE)["memory_of_a_rank"]
    assert states["fp32_state"]["state_bytes"] == 16 * 1_315_819_520
    assert states["bf16_state"]["state_bytes"] == 8 * 1_315_819_520
    of_bf16 = values(*LARGE, "--optimizer.state", "bf16")["memory_of_a_rank"]
    assert list(of_bf16) == ["bf16_state", "fp32_state"], "that of the run first"


def test_the_division_has_no_padding_and_world_size_overrides_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert values(*LARGE)["plan"]["gradient_accumulation_steps"] == 32
    assert values(*LARGE, "--world_size", "8")["plan"]["gradient_accumulation_steps"] == 8
    lines = table(*LARGE, "--world_size", "7")
    assert lines["world size"] == "7, 9 to 10 lanes each"
    assert lines["padding tokens"] == "0"
    few = [
        "--batch.tokens_per_update",
        "8192",
        "--batch.lanes",
        "4",
        "--batch.micro_batch_size",
        "1",
        "--world_size",
        "3",
    ]
    assert table(*LARGE, *few)["padding tokens"].startswith("0; 2 masked blocks")


@pytest.mark.parametrize("arguments", [LARGE, [*PLAIN, "--world_size", "2"], [*LARGE, "--world_size", "8"]])
def test_json_has_the_numbers_of_the_table(arguments: list[str]) -> None:
    arguments = [*arguments, "--memory_gb", "80", "--flops", "1e15", "--price_per_hour", "2.5"]
    lines, found = table(*arguments), values(*arguments)
    plan, memory, run = found["plan"], found["memory_of_a_rank"], found["run"]
    assert f"{plan['parameters']:,} x 4 bytes" in lines["parameters"]
    assert lines["updates"].endswith(f"= {plan['updates']:,}")
    assert lines["gradient accumulation steps"].endswith(f"= {plan['gradient_accumulation_steps']}")
    for name in ("gradients", "optimizer", "activations", "logits", "backward", "embedding", "peak", "usable"):
        sizes = [size_text(of[f"{name}_bytes"]) for of in memory.values()]
        assert re.split(r"  +", lines[name])[: len(sizes)] == sizes
    state = memory["fp32_state"]
    early = state["activations_bytes"] + state["casts_bytes"] + max(state["logits_bytes"], state["backward_bytes"])
    early += state["buckets_bytes"] + state["workspaces_bytes"]
    assert state["peak_bytes"] == state["state_bytes"] + early, "what the table adds up"
    assert lines["largest micro batch"].split()[: len(memory)] == [
        str(of["largest_micro_batch"]) for of in memory.values()
    ]
    assert lines["tokens per second"].endswith(f"= {run['tokens_per_second']:,.0f}")
    assert lines["cost"].endswith(f"= {run['cost']:,.2f}")


def test_json_has_units_and_derivations_and_null_for_what_is_not_known() -> None:
    tables = json.loads(planned([*LARGE, "--run.max_updates", "10", "--json"]))
    assert tables["plan"]["blocks_per_update"] == {
        "value": 256,
        "unit": "blocks",
        "derivation": "524,288 / 2,048 = 256",
    }
    assert [tables["plan"][key]["value"] for key in ("updates", "planned_updates")] == [50_195, 10]
    hours = tables["run"]["hours"]
    assert (hours["value"], hours["unit"]) == (None, "hours")
    assert "--flops" in hours["derivation"]
    assert "--device h100" in tables["memory_of_a_rank"]["fp32_state"]["largest_micro_batch"]["derivation"]


def test_the_plan_has_the_memory_of_the_optimizer_in_tokens() -> None:
    """0.9^n = 1/2 after 6.58 updates and 0.95^n after 13.5; 1 / (4.5e-4 x 0.1) = 22,222 updates of 50,195."""
    found = values(*LARGE)["optimizer_memory"]
    assert found["beta1_half_life"] == pytest.approx(524_288 * math.log(2) / -math.log(0.9), abs=1)
    assert found["beta2_half_life"] == pytest.approx(524_288 * math.log(2) / -math.log(0.95), abs=1)
    assert found["weight_decay_averages_over"] == pytest.approx(1 / (4.5e-4 * 0.1) / 50_195)
    shown = table(*LARGE)["weight decay averages over"]
    assert shown.startswith("0.443 of the run: 1 / (0.00045 x 0.1) = 22,222 updates; best in muP 0.22: Bergsma 2025, ")
    assert (
        values(*LARGE, "--optimizer.beta2_half_life_tokens", "10000000")["optimizer_memory"]["beta2_half_life"] == 10**7
    )
    assert [*values(*LARGE, "--optimizer.name", "sgd")["optimizer_memory"]] == ["weight_decay_averages_over"]
    assert "optimizer_memory" not in values(*LARGE, "--optimizer.name", "sgd", "--optimizer.weight_decay", "0")


def test_the_plan_has_every_phase_of_the_budget() -> None:
    """98 updates of 4,096 tokens are the first with 400,000; the last of three changes lies behind the end."""
    schedule = [(400_000, 8192), (700_000, 16_384), (70_000_000, 32_768)]
    given = json.dumps([{"from_tokens": start, "tokens_per_update": size} for start, size in schedule])
    arguments = [*PLAIN, "--batch.schedule", given, "--flops", "1e11", "--run.max_updates", "150"]
    lines, found = table(*arguments), values(*arguments)
    assert [found["plan"][f"phase_{number}"] for number in (2, 3, 4)] == [size for _, size in schedule]
    assert lines["tokens per update"] == "4,096, until update 98"
    assert lines["phase 2"] == (
        "8,192 from update 99 (401,408 tokens) on: 4 blocks of each lane, 8 accumulation steps, rate x 1.41, beta2 0.9025"
    )
    assert "on, which is not reached: 16 blocks" in lines["phase 4"]
    assert lines["updates"].startswith(
        "401,408 / 4,096 + 303,104 / 8,192 + 278,528 / 16,384 = 152, stops after update 150"
    )
    seen = 401_408 + 303_104 + 15 * 16_384
    assert found["run"]["hours"] * 3600 == pytest.approx(seen / found["run"]["tokens_per_second"])
    memory = {name: lines[name] for name in ("beta1 half life", "beta2 half life", "weight decay averages over")}
    assert memory["beta1 half life"].endswith("; then 53,894, 107,787")
    assert "then" not in memory["beta2 half life"], "it stays"
    assert "; then 11.8, 16.7; best in muP" in memory["weight decay averages over"]


def test_the_plan_has_tokens_and_passes_of_each_source(tmp_path: Path) -> None:
    """Passes where flat files say how many tokens they have to train on, without anything that takes time to import."""
    for name in ("train.bin", "val.bin"):
        np.zeros(50_000, dtype="<u2").tofile(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text('{"ids": [1]}\n')
    sources: list[dict[str, Any]] = [
        {"token_files": [f"{tmp_path}/*.bin"], "token_dtype": "uint16", "weight": 3, "name": "flat"},
        {"token_files": [f"{tmp_path}/rows.jsonl"], "weight": 1.5},
        {"dataset": "user/far:part", "weight": 0.5},
    ]
    arguments = [*PLAIN, "--schedule.total_tokens", "1966080", "--data.sources", json.dumps(sources)]
    lines = table(*arguments)
    assert lines["flat"] == "0.6 x 1,966,080 = 1,179,648, 23.59 passes over its 50,000"
    assert lines["rows"] == "0.3 x 1,966,080 = 589,824"
    assert values(*arguments)["data"] == {"flat": 1_179_648, "rows": 589_824, "far-part": 196_608}
    assert "data" not in values(*PLAIN)
    (tmp_path / "train.bin").write_bytes(b"odd")
    with pytest.raises(RecipeError, match=r"train\.bin has 3 bytes of ids, no whole number of uint16"):
        planned(arguments)
    np.zeros(50_000, dtype="<u2").tofile(tmp_path / "train.bin")
    heavy = "{'torch', 'pandas', 'pyarrow', 'datasets', 'transformers'}"
    code = f"import sys; from recipe.commands.plan import main; main(); sys.exit(bool({heavy} & {{*sys.modules}}))"
    done = run([sys.executable, "-c", code, *arguments], fork=False)
    assert done.returncode == 0, done.stderr
    assert "23.59 passes" in done.stdout


def test_time_and_cost_follow_from_peak_mfu_and_price() -> None:
    """1,315,819,520 parameters, 2048^2 of positions: 6 N + 12 L d T = 9,077,710,848 FLOP a token; 989 TFLOP/s on an H100."""
    time = values(*LARGE, "--device", "h100", "--world_size", "8", "--mfu", "0.5", "--price_per_hour", "2")["run"]
    assert time["flops_per_token"] == 6 * (1_315_819_520 - 2048 * 2048) + 12 * 24 * 2048 * 2048
    assert time["tokens_per_second"] == pytest.approx(0.5 * 989e12 * 8 / time["flops_per_token"])
    assert time["hours"] == pytest.approx(50_195 * 524_288 / time["tokens_per_second"] / 3600)
    assert time["cost"] == pytest.approx(time["hours"] * 8 * 2)


def test_ranks_wait_for_the_one_with_most_blocks() -> None:
    """64 lanes on 7 ranks are 10 for some of them, where 64 / 7 would be enough for all."""
    even, uneven = (values(*LARGE, "--device", "h100", "--world_size", ranks)["run"] for ranks in ("8", "7"))
    assert (uneven["tokens_per_second"] / 7) / (even["tokens_per_second"] / 8) == pytest.approx(64 / 70)


def test_a_cpu_has_this_machines_memory_and_no_peak() -> None:
    one, two = (values(*PLAIN, "--device", "cpu", "--world_size", ranks) for ranks in ("1", "2"))
    assert one["run"]["hours"] is None
    usable = [found["memory_of_a_rank"]["fp32_state"]["usable_bytes"] for found in (one, two)]
    assert 1e8 < usable[1] == usable[0] / 2
    assert values(*PLAIN, "--device", "cpu", "--flops", "1e11")["run"]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "h1000"], ["h1000", "h100", "a100-40gb", "cpu", "--memory_gb"]),
        (["--mfu", "40"], ["mfu = 40.0", "at most 1", "0.4 is 40 %"]),
        (["--mfu", "0"], ["mfu = 0", "at least 0.0001"]),
        (["--flops", "1e-300"], ["flops = 1e-300", "at least 1,000,000"]),
        (["--world_size", "0"], ["world_size = 0", "at least 1"]),
        (
            ["--memory_gb", "16"],
            ["block of 2,048 tokens needs 28.5 GB", "_checkpointing 1 --optimizer.state bf16 (11.9 GB)"],
        ),
        (["--memory_gb", "20"], ["92 % of 20.0 GB are 18.4 GB", "--optimizer.state bf16 (15.3 GB)"]),
        (["--devise", "h100"], ["devise", "did you mean device"]),
    ],
)
def test_mistakes_are_answered_with_what_would_be_valid(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        planned([*LARGE, *arguments])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 6, 64])
@pytest.mark.parametrize("memory_gb", [40, 80, 1000])
@pytest.mark.parametrize("more", [[], ["--performance.activation_checkpointing", "1"], ["--optimizer.state", "bf16"]])
def test_largest_micro_batch_fits_and_one_accumulation_step_less_does_not(
    world_size: int, memory_gb: int, more: list[str]
) -> None:
    """Between two numbers of accumulation steps there is nothing to choose: the micro-batches are the same."""
    config, usable = load_config([*LARGE, *more]), USABLE_SHARE * memory_gb * 1e9

    def peak(size: int) -> int:
        return estimate_memory(config, size, "cuda", "bf16", world_size).peak_bytes

    size = largest_micro_batch(config, world_size, memory_gb * 1e9, "cuda", "bf16")
    batch = config.batch
    update = UpdatePlan(batch.tokens_per_update, config.data.sequence_length, batch.lanes, world_size, size)
    assert peak(size) <= usable
    assert 1 <= size == update.largest_micro_batch <= update.largest_share
    steps = update.gradient_accumulation_steps
    assert all(peak(-(-update.largest_share // fewer)) > usable for fewer in range(1, steps))


def test_auto_is_the_largest_micro_batch_where_memory_is_known() -> None:
    auto = ["--batch.micro_batch_size", "auto"]
    found = values(*LARGE, *auto, "--device", "h100")
    assert found["plan"]["micro_batch_size"] == found["memory_of_a_rank"]["fp32_state"]["largest_micro_batch"]
    unknown = values(*LARGE, *auto)
    assert unknown["plan"]["micro_batch_size"] is None
    assert table(*LARGE, *auto)["micro batch size"] == "auto: as many blocks as fit into memory"
    config = load_config([*LARGE, *auto])
    assert make_plan(config, 8, 11).update.gradient_accumulation_steps == 3
    assert make_plan(config, 8).micro_batch_is_auto


def test_a_preset_is_checked_without_a_device(tmp_path: Path) -> None:
    """As ./run.sh does it before anything is launched."""
    done = run(
        [sys.executable, "-m", "recipe", "plan", *LARGE, "--batch.micro_batch_size", "auto", "--resume", "fresh"],
        WORLD_SIZE="8",
    )
    assert done.returncode == 0, done.stderr
    assert "8, 8 lanes each" in done.stdout
    done = run([sys.executable, "-m", "recipe", "plan", *LARGE, "--batch.lanes", "48"], WORLD_SIZE="8")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("cuda_name", "tera_flops"),
    [
        *[("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989)],
        *[("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500)],
        *[("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-PCIE-40GB", 312)],
        *[("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121)],
        *[("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71)],
    ],
)
def test_the_peak_is_known_by_the_name_that_torch_gives(cuda_name: str, tera_flops: float) -> None:
    assert bf16_peak_flops(cuda_name) == tera_flops * 1e12


@pytest.mark.parametrize(
    "cuda_name",
    [
        *["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H200 MIG 1g.18gb"],
        *[
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 3090 Ti",
            "NVIDIA A100X",
        ],
        *[
            "NVIDIA H800",
            "NVIDIA H100",
            "GRID A100X-40C",
            "NVIDIA B200 MIG 1g.23gb",
            "NVIDIA L40G",
            "Tesla T4",
            "H100",
            "",
        ],
    ],
)
def test_the_peak_of_a_part_or_a_variant_of_a_device_is_not_known(cuda_name: str) -> None:
    assert bf16_peak_flops(cuda_name) is None


@pytest.mark.parametrize("arguments", [["--device"], ["--device", "help"], [*LARGE, "--device", "help"]])
def test_the_plan_lists_its_devices(arguments: list[str]) -> None:
    lines = planned(arguments).splitlines()
    assert [line.split()[0] for line in lines] == list(DEVICES)
    assert re.search(r"h100-nvl +94 GB +835 TFLOP/s in bf16 +3,900 GB/s +NVIDIA H100 NVL", "\n".join(lines))
