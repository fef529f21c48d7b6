"""Where data parallelism ends, and the model of time: against sums by hand, and against its limits."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.commands.plan import planned
from recipe.config.command_line import load_config
from recipe.config.settings import Config, Sharding
from recipe.plan.budget import UpdatePlan
from recipe.plan.devices import DEVICES, Links, Machine
from recipe.plan.memory import parameter_count
from recipe.plan.scaling import exposed_reduction, update_seconds
from tests.helpers import ROOT, TINY, run_ranks

LARGE = ("--config", str(ROOT / "configs/gpt2-1.3b.yaml"))
H100 = ("--device", "h100")
SHAPE_7B = ("--model.n_layer", "32", "--model.n_embd", "4096", "--model.n_head", "32")
FOUR_MILLION = ("--batch.tokens_per_update", "4194304", "--batch.lanes", "2048")
SHARDINGS = get_args(Sharding)

# Of gpt2-1.3b: 1,315,819,520 parameters, all but 50,304 + 2,048 + 2 rows of 2,048 in blocks; 9,077,710,848 FLOP a token
PARAMETERS, IN_BLOCKS = 1_315_819_520, 1_315_819_520 - 52_354 * 2048
BLOCK_SECONDS = 2048 * 9_077_710_848 / (0.4 * 989e12)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@cache
def tables(*arguments: str) -> dict[str, Any]:
    """The command's JSON."""
    found: dict[str, Any] = json.loads(planned([*LARGE, *arguments, "--json"]))
    return found


def model(ranks: int, *arguments: str) -> dict[str, Any]:
    """The section of the model: key -> {value, unit, derivation}."""
    section: dict[str, Any] = tables("--world_size", str(ranks), *arguments)["scaling_model"]
    return section


def efficiencies(ranks: int, *arguments: str) -> list[float | None]:
    """Of DDP, full and hybrid."""
    section = model(ranks, *arguments)
    return [section[f"{way}_efficiency"]["value"] for way in ("DDP", "full", "hybrid")]


@cache
def sharded(sharding: Sharding) -> Config:
    config = load_config(LARGE)
    return replace(config, performance=replace(config.performance, sharding=sharding))


def test_the_plan_says_how_busy_ranks_are_and_where_data_parallelism_ends() -> None:
    found = tables("--world_size", "7", "--batch.lanes", "256")["plan"]
    assert found["busy_share"]["value"] == pytest.approx(256 / (7 * 37))
    assert found["busy_share"]["derivation"].startswith(
        "98.8\N{NO-BREAK SPACE}%: 256 blocks / (7 ranks x 37 of the largest share)"
    )
    found = tables("--world_size", "63")["plan"]["most_ranks"]
    assert found["value"] == 64
    assert found["derivation"].startswith(
        "64, a lane each; 256 with --batch.lanes 256, a block each. More need a larger update"
    )
    assert tables("--world_size", "63", "--batch.lanes", "256")["plan"]["most_ranks"]["derivation"].startswith(
        "256, a lane each. More"
    )
    text = planned([*LARGE, "--world_size", "63"])
    assert "busy share" in text
    assert "busy share" not in planned(LARGE), "one rank waits for nobody"


def test_most_ranks_is_what_is_not_refused_and_holds_for_every_phase() -> None:
    schedule = json.dumps([{"from_tokens": 10**10, "tokens_per_update": 786_432}])
    growing = ["--batch.schedule", schedule]
    found = tables("--world_size", "64", *growing)["plan"]["most_ranks"]["derivation"]
    assert "128 with --batch.lanes 128" in found, "which divides 256 blocks and 384"
    assert tables("--world_size", "128", "--batch.lanes", "128", *growing)["plan"]["busy_share"]["value"] == 1


