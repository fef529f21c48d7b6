"""How well a run scales over its ranks: who waits, where data parallelism ends, and a model of time. Imports no torch.

The model is no measurement. It knows arithmetic, at one share of the peak, and bytes over links: no latency, no reading of
text, no optimizer's step, and no rank that is slower than others.
"""

import math
from dataclasses import replace

from recipe.config.settings import Config, Sharding
from recipe.errors import RecipeError
from recipe.format import Number
from recipe.plan.budget import UpdatePlan
from recipe.plan.devices import LINK_SHARE, Links, Machine
from recipe.plan.memory import largest_micro_batch, ranks_of_host, state_bytes
from recipe.plan.run_plan import RunPlan, planned_precision

WAYS: dict[str, Sharding] = {"DDP": "none", "full": "full", "hybrid": "hybrid"}
FORWARD_SHARE = 1 / 3  # of a micro-batch's arithmetic: backward has two products for each of forward's


def parallel_numbers(plan: RunPlan) -> list[Number]:
    """The share of time in which ranks have work, and how many ranks there can be."""
    update, is_shown = plan.update, plan.update.world_size > 1
    ranks, lanes = update.world_size, update.lanes
    busy = f"{{}}: {update.blocks_per_update:,} blocks / ({ranks:,} ranks x {update.largest_share:,} of the largest share), "
    blocks = math.gcd(*(phase.update.blocks_per_update for phase in plan.phases))
    more = f"; {blocks:,} with --batch.lanes {blocks}, a block each" if blocks > lanes else ""
    most = f"{{}}, a lane each{more}. More need a larger update, or tensor or context parallelism, which is not here"
    return [
        Number("busy_share", update.busy_share, "share", busy + "in DDP and in lock step", is_shown),
        Number("most_ranks", lanes, "ranks", most, is_shown),
    ]


def scaling_numbers(config: Config, plan: RunPlan, machine: Machine, memory_bytes: float | None) -> list[Number]:
    """Of each way to train on the ranks the share of time in which devices compute, by the model; none for one rank.

    `memory_bytes` is what a rank has.
    """
    ranks, flops = plan.update.world_size, machine.flops_per_second
    if ranks == 1 or flops is None:
        return []
    block_seconds = plan.flops_per_token * plan.update.sequence_length / flops
    of_host = ranks_of_host(ranks)
    links = machine.links(ranks, of_host)
    if links is None:
        why = "not known: give --link_gb_per_second, the bandwidth between ranks"
        return [Number("bus_bandwidth", None, "bytes/s", why)]
    hosts = f", {links.between_hosts / 1e9:,.4g} between hosts of {of_host}" if ranks > of_host else ""
    text = f"{links.in_host / 1e9:,.4g} GB/s in a host{hosts} ({LINK_SHARE} of data sheets, or --link_gb_per_second)"
    numbers = [Number("bus_bandwidth", links.of_all, "bytes/s", text)]
    for way, sharding in WAYS.items():
        of_way = replace(config, performance=replace(config.performance, sharding=sharding))
        try:
            update = fitting_update(of_way, ranks, machine, memory_bytes)
        except RecipeError as error:
            numbers.append(Number(f"{way}_efficiency", None, "share", str(error)))
            continue
        seconds = update_seconds(of_way, update, block_seconds, links)
        ideal = block_seconds * update.blocks_per_update / ranks
        size = update.largest_micro_batch
        text = f"{{}}, modelled: {ideal:.3g} s of arithmetic in {seconds:.3g} s, micro-batches of {size}"
        numbers.append(Number(f"{way}_efficiency", ideal / seconds, "share", text))
        numbers.append(Number(f"{way}_micro_batch_size", size, "blocks", is_shown=False))
    return numbers


def fitting_update(config: Config, ranks: int, machine: Machine, memory_bytes: float | None) -> UpdatePlan:
    """The first update in the run's micro-batches; with `batch.micro_batch_size: auto` in the largest that fit.

    Raises:
        RecipeError: the run cannot be trained in this way on these ranks, or does not fit.
    """
    optimizer, sharding, size = config.optimizer, config.performance.sharding, config.batch.micro_batch_size
    if sharding != "none" and (optimizer.name == "muon" or optimizer.state == "bf16"):
        raise RecipeError("not with Muon, nor with bf16 state")
    if sharding == "hybrid" and ranks % ranks_of_host(ranks):
        raise RecipeError(f"not on {ranks} ranks, which are no whole number of hosts of {ranks_of_host(ranks)}")
    if size == "auto" and memory_bytes is None:
        raise RecipeError("give --device h100, or another one, or --memory_gb")
    device_type = machine.device.type if machine.device else "cuda"
    precision = planned_precision(config, device_type)
    try:
        largest = largest_micro_batch(config, ranks, memory_bytes or math.inf, device_type, precision)
    except RecipeError as error:
        raise RecipeError("not one block fits into memory") from error
    batch, length = config.batch, config.data.sequence_length
    update = UpdatePlan(batch.tokens_per_update, length, batch.lanes, ranks, largest if size == "auto" else size)
    if update.largest_micro_batch > largest:
        raise RecipeError(f"micro-batches of {update.largest_micro_batch} do not fit into memory, of {largest} do")
    return update


def update_seconds(config: Config, update: UpdatePlan, block_seconds: float, links: Links) -> float:
    """Seconds of an update, on a rank with a largest share.

    DDP reduces the gradients once, during the backward of the last micro-batch. With sharding each micro-batch gathers the
    parameters of blocks in forward and again in backward, and all others once; it reduces all gradients to shares, and in
    hybrid each share between hosts. What overlaps has links of its own: forward takes as long as arithmetic or gathering, and
    backward as arithmetic, the links in a host or those between hosts, whichever is longest.
    """
    ranks, sharding = update.world_size, config.performance.sharding
    of_last = update.micro_batches(ranks - 1)  # the last rank always has a largest share
    seconds = [block_seconds * len(blocks) for blocks in of_last]
    if sharding == "none":
        return sum(seconds) + exposed_reduction(config, update, block_seconds, links)
    parts = ranks if sharding == "full" else ranks_of_host(ranks)
    link = links.of_all if sharding == "full" else links.in_host
    without_blocks = replace(config, model=replace(config.model, n_layer=0))
    parameters, outside = state_bytes(config)[0], state_bytes(without_blocks)[0]
    forward = _ring_seconds(parameters, parts, link)
    backward = _ring_seconds(parameters - outside, parts, link) + _ring_seconds(parameters, parts, link)
    # Each rank of a host reduces its own part, over one of as many adapters
    between = 2 * _ring_seconds(parameters, ranks // parts, links.between_hosts)
    return sum(
        max(FORWARD_SHARE * arithmetic, forward) + max((1 - FORWARD_SHARE) * arithmetic, backward, between)
        for arithmetic in seconds
    )


def exposed_reduction(config: Config, update: UpdatePlan, block_seconds: float, links: Links) -> float:
    """Seconds of DDP's all-reduce that the backward of the last micro-batch, of a rank with a largest share, does not hide."""
    last = block_seconds * (update.largest_share // update.gradient_accumulation_steps)
    reduction = 2 * _ring_seconds(state_bytes(config)[1], update.world_size, links.of_all)
    return max(0.0, reduction - (1 - FORWARD_SHARE) * last)


def _ring_seconds(whole_bytes: float, ranks: int, link: float) -> float:
    """To gather `whole_bytes` from so many ranks, or to reduce them to shares."""
    return (ranks - 1) / ranks * whole_bytes / link
