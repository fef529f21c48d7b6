"""The tables of scaling: every block is counted, and what does not fit or has no block is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import COVERED, RANKS, RUNS, covered, modelled
from recipe.errors import RecipeError
from recipe.plan.budget import UpdatePlan
from tests.helpers import run


def test_a_block_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert covered(7) == {"steps": 2341, "largest share": 9363, "busy": COVERED.blocks_per_update / (7 * 9363)}
    lanes = UpdatePlan.lanes_of_rank
    monkeypatch.setattr(
        UpdatePlan, "lanes_of_rank", lambda plan, rank: lanes(plan, rank)[1:] if rank == 3 else lanes(plan, rank)
    )
    with pytest.raises(RecipeError, match="rank 3 of 7: a micro-batch begins at block"):
        covered(7)


def test_tables_say_what_does_not_fit_and_where_no_block_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    small, _, large = RUNS
    assert modelled(small, 512, None) == {}
    found = modelled(large, 16, 40.0)
    assert found["DDP"] is None
    assert found["full"] is not None
    assert found["full"][0] < 1
    assert found["busy"] == (1, 128)
    assert modelled(large, 8, 40.0) == modelled(large, 8, None), "a host needs no network"


@pytest.mark.slow
def test_scaling_benchmark_writes_its_tables(tmp_path: Path) -> None:
    done = run([sys.executable, "-m", "benchmarks.scaling", "--quick", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    (text,) = tmp_path.glob("*-scaling.md")
    values = json.loads(text.with_suffix(".json").read_text(encoding="utf-8"))
    assert [*values["coverage"]] == [str(ranks) for ranks in RANKS[:6]]
    assert all(run in text.read_text(encoding="utf-8") for run in RUNS)
    assert text.with_suffix(".png").stat().st_size > 10_000