def test_time_on_sixteen_gpus_by_hand() -> None:
    """Two hosts: 0.8 x 450 GB/s in each, 0.8 x 8 x 50 between them; 16 blocks of a rank in micro-batches of 4."""
    arithmetic = 16 * BLOCK_SECONDS
    assert efficiencies(16, *H100) == [1, 1, 1], "all is hidden"
    slow = ("--link_gb_per_second", "25")
    ddp = arithmetic + 2 * 15 / 16 * 4 * PARAMETERS / 25e9 - 2 / 3 * 4 * BLOCK_SECONDS
    forward, backward = 15 / 16 * 4 * PARAMETERS / 25e9, 15 / 16 * 4 * (IN_BLOCKS + PARAMETERS) / 25e9
    assert forward > 1 / 3 * 4 * BLOCK_SECONDS, "gathering takes longer than forward"
    full = 4 * (forward + backward)
    hybrid = 4 * (1 / 3 * 4 * BLOCK_SECONDS + 2 * 1 / 2 * 4 * PARAMETERS / 25e9)  # in the host it is hidden: 360 GB/s
    wanted = [arithmetic / seconds for seconds in (ddp, full, hybrid)]
    assert efficiencies(16, *H100, *slow) == pytest.approx(wanted)
    assert wanted[1] < wanted[2] < wanted[0]


def test_ddp_reduces_behind_the_last_micro_batch_which_is_a_small_one() -> None:
    update = UpdatePlan(10 * 2048, 2048, 10, 2, 4)
    assert [len(blocks) for blocks in update.micro_batches(1)] == [3, 2]
    exposed = exposed_reduction(sharded("none"), update, BLOCK_SECONDS, Links(40e9, 40e9))
    assert exposed == pytest.approx(4 * PARAMETERS / 40e9 - 2 / 3 * 2 * BLOCK_SECONDS)


def test_on_one_host_hybrid_is_full_and_a_measured_link_takes_the_place_of_nvlink() -> None:
    ddp, full, hybrid = efficiencies(8, *H100, "--link_gb_per_second", "20")
    assert ddp is not None
    assert full == hybrid
    assert full is not None
    assert full < ddp < 1, "DDP reduces once, and not in each micro-batch"
    assert model(8, *H100)["bus_bandwidth"]["value"] == pytest.approx(0.8 * 450e9)
    assert model(16, *H100)["bus_bandwidth"]["value"] == pytest.approx(0.8 * 400e9)
    assert model(16, "--device", "a100")["bus_bandwidth"]["value"] == pytest.approx(0.8 * 200e9)


def test_each_way_takes_its_own_largest_micro_batch_with_auto_and_says_what_does_not_fit() -> None:
    auto = ("--batch.micro_batch_size", "auto", "--performance.sharding", "full", *FOUR_MILLION)
    section = model(16, *H100, *auto)
    sizes = [section[f"{way}_micro_batch_size"]["value"] for way in ("DDP", "full", "hybrid")]
    assert len(set(sizes)) > 1
    ddp = tables("--world_size", "16", *H100, *FOUR_MILLION, "--batch.micro_batch_size", "auto")["plan"]
    assert sizes[0] == ddp["micro_batch_size"]["value"]
    large = model(16, *H100, *auto, *SHAPE_7B)
    assert large["DDP_efficiency"]["value"] is None
    assert large["DDP_efficiency"]["derivation"] == "not one block fits into memory"
    assert large["full_efficiency"]["value"] > 0
    given = model(16, *H100, *FOUR_MILLION, "--batch.micro_batch_size", "64", "--performance.sharding", "full")
    assert "micro-batches of 64 do not fit into memory, of" in given["full_efficiency"]["derivation"]


@pytest.mark.parametrize(
    ("ranks", "arguments", "words"),
    [
        (12, [], "not on 12 ranks, which are no whole number of hosts of 8"),
        (16, ["--optimizer.name", "muon"], "not with Muon, nor with bf16 state"),
        (16, ["--optimizer.state", "bf16"], "not with Muon, nor with bf16 state"),
    ],
)
def test_what_cannot_be_sharded_has_no_efficiency(ranks: int, arguments: list[str], words: str) -> None:
    found = model(ranks, *H100, *arguments)
    assert (found["hybrid_efficiency"]["value"], found["hybrid_efficiency"]["derivation"]) == (None, words)
    assert found["DDP_efficiency"]["value"] > 0


