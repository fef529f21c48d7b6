"""From which checkpoint a run goes on, and the proof that it is the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe.checkpoint.files import TrainingState, list_checkpoints, load_checkpoint, read_state, why_invalid
from recipe.config.command_line import read_config
from recipe.config.settings import Config, flat_settings
from recipe.data.blocks import UpdateBlocks, batch_index, next_update
from recipe.data.lanes import Lane
from recipe.errors import DIVERGED_EXIT_CODE, RecipeError
from recipe.hub.client import download_checkpoint
from recipe.model.kernels import eager
from recipe.plan.budget import UpdatePlan
from recipe.run.ledger import Ledger, gather_hash, read_events
from recipe.step.parity import TOLERANCE
from recipe.step.spikes import Spike

# What may change between the parts of a run: none of it enters the update. Everything else is the run.
MAY_CHANGE_ON_RESUME = (
    "run.directory",
    "run.max_updates",
    "run.parity_check",
    "batch.micro_batch_size",
    "batch.scaling",
    "data.cache_directory",
    "data.retry_seconds",
    "performance",
    "schedule.total_tokens",
    "schedule.tokens_per_parameter",
    "stability",
    "evaluation",
    "checkpoint",
    "hub",
    "log",
    "precision",
    "resume",
)

VERIFICATION_TOKENS = (
    64  # training waits for them at every checkpoint, and a function that is another one shows in any token
)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        checkpoint: verified directory to go on from; None for a new run.
        state: its training state.
        skipped: (name, reason) of newer checkpoints that do not verify.
        changes: dotted name -> [earlier value, value now] of harmless settings that changed.
        skipped_batches: draws (see `batch_index`) that rollbacks have left out, before the checkpoint or after it.
    """

    checkpoint: Path | None = None
    state: TrainingState | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)
    changes: dict[str, list[Any]] = field(default_factory=dict)
    skipped_batches: tuple[int, ...] = ()

    @property
    def update(self) -> int:
        """Updates done."""
        return self.state.update if self.state else 0

    @property
    def recent(self) -> list[list[float]]:
        """[loss, gradient norm] of the updates before."""
        return self.state.recent if self.state else []

    def __str__(self) -> str:
        lines = [f"skipped {name}: {reason}" for name, reason in self.skipped]
        lines += [f"{name} was {old!r}, is {new!r}" for name, (old, new) in self.changes.items()]
        return "\n".join([f"going on from {self.checkpoint}, after {self.update:,} updates", *lines])


