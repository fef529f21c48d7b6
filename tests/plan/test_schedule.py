"""Learning rate and times as functions of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from recipe.config.settings import OptimizerConfig, ScheduleConfig
from recipe.plan.schedule import beta2_of, crosses, half_life, learning_rate, stated_tokens

OPTIMIZER = OptimizerConfig(learning_rate=2e-4)
SCHEDULE = ScheduleConfig(warmup_tokens=1000, final_learning_rate_fraction=0.1)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, 0.0), (500, 1e-4), (1000, 2e-4), (5500, 1.1e-4), (10_000, 2e-5), (11_000, 2e-5)],
)
def test_learning_rate_at_the_points_that_define_it(tokens: int, expected: float) -> None:
    assert learning_rate(tokens, 10_000, OPTIMIZER, SCHEDULE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "decay_tokens", "tokens", "expected"),
    [
        *[("linear", None, 500, 1e-4), ("linear", None, 1000, 2e-4), ("linear", None, 5500, 1.1e-4)],
        *[
            ("linear", None, 10_000, 2e-5),
            ("wsd", None, 500, 1e-4),
            ("wsd", None, 8000, 2e-4),
            ("wsd", 3600, 6400, 2e-4),
        ],
        # A quarter of the way into the decay half of the way down, since the root of 1/4 is 1/2.
        *[
            ("wsd", None, 8500, 1.1e-4),
            ("wsd", 3600, 7300, 1.1e-4),
            ("wsd", None, 10_000, 2e-5),
            ("wsd", None, 11_000, 2e-5),
        ],
    ],
)
def test_other_shapes_at_the_points_that_define_them(
    shape: Literal["wsd", "linear"], decay_tokens: int | None, tokens: int, expected: float
) -> None:
    schedule = replace(SCHEDULE, shape=shape, decay_tokens=decay_tokens)
    assert learning_rate(tokens, 10_000, OPTIMIZER, schedule) == pytest.approx(expected, rel=1e-12)


def test_the_stable_rate_is_the_peak_to_the_last_bit_whatever_the_length() -> None:
    optimizer, schedule = OptimizerConfig(learning_rate=0.1), ScheduleConfig(warmup_tokens=10, shape="wsd")
    assert {learning_rate(t, total, optimizer, schedule) for total in (100, 999) for t in range(10, 81)} == {0.1}


@pytest.mark.parametrize("tokens", [512, 4096, 2**19, 2**30])
def test_beta2_by_half_life_forgets_half_after_that_many_tokens(tokens: int) -> None:
    optimizer = OptimizerConfig(beta2=0.5, beta2_half_life_tokens=10_000_000)
    beta2 = beta2_of(tokens, optimizer)
    if tokens < 2**20:
        assert beta2 ** (10_000_000 / tokens) == pytest.approx(0.5)
        assert half_life(tokens, beta2) == pytest.approx(10_000_000)
    else:
        assert beta2 == 0.8


def test_beta2_as_given_keeps_its_memory_in_tokens_for_another_budget() -> None:
    """The numbers of Marek et al.'s rule for 0.95 at 524,288."""
    optimizer = OptimizerConfig(beta2=0.95)
    assert beta2_of(524_288, optimizer) == 0.95
    found = [round(beta2_of(tokens, optimizer, 524_288), 4) for tokens in (131_072, 32_768, 8192, 524_288, 2**20)]
    assert found == [0.9873, 0.9968, 0.9992, 0.95, 0.9025]
    assert beta2_of(2**23, optimizer, 524_288) == 0.8
    assert beta2_of(2**23, OptimizerConfig(beta2=0.7), 524_288) == 0.7, "what was given is no mistake"
    assert beta2_of(2**23, OptimizerConfig(beta2=0.0), 524_288) == half_life(2**23, 0.0) == 0


def test_without_warmup_the_first_token_has_the_peak() -> None:
    assert learning_rate(0, 10_000, OPTIMIZER, ScheduleConfig(warmup_tokens=0)) == 2e-4


def test_the_length_is_that_of_the_tokens_or_of_the_parameters() -> None:
    assert stated_tokens(ScheduleConfig(total_tokens=1001), 7) == 1001
    assert stated_tokens(ScheduleConfig(tokens_per_parameter=20), 1_315_819_520) == 26_316_390_400


def test_crossings_do_not_depend_on_the_size_of_the_step() -> None:
    fine = [t for t in range(10, 1001, 10) if crosses(t - 10, t, 250)]
    coarse = [t for t in range(40, 1001, 40) if crosses(t - 40, t, 250)]
    assert fine == [250, 500, 750, 1000]
    assert coarse == [280, 520, 760, 1000]
