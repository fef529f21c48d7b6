"""The parity check compares splits that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipe.plan.budget import UpdatePlan
from recipe.step.parity import _other_micro_batch_sizes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 300])
def test_every_row_of_the_check_is_another_split(ranks: int, size: int) -> None:
    plan = UpdatePlan(524_288, 2048, 64, ranks, size)
    sizes = _other_micro_batch_sizes(plan)
    steps = [replace(plan, micro_batch_size=other).gradient_accumulation_steps for other in sizes]
    assert len({*steps, plan.gradient_accumulation_steps}) == len(sizes) + 1
    assert len(sizes) == 2, "there is room for two in each of these"


def test_without_another_split_there_is_no_row() -> None:
    assert _other_micro_batch_sizes(UpdatePlan(64, 16, 4, 4, 1)) == []
    assert _other_micro_batch_sizes(UpdatePlan(128, 16, 4, 4, 1)) == [2]
