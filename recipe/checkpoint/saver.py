"""Checkpoints are written in the background: training stands still only while the tensors are copied."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe.checkpoint.files import Snapshot, TrainingState, prune, take_snapshot, write_checkpoint
from recipe.checkpoint.parts import Writers
from recipe.checkpoint.resume import verification_loss
from recipe.config.settings import flat_settings
from recipe.data.blocks import UpdateBlocks
from recipe.errors import RecipeError
from recipe.model.sharding import ranks_with_parts
from recipe.plan.schedule import crosses
from recipe.run.ledger import LedgerEntry
from recipe.run.run import Run


class CheckpointSaver:
    """Decides on all ranks alike when a checkpoint is due, and writes it, one at a time: rank 0, and whoever holds a part.

    A save that fails (disk full, permission) is reported, and the next one is tried when it is due.

    `on_saved` is called on rank 0 with (update, directory) of every checkpoint that is on the disk.
    """

    def __init__(
        self, run: Run, model: Any, optimizer: Any, tokenizer: Any, on_saved: Callable[[int, Path], None]
    ) -> None:
        self.run, self.model, self.optimizer, self.tokenizer = run, model, optimizer, tokenizer
        self.on_saved = on_saved
        self.root = run.directory / "checkpoints"
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: tuple[int, Future[None]] | None = None
        self._snapshot = Snapshot({}, {}, writers=Writers(run.rank, ranks_with_parts(run)))  # the last one
        self._unsaved: tuple[LedgerEntry, UpdateBlocks, list[list[float]], list[float]] | None = None
        self._last_save = time.monotonic()
        self.failure: str | None = None  # why the last update is not saved

    def finish_update(
        self, entry: LedgerEntry, blocks: UpdateBlocks, recent: Iterable[list[float]], noise: Iterable[float] = ()
    ) -> None:
        """Write the update's line; if a checkpoint is due, copy the state before, and write it in the background. Collective.

        `recent` is [loss, gradient norm] of the updates that a spike is compared with; `noise` are the sums of the noise scale.

        Raises:
            RecipeError: the line cannot be written, or too many updates in a row were skipped.
        """
        self.report()
        self._unsaved = (entry, blocks, list(recent), list(noise))
        if not self._is_due(entry.update):
            return self.run.ledger.write(entry)
        started = time.perf_counter()
        state = self._copy()
        self.run.ledger.write(replace(entry, checkpoint_stall_seconds=time.perf_counter() - started))
        self._write(state)

    def wait_and_discard(self) -> None:
        """Wait for the save under way, and forget the last update: the run goes back to a checkpoint."""
        self.report(wait=True)
        self._unsaved = None

    def finish(self) -> None:
        """Save the last update if it is not saved yet, and wait until it is on the disk. Collective."""
        if self._unsaved is not None:
            self._write(self._copy())
        reason = self.report(wait=True)
        # All ranks wait: a launcher ends the others when it sees the first one leave with an exit code.
        self.failure = self.run.on_main(lambda: reason)

    def raise_failure(self) -> None:
        """End rank 0, once everything else is done, if the last update could not be saved.

        Raises:
            RecipeError: the reason, and how to go on.
        """
        if self.failure and self.run.is_main:
            raise RecipeError(
                f"the last checkpoint could not be written to {self.root}: {self.failure}; once it can be, the same command "
                "goes on from the checkpoint before it"
            )

    def _is_due(self, update: int) -> bool:
        settings, plan = self.run.config.checkpoint, self.run.plan
        every_tokens = filter(None, (settings.every_tokens, settings.keep_every_tokens))
        if update == plan.planned_updates:
            return True
        if any(crosses(plan.tokens_after(update - 1), plan.tokens_after(update), every) for every in every_tokens):
            return True
        if settings.every_minutes is None:
            return False
        from accelerate.utils import broadcast_object_list

        is_late = [time.monotonic() - self._last_save >= 60 * settings.every_minutes]
        return bool(broadcast_object_list(is_late)[0])  # by the clock of rank 0

    def _copy(self) -> TrainingState | None:
        """Copy model and optimizer, on ranks that write; the state that belongs to them. Collective."""
        from accelerate.utils import gather_object

        assert self._unsaved is not None
        entry, blocks, recent, noise = self._unsaved
        lane_states = gather_object(blocks.lane_states)  # ranks own lanes in order
        state, model = None, self.run.accelerator.unwrap_model(self.model)
        if self.run.is_main or self.run.is_sharded:
            loss = verification_loss(model, blocks)
        if self.run.rank < self._snapshot.writers.count:
            self.report(wait=True)
            self._snapshot = take_snapshot(model, self.optimizer.optimizer, self._snapshot)
            state = TrainingState(
                update=entry.update,
                tokens=entry.tokens,
                config=flat_settings(self.run.config),
                blocks_sha256=entry.blocks_sha256 or "",  # of rank 0, which writes it
                lane_states=lane_states,
                verification_loss=loss,
                skipped_blocks=[[*stretch] for stretch in blocks.skipped_blocks],
                recent=recent,
                noise=noise,
                text=self.run.text_record,
                branched_from=self.run.branched_from,
            )
        self._unsaved, self._last_save = None, time.monotonic()
        return state

    def _write(self, state: TrainingState | None) -> None:
        """Begin to write what was copied; the ledger has the update's line already."""
        if state is not None:
            if self.run.is_main:
                self.run.ledger.sync()
            self._writing = state.update, self._writer.submit(self._write_and_prune, state)

    def _write_and_prune(self, state: TrainingState) -> None:
        settings = self.run.config.checkpoint
        gpt2_config = self.run.accelerator.unwrap_model(self.model).gpt2.config
        write_checkpoint(self.root, self._snapshot, state, gpt2_config, self.tokenizer)
        if self.run.is_main:
            prune(self.root, settings.keep, settings.keep_every_tokens, self.run.plan.tokens_after)

    def report(self, wait: bool = False) -> str | None:
        """Say how the save under way has ended, if it has; the reason if it failed."""
        if self._writing is None or not (wait or self._writing[1].done()):
            return None
        (update, future), self._writing = self._writing, None
        error = future.exception()
        if not self.run.is_main:  # who has the outcomes of all
            return None
        if error is None:
            self.run.console.say(f"checkpoint {self.root}/step-{update:06d}")
            self.on_saved(update, self.root / f"step-{update:06d}")
            return None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self.run.console.say(
            f"checkpoint after update {update:,} failed: {reason}; tried again when the next one is due"
        )
        self.run.ledger.event("checkpoint_failed", update, reason=reason)  # a full disk must not end a training
        return reason
