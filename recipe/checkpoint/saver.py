"""Checkpoints are written in the background: training stands still only while the tensors are copied."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipe.checkpoint.files import Snapshot, TrainingState, prune, take_snapshot, write_checkpoint
from recipe.checkpoint.resume import verification_loss
from recipe.config.settings import Config, flat_settings
from recipe.data.blocks import UpdateBlocks
from recipe.errors import RecipeError
from recipe.hub.background import Pusher
from recipe.plan.run_plan import RunPlan
from recipe.plan.schedule import crosses
from recipe.run.console import Console
from recipe.run.launch import on_main
from recipe.run.ledger import Ledger


class CheckpointSaver:
    """Decides on all ranks alike when a checkpoint is due, and writes it on rank 0, one at a time.

    A save that fails (disk full, permission) is reported, and the next one is tried when it is due.

    Args:
        config: of the run.
        plan: of the run.
        model: prepared.
        optimizer: prepared.
        tokenizer: goes into every checkpoint.
        pusher: is given every finished checkpoint.
        accelerator: of the ranks.
        ledger: receives an event for a save that failed.
        console: receives a line for each save.
    """

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        model: Any,
        optimizer: Any,
        tokenizer: Any,
        pusher: Pusher,
        *,
        accelerator: Any,
        ledger: Ledger,
        console: Console,
    ) -> None:
        self.config, self.plan, self.tokenizer = config, plan, tokenizer
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.ledger, self.console, self.pusher = ledger, console, pusher
        self.root = Path(config.run.directory) / "checkpoints"
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, str | None] | None = None  # of the thread: update, reason of the failure
        self._ready: tuple[Snapshot, TrainingState] | None = None  # copied, to be written
        self._memory: Snapshot | None = None  # of the last snapshot, for the next one
        self._unsaved: tuple[int, UpdateBlocks, str, list[list[float]]] | None = None
        self._last_save = time.monotonic()

    def snapshot(
        self, update: int, blocks: UpdateBlocks, blocks_sha256: str, recent: Iterable[list[float]] = ()
    ) -> float | None:
        """Copy the whole state if a checkpoint is due after this update. Collective.

        Returns: seconds that training stood still for it; None where none is due.
        """
        self.report()
        self.pusher.poll()
        self._unsaved = (update, blocks, blocks_sha256, list(recent))
        return self._copy() if self._is_due(update) else None

    def write(self) -> None:
        """Write what `snapshot` copied, in the background; called when the ledger has the update's line."""
        if self._ready is None:
            return
        snapshot, state = self._ready
        self._ready = None
        self.ledger.sync()
        held = self.pusher.held
        self._thread = threading.Thread(target=self._write, args=(snapshot, state, held), name="checkpoint-writer")
        self._thread.start()

    def settle(self) -> None:
        """Wait for the save under way, and forget the last update: the run goes back to a checkpoint."""
        self.report(wait=True)
        self._unsaved = None

    def finish(self) -> None:
        """Save the last update if it is not saved yet, and wait until it is on the disk. Collective.

        Raises:
            RecipeError: that could not be done.
        """
        if self._unsaved is not None:
            self._copy()
            self.write()
        # All ranks wait: a launcher ends the others when it sees the first one leave with an exit code.
        failure = on_main(self.accelerator, lambda: self.report(wait=True))
        if failure:
            raise RecipeError(
                f"the last checkpoint could not be written to {self.root}: {failure}; free the disk and start again: the "
                "run goes on from the checkpoint before it"
            )

    def _is_due(self, update: int) -> bool:
        settings, tokens_per_update = self.config.checkpoint, self.plan.update.tokens_per_update
        after = update * tokens_per_update
        if update == self.plan.planned_updates:
            return True
        if any(
            crosses(after - tokens_per_update, after, every)
            for every in (settings.every_tokens, settings.keep_every_tokens)
            if every
        ):
            return True
        if settings.every_minutes is None:
            return False
        from accelerate.utils import broadcast_object_list

        is_late = [time.monotonic() - self._last_save >= 60 * settings.every_minutes]
        return bool(broadcast_object_list(is_late)[0])  # by the clock of rank 0

    def _copy(self) -> float:
        from accelerate.utils import gather_object

        assert self._unsaved is not None
        started = time.perf_counter()
        update, blocks, blocks_sha256, recent = self._unsaved
        lane_states = gather_object(blocks.lane_states)  # ranks own lanes in order
        if self.accelerator.is_main_process:
            self.report(wait=True)
            proof = verification_loss(self.model, blocks, accelerator=self.accelerator)
            tokens = update * self.plan.update.tokens_per_update
            state = TrainingState(
                update=update,
                tokens=tokens,
                config=flat_settings(self.config),
                blocks_sha256=blocks_sha256,
                lane_states=lane_states,
                verification_loss=proof,
                skipped_batches=list(blocks.skipped_batches),
                recent=recent,
            )
            model = self.accelerator.unwrap_model(self.model)
            self._memory = take_snapshot(model, self.optimizer.optimizer, self._memory)
            self._ready = self._memory, state
        self._unsaved, self._last_save = None, time.monotonic()
        return time.perf_counter() - started

    def _write(self, snapshot: Snapshot, state: TrainingState, held: set[str]) -> None:
        keep = self.config.checkpoint
        try:
            gpt2_config = self.accelerator.unwrap_model(self.model).gpt2.config
            write_checkpoint(self.root, snapshot, state, gpt2_config, self.tokenizer)
            prune(self.root, keep.keep, keep.keep_every_tokens, self.plan.update.tokens_per_update, held)
            self._outcome = state.update, None
        except Exception as error:  # a full disk must not end a training that can outlive it
            self._outcome = state.update, getattr(error, "strerror", None) or str(error) or type(error).__name__

    def report(self, wait: bool = False) -> str | None:
        """Say how the save under way has ended, if it has; the reason where it failed."""
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread = None
        assert self._outcome is not None
        update, reason = self._outcome
        if reason is None:
            self.console.say(f"checkpoint {self.root}/step-{update:06d}")
            self.pusher.checkpoint(update, self.root / f"step-{update:06d}")
        else:
            self.console.say(
                f"checkpoint after update {update:,} failed: {reason}; tried again when the next one is due"
            )
            self.ledger.event("checkpoint_failed", update, reason=reason)
        return reason
