"""Muon against AdamW: what is compared, what its table says, and that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.optimizers import RATES, report, trial
from tests.support.quick_benchmark import quick_benchmark


def test_runs_of_a_model_differ_in_optimizer_rate_and_seed_alone() -> None:
    first, second = trial(("10 M", "adamw"), 1e-3, 1), trial(("10 M", "muon"), 2e-3, 2)
    assert first.name != second.name
    differing = {name for name in first.settings if first.settings[name] != second.settings[name]}
    assert differing == {"optimizer.name", "optimizer.learning_rate", "run.seed"}


def test_the_table_has_the_best_rate_s_seeds_and_says_when_it_is_at_the_edge() -> None:
    def of(loss: float, seconds: float = 1.0) -> dict[str, float]:
        return {"validation_loss": loss, "train_seconds": seconds}

    done = {
        ("10 M", "adamw"): {1e-3: [of(4.2)], 2e-3: [of(4.0, 2), of(4.2, 2), of(4.1, 2)], 4e-3: [of(4.3)]},
        ("10 M", "muon"): {5e-3: [of(3.5, 3), of(3.6, 3), of(3.7, 3)], 1e-2: [of(3.6)]},
    }
    adamw, muon = (line for line in report(done).splitlines() if line.startswith("| 10 M"))
    assert "| 4.200 at 0.001, 4.000 at 0.002, 4.300 at 0.004 | 4.000, 4.200, 4.100 | 4.100 | 0.100 | no |" in adamw
    assert "| 3.500, 3.600, 3.700 | 3.600 | 0.100 | yes |" in muon
    assert "1.50 times as long of 10 M parameters" in report(done)


@pytest.mark.slow
def test_it_runs_and_writes_its_table(tmp_path: Path) -> None:
    _, page, outcomes = quick_benchmark("optimizers", tmp_path)
    assert page.count("| 10 M |") == 2
    assert len(outcomes) == sum(map(len, RATES.values())) + 2 * len(RATES)
