"""From which checkpoint a run goes on, and the check that it is the same run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from recipe.checkpoint.branch import begin_branch, check_branch, own_checkpoints, skip_ahead
from recipe.checkpoint.files import TrainingState, load_checkpoint, read_state
from recipe.checkpoint.same_run import TEXT_MAY_MOVE, check_length, check_same_run, shown
from recipe.checkpoint.verify import hash_together, why_invalid
from recipe.config.command_line import read_config
from recipe.config.settings import Config, flat_settings
from recipe.data.blocks import UpdateBlocks, next_update
from recipe.data.lanes import Lane, Ranges, merge_ranges, number_of
from recipe.errors import RecipeError
from recipe.hub.client import download_checkpoint
from recipe.model.kernels import eager
from recipe.model.sharding import reshard
from recipe.run.directory import list_checkpoints
from recipe.run.ledger import EVENTS, LEDGER, read_events
from recipe.run.run import Run
from recipe.step.metrics import gather_hash
from recipe.step.parity import TOLERANCE
from recipe.step.spikes import Spike, spike_error

VERIFICATION_TOKENS = 64  # training waits for them at every checkpoint, and another function shows in any token


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins."""

    checkpoint: Path | None = None  # verified directory to go on from; None for a new run
    state: TrainingState | None = None  # its training state
    # (name, reason) of newer checkpoints that do not verify
    skipped: list[tuple[str, str]] = field(default_factory=list)
    # Dotted name -> [earlier value, value now] of settings that changed and may
    changes: dict[str, list[Any]] = field(default_factory=dict)
    # Blocks of every lane that rollbacks have left out, before the checkpoint or after it
    skipped_blocks: Ranges = ()

    @property
    def update(self) -> int:
        """Updates done."""
        return self.state.update if self.state else 0

    @property
    def recent(self) -> list[list[float]]:
        """[loss, gradient norm] of the updates before."""
        return self.state.recent if self.state else []

    @property
    def event(self) -> str:
        """What its beginning is called in events.jsonl."""
        branch = self.state.branched_from if self.state else None
        return "branch" if branch and branch["update"] == self.update else "resume"

    @property
    def noise(self) -> list[float]:
        """Sums of the gradient noise scale."""
        return self.state.noise if self.state else []

    def facts(self) -> dict[str, Any]:
        """What events.jsonl says of it."""
        facts = {"checkpoint": str(self.checkpoint), "changes": self.changes, "skipped": self.skipped}
        if self.event == "branch" and self.state and self.state.branched_from:
            facts |= {name: self.state.branched_from[name] for name in ("tokens", "changes")}
        return facts

    def __str__(self) -> str:
        lines = [f"skipped {name}: {reason}" for name, reason in self.skipped]
        lines += [f"{name} was {shown(old)}, is {shown(new)}" for name, (old, new) in self.changes.items()]
        begins = "a branch of" if self.event == "branch" else "going on from"
        return "\n".join([f"{begins} {self.checkpoint}, after {self.update:,} updates", *lines])


def agree_on_resume_point(run: Run) -> ResumePoint:
    """`find_resume_point`, the same on all ranks, which share out the reading of the newest checkpoint. Collective."""
    candidates = run.on_main(lambda: find_candidates(run.config))
    hashes = hash_together(run, candidates[0]) if candidates else {}
    return run.on_main(lambda: choose_candidate(run.config, candidates, hashes))


def find_resume_point(config: Config) -> ResumePoint:
    """Decide by `resume: auto|fresh|PATH|hf://user/name@revision`. Reads every byte of the checkpoint it takes. On rank 0.

    Raises:
        RecipeError: the checkpoint or the directory belongs to another run, or no checkpoint of several verifies.
    """
    return choose_candidate(config, find_candidates(config), {})


def find_candidates(config: Config) -> list[Path]:
    """The checkpoints that `resume` means, the newest first; none for a new run.

    Raises:
        RecipeError: it is no checkpoint, or the directory belongs to another run.
    """
    directory = Path(config.run.directory)
    if config.resume == "fresh":
        return []
    own = list_checkpoints(directory / "checkpoints")
    if config.run.branch and own_checkpoints(config, own):
        return own
    if config.resume == "auto":
        if not own:
            check_same_run(_earlier_config(directory), config, f"{directory} holds another run")
        return own
    if config.resume.startswith("hf://"):
        return [download_checkpoint(config.resume, config.cache_directory / "hub")]
    given = Path(config.resume)
    if not given.is_dir():
        raise RecipeError(f"resume = {config.resume!r} is no directory: give auto, fresh, or a checkpoint's path")
    return [path for path in own if path.exists() and path.samefile(given)] or [given]


