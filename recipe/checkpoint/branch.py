"""A branch: a run that goes on from a checkpoint of another one, with settings changed that enter the update."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe.checkpoint.files import TrainingState, read_state
from recipe.checkpoint.same_run import changed_updates, weights_of
from recipe.config.settings import Config, flat_settings
from recipe.data.lanes import Ranges, merge_ranges, number_of
from recipe.errors import RecipeError


def own_checkpoints(config: Config, own: list[Path]) -> list[Path]:
    """Those that a branch goes on from once it has begun: checkpoints of its directory. Empty: it begins at `resume`.

    Raises:
        RecipeError: `resume` does not name a checkpoint of another run.
    """
    if config.resume == "auto" and not own:
        raise RecipeError("run.branch needs the checkpoint to branch from: give its path, --resume PATH")
    given = Path(config.resume)
    if any(path.exists() and given.exists() and path.samefile(given) for path in own):
        raise RecipeError(
            f"{given} is of run.directory = {config.run.directory!r} itself: give the branch a --run.directory of its own"
        )
    return own


def check_branch(config: Config, checkpoint: Path, state: TrainingState) -> None:
    """Check that a checkpoint of the run directory is of the branch that `config` describes.

    Raises:
        RecipeError: it is of no branch, or of one from another checkpoint.
    """
    given, begun = Path(config.resume), state.branched_from
    if begun is None:
        raise RecipeError(f"{checkpoint} is of a run that is no branch: give the branch a --run.directory of its own")
    try:
        is_other = read_state(given).blocks_sha256 != begun["blocks_sha256"]
    except (OSError, ValueError):  # auto, of the Hub, or gone by now
        is_other = False
    if is_other:
        raise RecipeError(
            f"{checkpoint} has branched from {begun['checkpoint']}, not from {given}: give each branch a --run.directory "
            "of its own"
        )


def begin_branch(config: Config, checkpoint: Path, state: TrainingState, changes: dict[str, Any]) -> TrainingState:
    """The state at which a branch begins: it knows where it comes from, and finishes windows of blocks with earlier weights.

    `changes` are all those of settings.

    Raises:
        RecipeError: a schedule of the budget that is another one before the checkpoint.
    """
    past = [change for change in state.config.get("batch.schedule", []) if change["from_tokens"] < state.tokens]
    now = [change for change in flat_settings(config)["batch.schedule"] if change["from_tokens"] < state.tokens]
    if past != now:
        raise RecipeError(
            f"batch.schedule before the {state.tokens:,} tokens of {checkpoint} has to be that of its run, "
            f"{json.dumps(past)}: let changes begin at {state.tokens} tokens or later"
        )
    before = weights_of(state.config)
    lanes = state.lane_states
    if before != weights_of(flat_settings(config)):
        lanes = [{**lane, "weights": lane.get("weights") or before} for lane in lanes]
    facts = {"checkpoint": str(checkpoint), "update": state.update, "tokens": state.tokens}
    facts |= {"blocks_sha256": state.blocks_sha256, "changes": changed_updates(changes)}
    return replace(state, lane_states=lanes, branched_from=facts)


def skip_ahead(config: Config, tokens: int, skipped: Ranges) -> Ranges:
    """The blocks of every lane that a branch leaves out, which begins behind so many tokens and has left out `skipped`.

    Raises:
        RecipeError: run.skip_tokens is no whole number of blocks of every lane.
    """
    of_lanes, skip = config.batch.lanes * config.data.sequence_length, config.run.skip_tokens
    if skip % of_lanes:
        below = skip // of_lanes * of_lanes
        raise RecipeError(
            f"run.skip_tokens = {skip:,} is no whole number of blocks of each of the {config.batch.lanes} lanes: set it "
            f"to {below:,} or {below + of_lanes:,}"
        )
    first = number_of(tokens // of_lanes, skipped)
    return merge_ranges([*skipped, (first, first + skip // of_lanes)]) if skip else skipped
