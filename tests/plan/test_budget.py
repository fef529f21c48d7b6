"""The division of an update, for every small case and for the ones people use."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
                of_ranks: list[list[int]] = []
                for rank in range(ranks):
                    micro_batches = update.micro_batches(rank)
                    sizes = [len(m) for m in micro_batches]
                    of_ranks.append(sizes)
                    assert len(micro_batches) == update.gradient_accumulation_steps, "equal step counts on all ranks"
                    assert max(sizes) <= size
                    assert max(sizes) - min(sizes) <= 1
                    assert [b for m in micro_batches for b in m] == list(update.blocks_of_rank(rank))
                    seen += update.blocks_of_rank(rank)
                assert seen == list(range(blocks)), "each block in exactly one micro-batch"
                lock_step = sum(map(max, zip(*of_ranks, strict=True)))
                assert lock_step == update.largest_share, "ranks that wait in every step wait no longer than at the end"
                assert update.gradient_accumulation_steps == -(-max(lane_shares) * (blocks // lanes) // size)


@st.composite
def plans(draw: st.DrawFn) -> UpdatePlan:
    """Up to 65,536 ranks, of as many lanes or more."""
    ranks = draw(st.integers(1, 2**16))
    lanes = draw(st.integers(ranks, 64 * ranks))
    return plan(lanes * draw(st.integers(1, 4)), lanes, ranks, draw(st.integers(1, 16)))


@settings(derandomize=True, database=None, max_examples=300, deadline=None)
@given(plans(), st.data())
def test_any_rank_continues_the_one_before_it_and_keeps_step(update: UpdatePlan, data: st.DataObject) -> None:
    """What makes coverage exact and in order, whatever the number of ranks: the first block, each border, the last block."""
    last = update.world_size - 1
    rank = data.draw(st.integers(0, last))
    share, micro_batches = update.blocks_of_rank(rank), update.micro_batches(rank)
    assert update.blocks_of_rank(0).start == 0
    assert update.blocks_of_rank(last).stop == update.blocks_per_update
    assert rank == last or share.stop == update.blocks_of_rank(rank + 1).start
    assert len(share) in (update.smallest_share, update.largest_share)
    assert micro_batches[0].start == share.start
    assert micro_batches[-1].stop == share.stop
    assert all(one.stop == following.start for one, following in itertools.pairwise(micro_batches))
    assert len(micro_batches) == update.gradient_accumulation_steps
    smallest, largest = (list(map(len, update.micro_batches(rank))) for rank in (0, last))
    assert sum(largest) == update.largest_share
    for own in (smallest, map(len, micro_batches)):
        assert all(few <= many <= update.micro_batch_size for few, many in zip(own, largest, strict=True)), (
            "in lock step"
        )


@pytest.mark.parametrize("ranks", [1, 2, 63, 1000, 4096, 32_769, 65_535, 65_536])
def test_every_block_exactly_once_and_in_order_on_up_to_65536_ranks(ranks: int) -> None:
    """134 M tokens: the border of every rank, and the micro-batches of some."""
    update = UpdatePlan(2**27, 2048, 2**16, ranks, 4)
    shares = [update.blocks_of_rank(rank) for rank in range(ranks)]
    assert [share.start for share in shares[1:]] == [share.stop for share in shares[:-1]]
    assert (shares[0].start, shares[-1].stop) == (0, 2**16)
    assert {len(share) for share in shares} == {update.smallest_share, update.largest_share}
    for rank in {0, ranks // 3, ranks - 1}:
        micro_batches = update.micro_batches(rank)
        assert [block for blocks in micro_batches for block in blocks] == list(shares[rank])
        assert len(micro_batches) == update.gradient_accumulation_steps
    assert update.busy_share == 2**16 / (ranks * max(map(len, shares)))


@pytest.mark.parametrize(
    ("ranks", "lanes", "share"),
    [(7, 256, 256 / (7 * 37)), (63, 2048, 2048 / (63 * 33)), (65_535, 65_536, 65_536 / 131_070)],
)
def test_ranks_are_as_busy_in_lock_step_as_they_can_be(ranks: int, lanes: int, share: float) -> None:
    """36 and 37 blocks in 10 micro-batches: the larger ones of all ranks are the first ones. Spread evenly 7 ranks had 94 %."""
    update = UpdatePlan(lanes * 2048, 2048, lanes, ranks, 4)
    assert update.busy_share == pytest.approx(share)
    steps = [max(map(len, of_step)) for of_step in zip(*map(update.micro_batches, range(ranks)), strict=True)]
    assert lanes / (ranks * sum(steps)) == pytest.approx(share)


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
        (
            (524_288, 2048, 64, 300, 4),
            [
                "300 ranks",
                "at most 256 ranks",
                "with batch.lanes = 256",
                "614,400 or a multiple, with batch.lanes = 300",
            ],
        ),
        (
            (524_288, 2048, 64, 65_536, 4),
            ["65,536 ranks", "at most 256 ranks, a block each, with batch.lanes = 256", "134,217,728", "lanes = 65536"],
        ),
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


@pytest.mark.parametrize("ranks", [300, 1000, 65_536])
def test_what_is_advised_for_too_many_ranks_works(ranks: int) -> None:
    with pytest.raises(RecipeError) as caught:
        UpdatePlan(524_288, 2048, 64, ranks, 4)
    words = r"most ([\d,]+) ranks, .* batch.lanes = (\d+); or batch.tokens_per_update = ([\d,]+) .* batch.lanes = (\d+)"
    (found,) = re.findall(words, str(caught.value))
    fewer, lanes, tokens, more_lanes = (int(number.replace(",", "")) for number in found)
    assert UpdatePlan(524_288, 2048, lanes, fewer, 4).busy_share == 1
    assert UpdatePlan(tokens, 2048, more_lanes, ranks, 4).busy_share == 1