def find_resume_point(config: Config) -> Start:
    """Decide by `resume: auto|fresh|PATH|hf://user/name@revision`. Reads every byte of the checkpoint it takes.

    Raises:
        RecipeError: the checkpoint or the directory belongs to another run, or no checkpoint of several verifies.
    """
    directory = Path(config.run.directory)
    if config.resume == "fresh":
        return Start()
    if config.resume == "auto":
        candidates = list_checkpoints(directory / "checkpoints")
        if not candidates:
            _check_same_run(_earlier_config(directory), config, f"{directory} holds another run")
            return Start()
    elif config.resume.startswith("hf://"):
        candidates = [download_checkpoint(config.resume, config.cache_directory / "hub")]
    else:
        candidates = [Path(config.resume)]
        if not candidates[0].is_dir():
            raise RecipeError(f"resume = {config.resume!r} is no directory: give auto, fresh, or a checkpoint's path")
    skipped: list[tuple[str, str]] = []
    for candidate in candidates:
        reason = why_invalid(candidate)
        if reason is None:
            state = read_state(candidate)
            changes = _check_same_run(state.config, config, f"{candidate} is of another run")
            rollbacks = read_events(
                candidate.resolve().parent.parent / "ledger.jsonl", "rollback", state.update
            )  # of its run
            draws = {*state.skipped_batches, *(draw for event in rollbacks for draw in event["skipped_batches"])}
            return Start(candidate, state, skipped, changes, tuple(sorted(draws)))
        skipped.append((candidate.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
    raise RecipeError(f"no checkpoint of {directory} can be used ({reasons}); --resume fresh starts again from nothing")


def _earlier_config(directory: Path) -> dict[str, Any] | None:
    path = directory / "config.yaml"
    return flat_settings(read_config(path)) if path.exists() and (directory / "ledger.jsonl").exists() else None


def _check_same_run(earlier: dict[str, Any] | None, config: Config, what: str) -> dict[str, list[Any]]:
    """Harmless changes from `earlier` to `config`; a change of the run itself is refused."""
    if earlier is None:
        return {}
    now = flat_settings(config)
    changes = {name: [earlier.get(name), value] for name, value in now.items() if earlier.get(name) != value}
    fatal = {name: values for name, values in changes.items() if not name.startswith(MAY_CHANGE_ON_RESUME)}
    if fatal:
        shown = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in fatal.items())
        raise RecipeError(f"{what}: {shown}; use another --run.directory, or --resume fresh to move it aside")
    return changes


def roll_back(config: Config, spike: Spike, update: int, skipped_batches: Sequence[int], ledger: Ledger) -> Start:
    """Go back to the newest checkpoint, and leave out the blocks of the updates that led to a spike. On rank 0.

    It is in the ledger, on the disk, before anything goes on, so that a run that is stopped then resumes in the same way.

    Args:
        config: of the run.
        spike: what was seen.
        update: in which update.
        skipped_batches: draws left out so far.
        ledger: is cut back, and receives the event.

    Raises:
        RecipeError: there is no checkpoint, or going back to this one has not helped `max_rollbacks` times.
    """
    settings = config.stability
    if not list_checkpoints(Path(config.run.directory) / "checkpoints"):
        raise spiked(
            update, spike, "this run has no checkpoint of its own to return to yet: lower --checkpoint.every_tokens, or"
        )
    start = find_resume_point(replace(config, resume="auto"))
    earlier = [event for event in read_events(ledger.path, "rollback", start.update) if event["update"] == start.update]
    if len(earlier) >= settings.max_rollbacks:
        raise spiked(update, spike, f"{len(earlier)} returns to {start.checkpoint} have not helped:")
    first = max(start.update, update - settings.rollback_updates) + 1
    guilty = {batch_index(number, skipped_batches) for number in range(first, update + 1)}
    left_out = sorted({*skipped_batches, *guilty} - {*start.skipped_batches})
    ledger.cut(start.update)
    ledger.event("rollback", start.update, spike_update=update, skipped_batches=left_out, **asdict(spike))
    ledger.sync()
    return replace(start, skipped_batches=tuple(sorted({*start.skipped_batches, *left_out})))


def on_spike(config: Config, spike: Spike, update: int, ledger: Ledger) -> None:
    """Note a spike in the ledger, and end the run where `stability.on_spike` says so.

    Raises:
        RecipeError: it does.
    """
    ledger.event("spike", update, **asdict(spike))
    if config.stability.on_spike == "stop":
        raise spiked(update, spike, "stability.on_spike = stop:")


def spiked(update: int, spike: Spike, why: str) -> RecipeError:
    """The error that ends a run at a spike."""
    return RecipeError(
        f"update {update}: {spike}; {why} the same command with --stability.on_spike rollback leaves out the blocks that led "
        "to it, with continue it goes on from the last checkpoint regardless; or lower --optimizer.learning_rate in another "
        "--run.directory",
        exit_code=DIVERGED_EXIT_CODE,
    )


def restore(
    start: Start,
    model: Any,
    optimizer: Any,
    lanes: Sequence[Lane],
    *,
    accelerator: Any,
    plan: UpdatePlan,
    precision: str,
) -> None:
    """Load weights, optimizer and lanes, and prove on the last update that they are those of the run. Collective.

    The update's blocks are read again: their hash has to be the recorded one, and the loss of lane 0's blocks too.

    Raises:
        RecipeError: the text has changed, or the model is not the one that was saved.
    """
    assert start.checkpoint is not None
    assert start.state is not None
    state = start.state
    load_checkpoint(start.checkpoint, accelerator.unwrap_model(model), optimizer.optimizer)
    for lane in lanes:
        lane.load_state_dict(state.lane_states[lane.index])
    blocks = next_update(lanes, plan.blocks_per_lane, accelerator.device)
    if gather_hash(accelerator, plan, blocks) != state.blocks_sha256:
        raise RecipeError(
            f"the text of update {state.update} is not what it was: files, dataset revision or tokenizer have changed since "
            f"{start.checkpoint} was written; bring them back, or --resume fresh"
        )
    if accelerator.is_main_process:
        loss = verification_loss(model, blocks, accelerator=accelerator)
        tolerance = TOLERANCE["bf16" if "bf16" in (precision, state.config["precision"]) else "fp32"]
        if not abs(loss / state.verification_loss - 1) <= tolerance:
            raise RecipeError(
                f"the model of {start.checkpoint} gives a loss of {loss:.6f} where {state.verification_loss:.6f} was recorded "
                f"(relative tolerance {tolerance:.0e}): this installation does not compute the same function",
                on_this_rank_only=True,
            )


def verification_loss(model: Any, blocks: UpdateBlocks, *, accelerator: Any) -> float:
    """Mean loss of the first targets of lane 0, which rank 0 holds in every launch, without dropout."""
    import torch

    plain = accelerator.unwrap_model(model)
    was_training = plain.training
    plain.eval()
    inputs, targets = (tokens[:1, :VERIFICATION_TOKENS] for tokens in blocks.batch)
    with torch.no_grad(), eager(plain):
        loss = plain(inputs, targets).item() / targets.numel()
    plain.train(was_training)
    return loss
