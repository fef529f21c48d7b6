"""The best learning rate by length of a run: what is fitted, and that it runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.rates import RATES, best_rate, decay_of, rate_trials, report, tokens_of, trial
from tests.support.quick_benchmark import quick_benchmark


def test_the_best_rate_is_the_minimum_of_a_parabola() -> None:
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    losses = {rate: 3 + math.log(rate / 3e-3) ** 2 for rate in rates}
    assert best_rate(losses) == pytest.approx(3e-3)
    assert best_rate({rate: -rate for rate in rates}) == 8e-3, "the edge, as it is"


def test_weight_decay_averages_over_the_share_that_it_says() -> None:
    tokens = tokens_of(20, False)
    assert 1 / (decay_of(2e-3, tokens) * 2e-3) == pytest.approx(0.22 * tokens / 4096)


def test_runs_differ_in_length_and_rate_alone() -> None:
    made = rate_trials(False)
    assert {length: len(of) for length, of in made.items()} == {length: len(rates) for length, rates in RATES.items()}
    first, second = made[20][:2]
    assert {name for name in first.settings if first.settings[name] != second.settings[name]} == {
        "optimizer.learning_rate"
    }
    assert 19 < trial(20, 1e-3).settings["schedule.total_tokens"] / 350_000 <= 20


def test_the_report_has_the_exponent_and_says_which_best_is_at_the_edge() -> None:
    done = {2: {rate: 3 + math.log(rate / 5e-3) ** 2 for rate in RATES[2]}, 20: {rate: 2 + rate for rate in RATES[20]}}
    text = report(done, {0.1: 2.001, 0.5: 1.99})
    assert f"to the power of {math.log10(1e-3 / 5e-3):.2f}. The best of 20 tokens per parameter is at the edge" in text


@pytest.mark.slow
def test_it_runs_and_writes_its_table(tmp_path: Path) -> None:
    _, page, _ = quick_benchmark("rates", tmp_path)
    assert "| tokens per parameter |" in page
