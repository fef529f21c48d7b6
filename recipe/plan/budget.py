"""The token budget: how an update of a fixed number of tokens is split into ranks and micro-batches.

Pure arithmetic; imports no torch. Whoever counts blocks, lanes, ranks or micro-batches asks an `UpdatePlan`.
"""

import itertools
from dataclasses import dataclass

from recipe.errors import RecipeError
from recipe.format import nearest_divisors


@dataclass(frozen=True)
class UpdatePlan:
    """One update of `tokens_per_update` target tokens on `world_size` ranks.

    The blocks of an update are numbered 0 to `blocks_per_update` - 1 by lane: lane l holds the `blocks_per_lane` blocks that
    start at l x blocks_per_lane. A rank owns a contiguous share of the lanes, so also of the blocks.

    Raises:
        RecipeError: a division would leave a remainder; the message has the nearest valid values.
    """

    tokens_per_update: int
    sequence_length: int
    lanes: int
    world_size: int
    micro_batch_size: int
    setting: str = "batch.tokens_per_update"  # which says how large it is

    def __post_init__(self) -> None:
        tokens, length, lanes = self.tokens_per_update, self.sequence_length, self.lanes
        if tokens % length:
            raise RecipeError(
                f"{self.setting} = {tokens:,} is {tokens / length:,.2f} blocks of {length:,} tokens, "
                f"and must be a whole number of them: the nearest valid values are {_nearest(tokens, length)}"
            )
        blocks = tokens // length
        if blocks % lanes:
            raise RecipeError(
                f"batch.lanes = {lanes} does not divide the {blocks:,} blocks of an update: choose lanes among "
                f"{nearest_divisors(blocks, lanes)}, or {self.setting} = {_nearest(tokens, lanes * length)}"
            )
        if self.world_size > lanes:
            enough = nearest_divisors(blocks, self.world_size, at_least=self.world_size)
            advice = (
                f"batch.lanes among {enough}"
                if enough
                else f"at most {blocks:,} ranks, a block each, with batch.lanes = {blocks}; or {self.setting} = "
                f"{self.world_size * length:,} or a multiple, with batch.lanes = {self.world_size}"
            )
            raise RecipeError(
                f"{self.world_size:,} ranks cannot share batch.lanes = {lanes}, each needs one at least: choose {advice} "
                "(lanes decide the order of the data, so choose them once for all runs that should agree)"
            )

    @property
    def blocks_per_update(self) -> int:
        """Blocks of one update, over all ranks."""
        return self.tokens_per_update // self.sequence_length

    @property
    def blocks_per_lane(self) -> int:
        """Blocks that each lane gives to an update."""
        return self.blocks_per_update // self.lanes

    def lanes_of_rank(self, rank: int) -> range:
        """The contiguous share of the lanes that `rank` owns; shares differ by at most one lane."""
        return range(rank * self.lanes // self.world_size, (rank + 1) * self.lanes // self.world_size)

    def blocks_of_rank(self, rank: int) -> range:
        """The blocks of an update that `rank` holds."""
        lanes = self.lanes_of_rank(rank)
        return range(lanes.start * self.blocks_per_lane, lanes.stop * self.blocks_per_lane)

    @property
    def largest_share(self) -> int:
        """Blocks of the rank that holds the most."""
        return -(-self.lanes // self.world_size) * self.blocks_per_lane

    @property
    def smallest_share(self) -> int:
        """Blocks of the rank that holds the fewest: those of one lane less, if ranks do not divide lanes."""
        return self.lanes // self.world_size * self.blocks_per_lane

    @property
    def busy_share(self) -> float:
        """Of the ranks' time, as all wait for those with most blocks: at the end (DDP), or in every micro-batch (sharding)."""
        return self.blocks_per_update / (self.world_size * self.largest_share)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per update, the same number on every rank: ceil(largest share / micro_batch_size)."""
        return -(-self.largest_share // self.micro_batch_size)

    @property
    def largest_micro_batch(self) -> int:
        """Blocks of the largest micro-batch: a share of 8 in micro-batches of at most 7 is split into 4 and 4."""
        return -(-self.largest_share // self.gradient_accumulation_steps)

    @property
    def masked_micro_batches(self) -> int:
        """Micro-batches, over all ranks, for which a rank has no block left."""
        ranks_with_fewest = self.world_size - self.lanes % self.world_size
        return ranks_with_fewest * max(0, self.gradient_accumulation_steps - self.smallest_share)

    def micro_batches(self, rank: int) -> list[range]:
        """The blocks of each micro-batch of `rank`: `gradient_accumulation_steps` ranges, whose sizes differ by at most one.

        The larger come first, on all ranks in the same steps: with sharding each step takes as long as its largest.
        If a rank has fewer blocks than steps, the last ranges are empty: those micro-batches are one fully masked row.
        """
        share, steps = self.blocks_of_rank(rank), self.gradient_accumulation_steps
        size, larger = divmod(len(share), steps)
        bounds = [share.start + step * size + min(step, larger) for step in range(steps + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(bounds)]

    @property
    def division(self) -> str:
        """The accumulation steps with the division written out."""
        exact = self.micro_batch_size * self.sequence_length * self.world_size
        steps = self.gradient_accumulation_steps
        if self.tokens_per_update == steps * exact:
            ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
            return (
                f"{self.tokens_per_update:,} / ({self.micro_batch_size} x {self.sequence_length:,} x {ranks}) = {steps}"
            )
        return f"ceil({self.largest_share} blocks of the largest share / {self.micro_batch_size}) = {steps}"


def _nearest(number: int, divisor: int) -> str:
    """The multiples of `divisor` below and above `number`."""
    below, above = number // divisor * divisor, (number // divisor + 1) * divisor
    return f"{below:,} or {above:,}" if below else f"{above:,}"