def test_nothing_is_modelled_without_other_ranks_a_peak_or_links() -> None:
    assert "scaling_model" not in tables(*H100)
    assert "scaling_model" not in tables("--world_size", "8")
    pcie = model(8, "--device", "l40s", "--memory_gb", "80")
    assert [*pcie] == ["bus_bandwidth"]
    assert "--link_gb_per_second" in pcie["bus_bandwidth"]["derivation"]
    assert None not in efficiencies(16, "--device", "l40s", "--memory_gb", "80", "--link_gb_per_second", "20")
    assert "not know" in model(16, "--device", "gb200")["bus_bandwidth"]["derivation"]


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(st.integers(1, 512), st.integers(1, 8), st.integers(1, 8), st.floats(1e9, 1e12), st.sampled_from(SHARDINGS))
def test_no_way_is_faster_than_its_ranks_and_links_allow(
    lanes: int, blocks: int, size: int, link: float, sharding: Sharding
) -> None:
    """Links without end leave the wait for the largest share alone; slower ones never make it shorter."""
    hosts = max(1, lanes // 16)
    ranks = 8 * hosts if lanes >= 8 else lanes
    update = UpdatePlan(lanes * blocks * 2048, 2048, lanes, ranks, size)
    config = sharded(sharding)
    endless = update_seconds(config, update, BLOCK_SECONDS, Links(1e30, 1e30))
    ideal = BLOCK_SECONDS * update.blocks_per_update / ranks
    assert ideal / endless == pytest.approx(update.busy_share)
    fast, slow = (update_seconds(config, update, BLOCK_SECONDS, Links(2 * link, factor * link)) for factor in (1, 0.5))
    assert endless * (1 - 1e-12) <= fast <= slow


def test_links_without_a_device_are_those_that_were_measured() -> None:
    assert Machine(None, 1e15, None).links(16, 8) is None
    assert Machine(None, 1e15, 50e9).links(16, 8) == Links(50e9, 50e9)
    assert Machine(DEVICES["h100"], 1e15, 50e9).links(16, 8) == Links(0.8 * 450e9, 50e9)
    assert Machine(DEVICES["h100"], 1e15, None).links(16, 4) == Links(0.8 * 450e9, 0.8 * 200e9)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["full", "hybrid"])
def test_what_the_model_says_is_sent_is_what_four_ranks_send(sharding: str, tmp_path: Path) -> None:
    """In each of three micro-batches the parameters of blocks twice, the others once, and all gradients, in float32.

    Widths and rows divide by the ranks, so that nothing is padded; two ranks are a host.
    """
    steps, hosts = 3, {"LOCAL_WORLD_SIZE": "2"} if sharding == "hybrid" else {}
    batch = ["--batch.tokens_per_update", str(64 * 8 * steps), "--batch.micro_batch_size", "2", "--batch.lanes", "8"]
    arguments = [*TINY, *batch, "--performance.sharding", sharding, "--optimizer.name", "adamw"]
    run_ranks(4, ["-m", "tests.support.sent_bytes", str(tmp_path / "bytes"), *arguments], **hosts)
    config = load_config(arguments)
    parameters = 4 * parameter_count(config.model, config.n_positions)
    in_blocks = parameters - 4 * parameter_count(replace(config.model, n_layer=0), config.n_positions)
    sent = {"gathered": steps * (parameters + in_blocks), "reduced to shares": steps * parameters}
    if sharding == "hybrid":
        sent["reduced between hosts"] = steps * parameters // 2  # a rank's part, of the two of a host
    found = json.loads((tmp_path / "bytes").read_text("utf-8"))
    assert {kind: size for kind, size in found.items() if size} == sent
