"""What a step holds in memory. Pure arithmetic; imports no torch.

Seen with `torch.autograd.graph.saved_tensors_hooks` and the profiler's memory events (torch 2.13, transformers 5.23), then
written down as the sums below; `tests/plan/test_memory.py` holds them against what the allocator hands out. N = tokens of a
micro-batch, d = width, V = rows of the embedding. What torch.compile changes is not counted: compiled by torch 2.11, a step
took 1.4 to 20 % more than this on an H100 (docs/results/2026-11-27-gpu.md).
"""

import os
from bisect import bisect_left
from dataclasses import dataclass, replace

from recipe.config.settings import Config, ModelConfig
from recipe.errors import RecipeError
from recipe.format import size_text
from recipe.plan.budget import UpdatePlan
from recipe.plan.devices import RANKS_OF_A_HOST
from recipe.plan.phases import make_phases

# Of a device's memory: the rest is for the CUDA context, NCCL and what the caching allocator cannot give out again. That was
# 0.2 to 3 GB of an H100's 85, and the context 0.9 GB at most (docs/results/2026-11-27-gpu.md).
USABLE_SHARE = 0.92
# Of cuBLAS, one for the thread of forward and one for that of backward; 32 MiB is torch's default on Hopper, before it is less.
_WORKSPACE_BYTES = 32 * 2**20
# What the feed-forward layer keeps, in values per token and width: 8 for a function in one kernel of its input.
_FEED_FORWARD_VALUES = {"relu": 4, "gelu_new": 20}  # relu needs its output alone; gelu_new keeps three steps on the way


def rows_per_chunk(device_type: str) -> int:
    """Tokens whose logits exist together: 412 MB for 2,048 x 50,304 in float32. On a CPU 512 are faster (docs/decisions.md)."""
    return 512 if device_type == "cpu" else 2048


def takes_ranges(device_type: str, precision: str, dropout: float, head_width: int) -> bool:
    """Whether attention inside documents is computed by their ranges; elsewhere it needs a mask of [tokens, tokens] a row.

    The kernel is flash attention's for sequences of any length, and has no dropout.
    """
    return device_type == "cuda" and precision == "bf16" and not dropout and head_width <= 256 and head_width % 8 == 0


def parameter_count(model: ModelConfig, n_positions: int) -> int:
    """Trainable parameters of GPT-2 with a tied output layer."""
    width = model.n_embd
    embeddings = (model.vocab_size + n_positions) * width
    attention = (width * 3 * width + 3 * width) + (width * width + width)
    feed_forward = (width * 4 * width + 4 * width) + (4 * width * width + width)
    layer_norms = 2 * 2 * width
    return embeddings + model.n_layer * (attention + feed_forward + layer_norms) + 2 * width


def ranks_with_parts(config: Config, world_size: int) -> int:
    """Over how many ranks, from 0, parameters, gradients and optimizer are cut; 1 if they are not."""
    if config.performance.sharding == "none":
        return 1
    return world_size if config.performance.sharding == "full" else ranks_of_host(world_size)


def ranks_of_host(world_size: int) -> int:
    """Ranks of each host: what the launcher has told in LOCAL_WORLD_SIZE; without one RANKS_OF_A_HOST at most."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(RANKS_OF_A_HOST, world_size)))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors on one rank during an update, once the optimizer has its state."""

    parameters_bytes: int  # of the model
    gradients_bytes: int  # of all parameters
    optimizer_bytes: int  # AdamW's two moments, or Muon's one
    buckets_bytes: (
        int  # DDP's copy of the gradient, which it sends in buckets; 0 on one rank, and where parameters are cut
    )
    gathered_bytes: (
        int  # parameters that are whole while they are computed with, of those that are cut: embedding, two blocks
    )
    reduced_bytes: int  # the whole gradients that go out to the ranks, of a block
    activations_bytes: int  # what forward keeps for backward
    casts_bytes: int  # the blocks' weights that autocast has rounded to bf16, kept with them
    logits_bytes: int  # what the loss takes beyond them, forward and backward
    backward_bytes: int  # what the backward of the last block takes beyond the activations
    embedding_bytes: int  # what the end of backward takes, when no activations are left
    step_bytes: int  # what Muon's step takes, of one matrix after the other
    workspaces_bytes: int  # what the GPU's matrix products work in
    accumulates: bool  # whether gradients of an earlier micro-batch are there during forward

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients and optimizer: what no micro-batch changes."""
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is there at once: in the loss, in the last block's backward, at the end of backward, or in the step."""
        in_turn = max(self.early_bytes, self.embedding_bytes, self.step_bytes)
        return self.state_bytes + self.buckets_bytes + self.workspaces_bytes + in_turn

    @property
    def early_bytes(self) -> int:
        """What the end of forward and the start of backward take beyond the state."""
        in_turn = max(self.logits_bytes, self.backward_bytes + self.reduced_bytes)
        kept = self.gathered_bytes + self.activations_bytes + self.casts_bytes + in_turn
        return kept if self.accumulates else kept - self.gradients_bytes  # which come as the activations go


