"""FSDP2's silent faults, each of which was seen once: none of them is in a run of the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import SCRIPT, read_events, read_ledger, run_ranks, tiny_run, write_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["full", "hybrid"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks, or two hosts of two, of `tests.support.sharding_traps` found."""
    result = tmp_path_factory.mktemp("traps") / "found.json"
    ranks, hosts = (2, {}) if request.param == "full" else (4, {"LOCAL_WORLD_SIZE": "2"})
    run_ranks(ranks, ["-m", "tests.support.sharding_traps", str(result), request.param], **hosts)
    values: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return values


def test_an_abandoned_update_leaves_no_gradient_behind(found: dict[str, Any]) -> None:
    assert found["abandoned"] < 1e-12


def test_a_forward_without_backward_leaves_parameters_cut(found: dict[str, Any]) -> None:
    assert found["forward"] == [True, True]


def test_embedding_and_output_layer_stay_one_and_weights_begin_as_on_one_rank(found: dict[str, Any]) -> None:
    assert found["ties"] == [True, True, True]


def test_under_autocast_gradients_are_added_up_in_float32(found: dict[str, Any]) -> None:
    """In bf16 they would be 2e-3 apart, and a cast that outlives its micro-batch would take old weights: 0.4."""
    assert found["bf16"]["kinds"] == ["torch.float32", "torch.float64"]
    assert found["bf16"]["difference"] < 1e-5


def test_accelerates_example_launch_file_unties_nothing(tmp_path: Path) -> None:
    """`fsdp_cpu_ram_efficient_loading: true` there would: gradient norms 4e-4 apart from the first update on."""
    write_texts(tmp_path / "texts")
    three = ["--run.max_updates", "3"]
    launch_file = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    launch_file["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    run_ranks(1, [SCRIPT, *tiny_run(tmp_path / "plain", *three)])
    output = run_ranks(2, [SCRIPT, *tiny_run(tmp_path / "sharded", *three)], **launch_file)
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING = true, from accelerate's configuration, has no effect here" in output
    (start,) = read_events(tmp_path / "sharded", "start")
    assert start["world_size"] == 2
    plain, sharded = read_ledger(tmp_path / "plain"), read_ledger(tmp_path / "sharded")
    for column in ("loss", "grad_norm"):
        assert [line[column] for line in sharded] == pytest.approx([line[column] for line in plain], rel=1e-6)
