"""The division of an update, for every small case and for the ones people use."""

from __future__ import annotations

import pytest

from recipe.errors import RecipeError
from recipe.plan.budget import UpdatePlan


def plan(blocks: int, lanes: int, ranks: int, micro_batch_size: int) -> UpdatePlan:
    return UpdatePlan(blocks * 4, 4, lanes, ranks, micro_batch_size)


@pytest.mark.parametrize("blocks", range(1, 65))
def test_every_division_is_exact(blocks: int) -> None:
    """For lanes dividing the blocks, ranks up to the lanes, micro-batches 1 to 9."""
    for lanes in (d for d in range(1, blocks + 1) if blocks % d == 0):
        for ranks in range(1, lanes + 1):
            lane_shares = [len(plan(blocks, lanes, ranks, 1).lanes_of_rank(rank)) for rank in range(ranks)]
            assert max(lane_shares) - min(lane_shares) <= 1
            for size in range(1, 10):
                update = plan(blocks, lanes, ranks, size)
                seen: list[int] = []
                for rank in range(ranks):
                    micro_batches = update.micro_batches(rank)
                    sizes = [len(m) for m in micro_batches]
                    assert len(micro_batches) == update.gradient_accumulation_steps, "equal step counts on all ranks"
                    assert max(sizes) <= size
                    assert max(sizes) - min(sizes) <= 1
                    assert [b for m in micro_batches for b in m] == list(update.blocks_of_rank(rank))
                    seen += update.blocks_of_rank(rank)
                assert seen == list(range(blocks)), "each block in exactly one micro-batch"
                assert update.gradient_accumulation_steps == -(-max(lane_shares) * (blocks // lanes) // size)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 64), (2, 32), (4, 16), (8, 8), (16, 4), (32, 2), (64, 1)])
def test_the_1_3b_preset_divides_as_advertised(ranks: int, steps: int) -> None:
    update = UpdatePlan(524_288, 2048, 64, ranks, 4)
    assert update.gradient_accumulation_steps == steps == 524_288 // (4 * 2048 * ranks)
    assert update.division == f"524,288 / (4 x 2,048 x {ranks} rank{'s' * (ranks > 1)}) = {steps}"


@pytest.mark.parametrize("ranks", [3, 5, 6, 7])
def test_ranks_that_do_not_divide_lose_nothing(ranks: int) -> None:
    update = UpdatePlan(524_288, 2048, 64, ranks, 4)
    tokens = sum(len(m) * 2048 for rank in range(ranks) for m in update.micro_batches(rank))
    assert tokens == 524_288
    assert "ceil" in update.division


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5000, 2048, 1, 1, 1), ["5,000", "2.44 blocks of 2,048", "4,096 or 6,144"]),
        ((1000, 2048, 1, 1, 1), ["1,000", "2,048"]),
        ((524_288, 2048, 48, 1, 4), ["batch.lanes = 48", "256 blocks", "32, 64", "491,520 or 589,824"]),
        ((524_288, 2048, 64, 65, 4), ["65 ranks", "batch.lanes = 64", "[128, 256]"]),
        ((524_288, 2048, 64, 300, 4), ["300 ranks", "at most 256 ranks", "614,400"]),
    ],
)
def test_what_does_not_divide_is_an_error_with_the_nearest_valid_values(
    arguments: tuple[int, int, int, int, int], words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        UpdatePlan(*arguments)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