def state_bytes(config: Config, parts: int = 1) -> tuple[int, int, int]:
    """Bytes of (parameters, gradients, optimizer) on each of the ranks that hold them together; no micro-batch changes them."""
    model, name = config.model, config.optimizer.name
    size = parameter_count(model, config.n_positions) * (2 if config.optimizer.state == "bf16" else 4) // parts
    one_moment = 4 * model.n_layer * 12 * model.n_embd**2 if name == "muon" else 0  # of the blocks' matrices
    return size, size, 0 if name == "sgd" else 2 * size - one_moment


def estimate_memory(
    config: Config, micro_batch_size: int, device_type: str, precision: str, world_size: int = 1
) -> MemoryEstimate:
    """Bytes of tensors for micro-batches of `micro_batch_size` blocks.

    `device_type` is `cpu`, `cuda`, ...; `precision` is `bf16` (autocast) or `fp32`; ranks share an update's blocks.

    Raises:
        RecipeError: a budget that does not divide.
    """
    return largest_update(config, micro_batch_size, device_type, precision, world_size)[1]


def largest_update(
    config: Config, micro_batch_size: int, device_type: str, precision: str, world_size: int
) -> tuple[UpdatePlan, MemoryEstimate]:
    """Of the phases of a run, the update that takes most memory, and how much that is; as `estimate_memory`."""
    updates = [phase.update for phase in make_phases(config, world_size, micro_batch_size)]
    estimates = [(update, _estimate(config, update, device_type, precision)) for update in updates]
    return max(estimates, key=lambda pair: pair[1].peak_bytes)


