"""Budgets that change within a run, against a loop that counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.config.command_line import load_config, read_config, write_config
from recipe.config.settings import (
    BatchConfig,
    BudgetChange,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from recipe.plan.memory import USABLE_SHARE, estimate_memory, largest_micro_batch
from recipe.plan.run_plan import make_plan
from tests.helpers import TINY, expect_error


def counted(batch: BatchConfig) -> Iterator[tuple[int, int, int]]:
    """(update, tokens before it, tokens of it), one after the other."""
    seen, update = 0, 1
    while True:
        size = batch.tokens_per_update
        for change in batch.schedule:
            if seen >= change.from_tokens:
                size = change.tokens_per_update
        yield update, seen, size
        seen, update = seen + size, update + 1


def configured(batch: BatchConfig, **schedule: Any) -> Config:
    shape = ModelConfig(n_layer=1, n_embd=8, n_head=1)
    timing = ScheduleConfig(warmup_tokens=0, **schedule)
    return Config(batch=batch, data=DataConfig(sequence_length=4), model=shape, schedule=timing)


@st.composite
def batches(draw: st.DrawFn) -> BatchConfig:
    lanes = draw(st.integers(1, 3))
    sizes = st.integers(1, 9).map(lambda blocks: 4 * lanes * blocks)
    starts = sorted(draw(st.sets(st.integers(1, 400), max_size=4)))
    changes = tuple(BudgetChange(start, draw(sizes)) for start in starts)
    return BatchConfig(tokens_per_update=draw(sizes), lanes=lanes, schedule=changes)


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(batches(), st.integers(1, 1500))
def test_tokens_and_budget_of_any_update_are_those_that_a_loop_counts(batch: BatchConfig, total: int) -> None:
    plan, reached = make_plan(configured(batch, total_tokens=total), 1), 0
    assert plan.tokens_after(0) == 0
    for update, before, size in islice(counted(batch), 150):
        assert plan.tokens_after(update - 1) == before
        assert plan.tokens_after(update) == before + size
        assert plan.update_at(update).tokens_per_update == size
        assert plan.phase_at(update).rate_factor == pytest.approx(math.sqrt(size / batch.tokens_per_update))
        reached += before < total
    starts = [phase.first_update for phase in plan.phases]
    assert starts == sorted({*starts}), "a phase has an update at least"
    if plan.total_updates < 150:
        assert plan.total_updates == reached, "the first that has all tokens is the last"
    assert plan.total_tokens - plan.update_at(plan.total_updates).tokens_per_update < total <= plan.total_tokens
    assert all(phase.first_update <= plan.total_updates for phase in plan.reached_phases)


def test_what_a_budget_does_to_rate_and_memory() -> None:
    batch = BatchConfig(tokens_per_update=400, lanes=1, schedule=(BudgetChange(800, 1600), BudgetChange(4000, 100)))
    by_rule = {
        rule: make_plan(configured(batch, learning_rate_rule=rule), 1).phases for rule in ("none", "sqrt", "linear")
    }
    factors = {rule: [phase.rate_factor for phase in phases] for rule, phases in by_rule.items()}
    assert factors == {"none": [1, 1, 1], "sqrt": [1, 2, 0.5], "linear": [1, 4, 0.25]}
    betas = [phase.beta2 for phase in by_rule["none"]]
    assert betas == [0.95, pytest.approx(0.95**4), pytest.approx(0.95**0.25)]
    config = configured(batch)
    half_life = OptimizerConfig(beta2_half_life_tokens=8000, beta2=0.5)
    phases = make_plan(Config(**vars(config) | {"optimizer": half_life}), 1).phases
    assert [phase.beta2 for phase in phases] == pytest.approx([0.5**0.05, 0.5**0.2, 0.5**0.0125])
    sgd = make_plan(Config(**vars(config) | {"optimizer": OptimizerConfig(name="sgd")}), 1)
    assert {phase.beta2 for phase in sgd.phases} == {None}


def test_every_budget_fits_where_the_plan_says_so() -> None:
    """Rows of a micro-batch, gradients that are added to, and token ids are those of the phase that takes most."""
    few, many = BudgetChange(1000, 24 * 4), BudgetChange(1000, 100 * 4)
    alone = {}
    for change in (few, many):
        batch = BatchConfig(tokens_per_update=change.tokens_per_update, lanes=4, schedule=())
        alone[change] = configured(batch)
    both = configured(BatchConfig(tokens_per_update=few.tokens_per_update, lanes=4, schedule=(many,)))

    def peak(config: Config, size: int) -> int:
        return estimate_memory(config, size, "cuda", "fp32").peak_bytes

    for size in (1, 5, 24, 100):
        assert peak(both, size) == max(peak(config, size) for config in alone.values())
    for size in (3, 13, 60):
        room = peak(both, size) / USABLE_SHARE
        found = largest_micro_batch(both, 1, room, "cuda", "fp32")
        assert math.ceil(100 / found) <= math.ceil(100 / size), "no more steps than this size has"
        assert peak(both, found) <= room * USABLE_SHARE


SCHEDULE = [{"from_tokens": 5000, "tokens_per_update": 3072}, {"from_tokens": 20_000, "tokens_per_update": 6144}]


def test_a_schedule_is_given_on_the_command_line_and_comes_back(tmp_path: Any) -> None:
    config = load_config([*TINY, "--batch.schedule", json.dumps(SCHEDULE)])
    assert config.batch.schedule == (BudgetChange(5000, 3072), BudgetChange(20_000, 6144))
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    (tmp_path / "preset.yaml").write_text("batch:\n  schedule:\n  - {from_tokens: 5000, tokens_per_update: 3072}\n")
    assert load_config([*TINY, "--config", str(tmp_path / "preset.yaml")]).batch.schedule == config.batch.schedule[:1]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([{"from_tokens": 0, "tokens_per_update": 3072}], ["batch.schedule[0].from_tokens = 0", "at least 1"]),
        ([*SCHEDULE, {"from_tokens": 9, "tokens_per_update": 3072}], ["schedule[2].from_tokens = 9", "20,000", "ascending"]),
        ([{"from_tokens": 9, "tokens_per_update": 3000}], ["batch.schedule[0].tokens_per_update = 3,000", "2,944 or 3,008"]),
        ([*SCHEDULE[:1], {"from_tokens": 9999, "tokens_per_update": 1600}],
         ["batch.lanes = 8 does not divide the 25 blocks", "batch.schedule[1].tokens_per_update = 1,536 or 2,048"]),
        ([{"from_tokens": 9}], ["batch.schedule[0].tokens_per_update = null"]),
        ([{"from_tokens": 9, "tokens": 3072}], ["batch.schedule: tokens is not a setting", "tokens_per_update"]),
        ([3072], ["batch.schedule: ", "is no budget", "[{from_tokens: "]),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_is_one_line(schedule: list[Any], words: list[str]) -> None:
    expect_error(words, lambda: make_plan(load_config([*TINY, "--batch.schedule", json.dumps(schedule)]), 1))
