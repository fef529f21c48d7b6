"""What a plan says of the size of an update: published fits, the device's floor, a smaller update."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipe.commands.plan import planned
from recipe.model.muon import orthogonalised
from recipe.plan.batch_fits import BEST_LEARNING_RATE, BEST_TOKENS_PER_UPDATE, CRITICAL_TOKENS_PER_UPDATE, RunSize
from recipe.plan.devices import DEVICES
from tests.helpers import ROOT

# Thousand tokens by Li, Bergsma, Bi, Porian, and Zhang's limit; rates by Li, Bi, Porian. Worked out apart from the code, by
# logarithms; Zhang's by their fit in parameters.
TABLE = {
    "124m": ([135, 249, 277, 362, 458], [3.05e-3, 1.62e-3, 4.47e-3]),
    "355m": ([245, 372, 549, 726, 744], [1.70e-3, 1.25e-3, 3.16e-3]),
    "774m": ([382, 501, 914, 1220, 1073], [1.18e-3, 1.03e-3, 2.44e-3]),
    "1.3b": ([517, 614, 1292, 1735, 1376], [9.46e-4, 9.00e-4, 2.04e-3]),
    "1.5b": ([569, 655, 1444, 1943, 1489], [8.65e-4, 8.62e-4, 1.93e-3]),
}
SOURCES = (("Li", 2025), ("Bergsma", 2025), ("Bi", 2024), ("Porian", 2024))
GPU = ("--device", "h100")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@cache
def batch(preset: str, *arguments: str) -> dict[str, Any]:
    """The section in JSON: key -> {value, unit, derivation}."""
    config = ["--config", str(ROOT / f"configs/{preset}.yaml")]
    section: dict[str, Any] = json.loads(planned([*config, *arguments, "--json"]))["batch"]
    return section


@cache
def page(preset: str, *arguments: str) -> list[str]:
    """The section's lines."""
    text = planned(["--config", str(ROOT / f"configs/{preset}.yaml"), *arguments])
    (section,) = [part for part in text.split("\n\n") if part.startswith("batch\n")]
    return section.splitlines()[1:]


@pytest.mark.parametrize("preset", TABLE)
def test_published_fits_of_the_presets(preset: str) -> None:
    found, (tokens, rates) = batch(f"gpt2-{preset}"), TABLE[preset]
    keys = [*(f"best_by_{name}_{year}" for name, year in SOURCES), "limit_by_Zhang_2024"]
    assert [found[key]["value"] / 1000 for key in keys] == pytest.approx(tokens, rel=4e-3)
    rate_keys = [f"best_rate_by_{name}_{year}" for name, year in SOURCES if name != "Bergsma"]
    assert [found[key]["value"] for key in rate_keys] == pytest.approx(rates, rel=4e-3)
    assert found["these_differ"]["value"] == pytest.approx(max(tokens[:4]) / min(tokens[:4]), rel=4e-3)


def test_a_run_beyond_a_fit_s_range_is_told_so_and_what_nobody_could_check_is_as_reported() -> None:
    lines = {line[2:].split("  ")[0]: line for line in page("gpt2-1.3b", *GPU)}
    assert "(arXiv:2503.04715), beyond its 60 M to 1 B parameters" in lines["best by Li 2025"]
    assert lines["best by Bergsma 2025"].endswith("614,000 = 2,048 x 0.0306 D^0.383 (arXiv:2505.13738, as reported)")
    assert "beyond its 1e+17 to 2e+19 FLOP" in lines["best by Bi 2024"]
    small = {line[2:].split("  ")[0]: line for line in page("gpt2-124m")}
    assert [name for name, line in small.items() if "beyond" in line] == ["best by Porian 2024"]
    assert max(map(len, lines.values())) <= 150


def test_ranges_are_those_of_parameters_tokens_or_arithmetic() -> None:
    li, bergsma, bi, porian = BEST_TOKENS_PER_UPDATE
    inside = RunSize(parameters=110_000_000, inner_parameters=85_000_000, tokens=2_200_000_000)
    assert [fit.source for fit in (*BEST_TOKENS_PER_UPDATE, CRITICAL_TOKENS_PER_UPDATE) if fit.beyond(inside)] == [
        bergsma.source
    ]
    long = RunSize(parameters=110_000_000, inner_parameters=85_000_000, tokens=200_000_000_000)
    assert li.beyond(long) == ["2 B to 100 B tokens"]
    assert bi.beyond(long) == ["1e+17 to 2e+19 FLOP"]
    assert porian.beyond(long) == ["500 M to 2.2 B tokens"]
    assert all(fit.citation.startswith("arXiv:") for fit in (*BEST_LEARNING_RATE, *BEST_TOKENS_PER_UPDATE))


def test_a_run_outside_every_range_gets_one_plain_line_and_json_has_the_numbers() -> None:
    (*_, line) = page("quickstart", "--device", "cpu")
    assert line == (
        "  published fits  none was made for 1,088,256 parameters and 983,040 tokens: their models have 25 M to 3.3 B "
        "parameters, and most runs 20 tokens for each"
    )
    assert [line.split("  ")[1] for line in page("quickstart")] == ["this run", "floor", "published fits"]
    found = batch("quickstart")
    assert found["best_by_Li_2025"]["value"] == pytest.approx(0.58 * 983_040**0.571)
    assert found["best_by_Bergsma_2025"]["value"] == pytest.approx(12_400, rel=4e-3)
    assert "smaller_update" not in found, "nobody tried models so small"