def choose_candidate(config: Config, candidates: Sequence[Path], hashes: Mapping[str, str]) -> ResumePoint:
    """The newest of them that verifies; `hashes` are those of the first one's files, as far as they are known. On rank 0.

    Raises:
        RecipeError: it is of another run, or none of several verifies.
    """
    if not candidates:
        return ResumePoint()
    directory, skipped = Path(config.run.directory), list[tuple[str, str]]()
    for candidate in candidates:
        reason = why_invalid(candidate, hashes if candidate == candidates[0] else None)
        if reason is None:
            state = read_state(candidate)
            is_own = candidate.parent == directory / "checkpoints"
            begins_branch = config.run.branch and not is_own
            may_move = TEXT_MAY_MOVE if state.text else ()
            branches_at = state.tokens if begins_branch else None
            what = f"{candidate} is of another run"
            changes = check_same_run(state.config, config, what, may_move, branches_at)
            if begins_branch:  # what its run has left out behind the checkpoint is none of the branch's
                blocks = skip_ahead(config, state.tokens, merge_ranges(state.skipped_blocks))
                return ResumePoint(candidate, begin_branch(config, candidate, state, changes), skipped, changes, blocks)
            if config.run.branch:
                check_branch(config, candidate, state)
            check_length(candidate, state.tokens, config, changes)
            events = directory / EVENTS if is_own else _events_of(candidate)
            blocks = merge_ranges([*state.skipped_blocks, *_left_out(events, state.update)])
            return ResumePoint(candidate, state, skipped, changes, blocks)
        skipped.append((candidate.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
    raise RecipeError(f"no checkpoint of {directory} can be used ({reasons}); --resume fresh starts again from nothing")


def _events_of(checkpoint: Path) -> Path:
    """The events.jsonl of the run that a checkpoint belongs to, whose checkpoints may be a link that leads elsewhere."""
    while checkpoint.is_symlink():
        checkpoint = checkpoint.parent / checkpoint.readlink()
    named = Path(os.path.abspath(checkpoint)).parent.parent / EVENTS
    return named if named.exists() else checkpoint.resolve().parent.parent / EVENTS


def _left_out(events: Path, update: int) -> list[tuple[int, int]]:
    """Blocks of every lane that rollbacks to at most `update` updates have left out."""
    try:
        rollbacks = read_events(events, "rollback", update)
        return [(int(start), int(stop)) for event in rollbacks for start, stop in event["skipped_blocks"]]
    except (KeyError, TypeError, ValueError):
        raise RecipeError(
            f"{events} has a rollback that does not say which blocks it left out: bring the file back, or --resume fresh"
        ) from None


def _earlier_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "config.yaml"
    return flat_settings(read_config(path)) if path.exists() and (directory / LEDGER).exists() else None


def roll_back(run: Run, spike: Spike, blocks: UpdateBlocks) -> ResumePoint:
    """Go back to the newest checkpoint, and leave out the blocks of the updates that led to a spike. On rank 0.

    It is in events.jsonl, on the disk, before anything goes on, so that a run that is stopped then resumes in the same way.

    `blocks` are those of the update with the spike.

    Raises:
        RecipeError: there is no checkpoint, or going back to this one has not helped `max_rollbacks` times.
    """
    update, settings = blocks.update, run.config.stability
    if not list_checkpoints(run.directory / "checkpoints"):
        tokens = run.plan.tokens_after(update // 2)
        ways = (
            f"this run has no checkpoint of its own to return to yet: begin again by the same command with "
            f"--checkpoint.every_tokens {tokens}, or go past it with --stability.on_spike continue"
        )
        raise spike_error(run, update, spike, ways)
    point = find_resume_point(replace(run.config, resume="auto"))
    events = read_events(run.directory / EVENTS, "rollback", point.update)
    earlier = [event for event in events if event["update"] == point.update]
    if len(earlier) >= settings.max_rollbacks:
        ways = (
            f"{len(earlier)} returns to {point.checkpoint} have not helped: the same command with --stability.max_rollbacks "
            f"{2 * len(earlier)} --stability.rollback_updates {2 * settings.rollback_updates} leaves out more, with "
            "--stability.on_spike continue it goes on regardless"
        )
        raise spike_error(run, update, spike, ways)
    plan, a_block_of_each = run.plan, run.plan.update.lanes * run.plan.update.sequence_length
    before = plan.tokens_after(max(point.update, update - settings.rollback_updates)) // a_block_of_each
    last = plan.tokens_after(update) // a_block_of_each - 1
    guilty = number_of(before, blocks.skipped_blocks), number_of(last, blocks.skipped_blocks) + 1
    left_out = merge_ranges([*blocks.skipped_blocks, guilty])
    run.ledger.event("rollback", point.update, spike_update=update, skipped_blocks=left_out, **asdict(spike))
    run.ledger.sync()  # before the updates that led to it are forgotten
    run.ledger.truncate(point.update)
    return replace(point, skipped_blocks=merge_ranges([*point.skipped_blocks, *left_out]))


def restore(run: Run, point: ResumePoint, model: Any, optimizer: Any, lanes: Sequence[Lane]) -> None:
    """Load weights, optimizer and lanes, and prove on the last update that they are those of the run. Collective.

    The update's blocks are read again: their hash has to be the recorded one, and the loss of lane 0's blocks too. Does
    nothing for a new run.

    Raises:
        RecipeError: the text has changed, or the model is not the one that was saved.
    """
    if point.checkpoint is None or point.state is None:
        return
    run.console.say(f"\n{point}")
    run.branched_from = point.state.branched_from
    state, plain = point.state, run.accelerator.unwrap_model(model)
    load_checkpoint(point.checkpoint, plain, optimizer.optimizer)
    blocks = restore_lanes(run, point, lanes)
    loss = verification_loss(plain, blocks) if run.is_main or run.is_sharded else 0.0
    if run.is_main:
        tolerance = TOLERANCE["bf16" if "bf16" in (run.precision, state.config.get("precision")) else "fp32"]
        if not abs(loss / state.verification_loss - 1) <= tolerance:
            raise RecipeError(
                f"the model of {point.checkpoint} gives a loss of {loss:.6f}, and {state.verification_loss:.6f} was recorded "
                f"(relative tolerance {tolerance:.0e}): this installation does not compute the same function",
                on_this_rank_only=True,
            )


def restore_lanes(run: Run, point: ResumePoint, lanes: Sequence[Lane]) -> UpdateBlocks:
    """Put lanes behind the last update of a checkpoint; the blocks of that update, which are read again. Collective.

    Raises:
        RecipeError: they are not what they were.
    """
    assert point.state is not None
    state = point.state
    try:
        for lane in lanes:
            lane.load_state_dict(state.lane_states[lane.index])
            lane.skipped, lane.keeps_weights = point.skipped_blocks, point.event == "branch"
        blocks = next_update(lanes, run.plan.update_at(state.update).blocks_per_lane, run.device)
        for lane in lanes:
            lane.keeps_weights = False
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RecipeError(
            f"the text cannot be read from where {point.checkpoint} left it: {error}", on_this_rank_only=True
        ) from error
    found = gather_hash(run, replace(blocks, update=state.update))

    def check() -> None:
        if found != state.blocks_sha256:
            raise RecipeError(
                f"the text of update {state.update} is not what it was: files, dataset revision or tokenizer have changed "
                f"since {point.checkpoint} was written; bring them back, or --resume fresh"
            )

    run.on_main(check)
    return blocks


def verification_loss(model: Any, blocks: UpdateBlocks) -> float:
    """Mean loss of an unwrapped model on the first targets of lane 0, which rank 0 always holds, without dropout."""
    was_training = model.training
    model.eval()
    inputs, targets, *starts = (tensor[:1] for tensor in blocks.batch)
    inputs, targets = inputs[:, :VERIFICATION_TOKENS], targets[:, :VERIFICATION_TOKENS]
    with torch.no_grad(), eager(model):
        loss = model(inputs, targets, *starts).item() / targets.numel()
    reshard(model)
    model.train(was_training)
    return float(loss)