def _estimate(config: Config, update: UpdatePlan, device_type: str, precision: str) -> MemoryEstimate:
    model, every, world_size = config.model, config.performance.activation_checkpointing, update.world_size
    width, rows = model.n_embd, update.largest_micro_batch
    tokens = rows * update.sequence_length
    is_bf16_state, is_cpu = config.optimizer.state == "bf16", device_type == "cpu"
    state = (
        2 if is_bf16_state else 4
    )  # bytes of a parameter, of its gradient, of each moment; and of the residual stream
    product = 2 if precision == "bf16" else 4  # bytes of what goes into and comes out of a matrix product
    normed = (
        2 if is_bf16_state and is_cpu else 4
    )  # bytes of what goes into a layer norm; autocast for CUDA makes it float32
    cast = 2 if product != state else 0  # autocast rounds each weight once in a forward, and keeps it for backward
    mask = product if is_cpu else 1  # bytes of a value in a dropout mask
    values, matrices, head = tokens * width, 12 * width * width, model.vocab_size * width
    parts = ranks_with_parts(config, world_size)
    parameters_bytes, gradients_bytes, optimizer_bytes = state_bytes(config, parts)
    root, block_parameters = head + (config.n_positions + 2) * width, matrices + 13 * width  # in values
    whole = 4 if parts > 1 else 0  # bytes of a parameter that is whole for a while, and of its gradient

    # A block keeps the input of both layer norms, their outputs (2), attention, and the feed-forward layer before (4) and
    # after (4) GELU; also mean and deviation of each token. Where it is computed again, its input is all that is kept.
    attention = _attention_bytes(config, rows, product, is_cpu)
    feed_forward = _FEED_FORWARD_VALUES.get(model.activation_function, 8)
    block = values * (2 * normed + (2 + feed_forward) * product) + 4 * tokens * normed + attention
    block += 2 * values * mask if model.dropout else 0
    again = -(-model.n_layer // every) if every else 0  # blocks: the first of each `every`
    last_again = every is not None and (model.n_layer - 1) % every == 0
    kept = again * values * state + (model.n_layer - again) * block
    ends = values * normed  # the final layer norm's input, and the embedding's dropout
    ends += values * (4 if is_cpu else 1) if model.dropout else 0
    if config.data.document_mask and not takes_ranges(device_type, precision, model.dropout, width // model.n_head):
        ends += tokens * update.sequence_length * product  # which tokens see which, once for all blocks
    activations = kept + ends + 16 * update.largest_share * update.sequence_length  # the update's token ids, int64

    # Backward of the last block: its output's gradient, the one of GELU's output (4) before that output is let go, and that
    # of the weights between them. The head's gradient waits until the end for the embedding's, whose weight it shares.
    passing = values * (state + 4 * product) + (values * product if cast else 0)
    backward = passing + 4 * width * width * (product + 2 * cast) + head * state - ends
    if last_again:
        backward += block - values * state + matrices * cast

    # Loss: hidden states and their gradient; the head's cast, and its gradient in float32. Of a chunk, in turn: its logits in
    # bf16 and in float32; the logits' gradient, and the head's in bf16 before it is added up (a CPU makes it float32 first).
    chunk, bf16 = min(tokens, rows_per_chunk(device_type)), product % 4  # bf16: 2 bytes, or 0 in fp32
    logits, added = chunk * model.vocab_size, 3 if is_cpu else 1
    in_turn = max(logits * (bf16 + 4), logits * product + head * bf16 * added) + chunk * width * product
    forward_casts = again * matrices * cast  # of these blocks, let go when forward ends
    logits_bytes = forward_casts + 2 * values * normed + head * (cast + 4) + in_turn
    return MemoryEstimate(
        parameters_bytes=parameters_bytes,
        gradients_bytes=gradients_bytes,
        optimizer_bytes=optimizer_bytes,
        buckets_bytes=gradients_bytes if world_size > parts else 0,
        gathered_bytes=whole * (root + 2 * block_parameters),
        reduced_bytes=whole * 2 * block_parameters,
        activations_bytes=activations,
        casts_bytes=(model.n_layer - again) * matrices * cast,
        logits_bytes=logits_bytes,
        backward_bytes=backward,
        embedding_bytes=2 * head * state + values * state + whole * root,
        # Of the widest matrix, [d, 4 d]: the direction before, and twice during the iteration, with two products [d, d]
        step_bytes=width * width * (4 * state + 10 * product) if config.optimizer.name == "muon" else 0,
        workspaces_bytes=2 * _WORKSPACE_BYTES if device_type == "cuda" else 0,
        accumulates=update.gradient_accumulation_steps > 1,
    )


def largest_micro_batch(config: Config, world_size: int, memory_bytes: float, device_type: str, precision: str) -> int:
    """The most blocks in a forward and backward whose step takes `USABLE_SHARE` of the memory at most, in every phase.

    Never more than the largest micro-batch that the largest update is cut into: with a share of 8 blocks it is 8, 4, 3, 2 or 1.

    `memory_bytes` is what one rank has. The configured micro-batch is ignored.

    Raises:
        RecipeError: not even one block fits.
    """
    share = max(phase.update.largest_share for phase in make_phases(config, world_size, 1))

    def fits(steps: int) -> bool:
        peak = estimate_memory(config, -(-share // steps), device_type, precision, world_size).peak_bytes
        return peak <= USABLE_SHARE * memory_bytes

    # One step alone keeps no gradients during forward, and may fit where two do not. From two on, more steps take less.
    steps = 1 if fits(1) else bisect_left(range(share + 1), True, lo=2, key=fits)
    if steps > share:
        raise RecipeError(_too_small(config, world_size, memory_bytes, device_type, precision))
    return -(-share // steps)


def _too_small(config: Config, world_size: int, memory_bytes: float, device_type: str, precision: str) -> str:
    """What one block needs, and which settings would make it fit."""
    usable = USABLE_SHARE * memory_bytes
    ways = {"": config}
    if config.performance.activation_checkpointing != 1:
        again = replace(config.performance, activation_checkpointing=1)
        ways["--performance.activation_checkpointing 1"] = replace(config, performance=again)
    is_cut = config.performance.sharding != "none"
    if world_size > 1 and not is_cut and config.optimizer.name != "muon" and config.optimizer.state != "bf16":
        cut = replace(config.performance, sharding="full")
        ways["--performance.sharding full"] = replace(config, performance=cut)
    if precision == "bf16" and not is_cut and config.optimizer.name == "adamw" and config.optimizer.state != "bf16":
        compact = replace(config.optimizer, state="bf16")
        ways |= {
            f"{way} --optimizer.state bf16".strip(): replace(other, optimizer=compact)
            for way, other in ways.items()
            if other.performance.sharding == "none"
        }
    sizes = {
        way: estimate_memory(other, 1, device_type, precision, world_size).peak_bytes for way, other in ways.items()
    }
    needed = sizes[""]
    advice = [f"{way} ({size_text(size)})" for way, size in sizes.items() if size <= usable]
    return (
        f"one block of {config.data.sequence_length:,} tokens needs {size_text(needed)}, and {100 * USABLE_SHARE:.0f} % of "
        f"{size_text(memory_bytes)} are {size_text(usable)}: take a device with {size_text(needed / USABLE_SHARE)}, "
        f"{', '.join([*advice, 'a shorter --data.sequence_length'])} or a smaller model"
    )


def _attention_bytes(config: Config, rows: int, product: int, is_cpu: bool) -> int:
    """What the attention of a block keeps: query, key and value (3 N d), result (N d), a log-sum-exp for each head and token.

    With dropout a CPU keeps float32 copies of query, key and value instead, and for each head the [tokens, tokens] weights
    before it, its mask, and the weights after it.
    """
    model, length = config.model, config.data.sequence_length
    values = rows * length * model.n_embd
    if is_cpu and model.dropout:
        return 3 * values * 4 + values * product + rows * model.n_head * length * length * 12
    return 4 * values * product + 4 * rows * length * model.n_head