def test_floor_of_one_gpu() -> None:
    """40 bytes of 1,315,819,520 parameters at 0.9 x 3.35 TB/s are 17.5 ms: 2 % of the time of 38,030 tokens."""
    found = batch("gpt2-1.3b", *GPU)
    seconds = 40 * 1_315_819_520 / (0.9 * 3.35e12)
    assert found["floor"]["value"] == pytest.approx(seconds / 0.02 * 0.4 * 989e12 / 9_077_710_848)
    assert found["floor"]["derivation"].startswith("38,000: from there the optimizer's 17.5 ms take 2 % of an update")
    half = batch("gpt2-1.3b", *GPU, "--optimizer.state", "bf16")
    assert half["floor"]["value"] == pytest.approx(found["floor"]["value"] / 2)


def test_floor_of_muon_has_the_products_of_its_step() -> None:
    """As torch counts them for a block's matrices of width 32."""
    width = 32
    with FlopCounterMode(display=False) as counted:
        for rows, columns in [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]:
            orthogonalised(torch.ones(rows, columns), torch.float32)
    seconds = counted.get_total_flops() / width**3 * 24 * 2048**3 / (0.4 * 989e12)
    adamw, muon = (batch("gpt2-1.3b", *GPU, "--optimizer.name", name)["floor"]["value"] for name in ("adamw", "muon"))
    assert muon - adamw == pytest.approx(seconds / 0.02 * 0.4 * 989e12 / 9_077_710_848)
    assert muon == pytest.approx(379_000, rel=1e-3)


def test_floor_of_several_gpus_has_what_backward_does_not_hide() -> None:
    """Ring all-reduce: 2 x 15 / 16 x 4 bytes of each parameter at 50 GB/s are 197 ms, backward of 4 x 2,048 tokens is 125."""
    one = batch("gpt2-1.3b", *GPU)["floor"]["value"]
    node = batch("gpt2-1.3b", *GPU, "--world_size", "8")["floor"]
    assert node["value"] == pytest.approx(8 * one), "NVLink is faster than backward"
    more = ["--world_size", "16"]
    hosts = batch("gpt2-1.3b", *GPU, *more)["floor"]["value"]
    assert hosts == pytest.approx(16 * one), "so are eight network adapters in each host"
    slow = batch("gpt2-1.3b", *GPU, *more, "--link_gb_per_second", "50")["floor"]
    speed = 0.4 * 989e12 / 9_077_710_848
    exposed = 2 * 15 / 16 * 4 * 1_315_819_520 / 50e9 - 2 / 3 * 8192 / speed
    assert slow["value"] == pytest.approx(16 * (one + exposed / 0.02 * speed))
    assert slow["derivation"].endswith("; this run is below")
    pcie = batch("gpt2-1.3b", "--device", "l40s", "--memory_gb", "80", "--world_size", "2")["floor"]
    assert pcie["value"] is None, "it has no NVLink"
    assert "--link_gb_per_second" in pcie["derivation"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "not known: give --device h100, or another one"),
        (["--device", "cpu", "--precision", "bf16"], "not known for a CPU"),
        ([*GPU, "--precision", "fp32"], "not known: give --flops"),
    ],
)
def test_a_floor_that_is_not_known_is_no_number(arguments: list[str], why: str) -> None:
    floor = batch("gpt2-124m", *arguments)["floor"]
    assert (floor["value"], floor["derivation"]) == (None, why)
    assert batch("gpt2-124m", *arguments)["smaller_update"]["value"] == 131_072, "half, since where it ends is unknown"


def test_a_smaller_update_keeps_beta2_s_memory_in_tokens_and_stays_above_the_floor() -> None:
    found = batch("gpt2-1.3b", *GPU)
    assert found["smaller_update"]["value"] == 131_072, "64 lanes of 2,048 tokens; the floor is lower"
    assert found["beta2_of_the_smaller_update"]["value"] == pytest.approx(0.95**0.25)
    assert "beta2 0.9873 (Marek 2025, arXiv:2507.07101), at most 2 % slower here" in "\n".join(page("gpt2-1.3b", *GPU))
    fewer_lanes = batch("gpt2-1.3b", *GPU, "--batch.lanes", "8")["smaller_update"]["value"]
    assert fewer_lanes == 65_536, "32,768 is below the floor"
    by_tokens = batch("gpt2-1.3b", *GPU, "--optimizer.beta2_half_life_tokens", "7000000")
    assert by_tokens["beta2_of_the_smaller_update"]["value"] == pytest.approx(0.5 ** (131_072 / 7e6))
    assert "smaller_update" not in batch("gpt2-1.3b", *GPU, "--world_size", "8")
    assert "smaller_update" not in batch("gpt2-1.3b", *GPU, "--optimizer.name", "sgd")


def test_a_run_whose_updates_grow_is_named_with_all_of_them_and_gets_no_smaller_one() -> None:
    steps = json.dumps([{"from_tokens": 10**10, "tokens_per_update": 1_048_576}])
    found = batch("gpt2-1.3b", *GPU, "--batch.schedule", steps)
    assert found["this_run"]["derivation"] == "524,288, then 1,048,576 tokens per update, 34,635 updates"
    assert "smaller_update" not in found


def test_every_gpu_has_a_bandwidth() -> None:
    assert all(device.memory_bytes_per_second for name, device in DEVICES.items() if name != "cpu")
    assert DEVICES["h100"].link_bytes_per_second == 450e9
