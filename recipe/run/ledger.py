"""The ledger: one JSON line per update in ledger.jsonl, everything else in events.jsonl, and the numbers to the trackers."""

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from recipe.config.settings import Config
from recipe.errors import DIVERGED_EXIT_CODE, RecipeError
from recipe.format import json_value
from recipe.run.files import new_file, open_to_append, where_supported
from recipe.run.trackers import Trackers

LEDGER, EVENTS = "ledger.jsonl", "events.jsonl"


@dataclass(frozen=True)
class LedgerEntry:
    """One update. The names are a public interface; a value that is not known is null."""

    update: int  # updates done, from 1; 0 for the validation before training
    tokens: int  # target tokens seen so far
    loss: float | None = None  # mean over the update's targets on all ranks, nats per token
    grad_norm: float | None = None  # 2-norm of the whole gradient before clipping
    learning_rate: float | None = None  # of this update
    target_tokens: int | None = None  # unmasked targets of this update, over all ranks
    world_size: int | None = None  # ranks
    micro_batch_size: int | None = None  # blocks in one forward and backward, at most
    gradient_accumulation_steps: int | None = None  # micro-batches per rank
    # sha256 of the sorted sha256 of the update's blocks: the same however ranks shared them
    blocks_sha256: str | None = None
    update_seconds: float | None = None  # wall time of the update, waiting for data included, evaluation not
    data_wait_seconds: float | None = None  # the part of it spent waiting for data; the longest wait of any rank
    tokens_per_second: float | None = None  # target_tokens / update_seconds
    # Model FLOPs utilisation, (6 N + 12 L d T) x tokens_per_second / (peak of all devices); N without position embeddings
    mfu: float | None = None
    # Allocator peak of a GPU, or resident set of the process; the largest of any rank
    peak_memory_bytes: int | None = None
    checkpoint_stall_seconds: float | None = None  # time training stood still to copy its state for a checkpoint
    # Noise of the gradient, where it was measured (docs/batch.md): of this update and so noisy,
    noise_s2: float | None = None  # trace of the covariance of one token's gradient
    noise_g2: float | None = None  # squared norm of the true gradient
    noise_groups: int | None = None  # micro-batches that both are computed from, on all ranks
    noise_first_s2: float | None = None  # `noise_s2` from one micro-batch alone
    # and smoothed: noise_s2 / noise_g2 with its 95 % interval
    gradient_noise_scale_tokens: float | None = None
    gradient_noise_scale_tokens_low: float | None = None
    gradient_noise_scale_tokens_high: float | None = None  # null: not determined yet, above the low end
    gradient_snr: float | None = None  # target_tokens / gradient_noise_scale_tokens
    expected_cosine: float | None = None  # of the angle between this update's gradient and the true one
    # Of each source of a mixture: columns `source/NAME/tokens`, targets of this update from it, and `source/NAME/passes`,
    # complete passes over its documents, of the lane that has made most, up to the end of its shuffle window
    sources: dict[str, int | None] = field(default_factory=dict)
    # Columns `validation/NAME/loss` (nats per token) and `validation/NAME/bits_per_byte` of each set
    validation: dict[str, float | None] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """False if the update was skipped."""
        return all(value is None or math.isfinite(value) for value in (self.loss, self.grad_norm))

    def as_dictionary(self) -> dict[str, Any]:
        """What is written: every column, in every line; null for a validation loss that is not finite."""
        values = asdict(self)
        values |= values.pop("sources") | values.pop("validation")
        return dict(json_value(values))


class Ledger:
    """Appends lines on rank 0, and gives the numbers to the trackers. Nothing is opened before the first line."""

    def __init__(self, config: Config, accelerator: Any, say: Callable[[str], None]) -> None:
        self.directory = Path(config.run.directory)
        self.accelerator, self.say = accelerator, say
        self.trackers = Trackers(config, self._tracker_failed)
        self.config = config
        self._skipped_in_a_row = self._bad_rows = 0
        self._passes: dict[str, int] = {}  # over sources that are to be read so many times at most
        self._files: dict[str, IO[str]] = {}

    def write(self, entry: LedgerEntry) -> None:
        """Write one line and flush it; give its numbers to the trackers. A skipped update becomes an event instead.

        Raises:
            RecipeError: the line cannot be written, or too many updates in a row were skipped.
        """
        if not entry.is_finite:
            return self._skipped(entry)
        self._skipped_in_a_row = 0
        values = entry.as_dictionary()
        self._append(LEDGER, values)
        self.trackers.log({k: v for k, v in values.items() if isinstance(v, int | float)}, entry.update)

    def _skipped(self, entry: LedgerEntry) -> None:
        self._skipped_in_a_row += 1
        values = {"loss": str(entry.loss), "grad_norm": str(entry.grad_norm), "learning_rate": entry.learning_rate}
        self.event("skipped_update", entry.update, **values, blocks_sha256=entry.blocks_sha256)
        limit = self.config.stability.max_skipped_updates
        if self._skipped_in_a_row >= limit:
            raise RecipeError(
                f"updates {entry.update - self._skipped_in_a_row + 1} to {entry.update} were not finite (loss {entry.loss}, "
                f"gradient norm {entry.grad_norm}) and were skipped; parameters and checkpoints are those before them, the "
                f"blocks are in {EVENTS}. If only these are broken, the same command with --stability.max_skipped_updates "
                f"{2 * limit} goes on behind them; {with_lower_rate(self.config)}",
                exit_code=DIVERGED_EXIT_CODE,
            )

    def _tracker_failed(self, tracker: str, reason: str, update: int, is_left_out: bool) -> None:
        self.say(f"tracker {tracker} failed: {reason}; training goes on{' without it' if is_left_out else ''}")
        self.event("tracker_failed", update, tracker=tracker, reason=reason)

    def count_bad_rows(self, update: int, rows: int) -> None:
        """Write down how many rows without text the ranks have left out since they were started, where that has grown."""
        if rows > self._bad_rows:
            self.event("bad_rows", update, rows=rows)
            if rows.bit_length() > self._bad_rows.bit_length():
                self.say(f"left out so far, since they hold no text: {rows:,} rows (data.on_bad_row = skip)")
            self._bad_rows = rows

    def count_passes(self, update: int, columns: Mapping[str, int]) -> None:
        """Write down where a source of a mixture has been read `max_passes` times, as its columns say."""
        for source in self.config.data.sources:
            read, most = columns[f"source/{source.label}/passes"], source.max_passes
            if most and read >= most and read > self._passes.get(source.label, 0):
                self.event("passes", update, source=source.label, passes=read, max_passes=most)
                self.say(f"{source.label} has been read {read} times (max_passes = {most}), and is read again")
                self._passes[source.label] = read

    def event(self, event: str, update: int, **values: Any) -> None:
        """Write down something else that happened after `update` updates: a resume, a sample, a skipped update, ..."""
        self._append(EVENTS, {"event": event, "update": update, "time_utc": utc_now(), **values})

    def truncate(self, update: int) -> None:
        """Go back to what was written after `update` updates. On rank 0."""
        self.close()
        self._skipped_in_a_row = 0
        for name in (LEDGER, EVENTS):
            _truncate(self.directory / name, update)
        known = read_events(self.directory / EVENTS, "passes", update)
        self._passes = {event["source"]: event["passes"] for event in known}

    def amend(self, update: int, values: dict[str, float | None]) -> None:
        """Put what is known only now into the line of `update`, and give it to the trackers. Atomic.

        Raises:
            RecipeError: the ledger cannot be written.
        """
        if not self.accelerator.is_main_process:
            return
        self.close()
        values = json_value(values)
        path, lines = self.directory / LEDGER, []
        for line, old in _parsed_lines(path):
            lines.append(json.dumps(old | values, allow_nan=False).encode() if old["update"] == update else line)
        try:
            _write_lines(path, lines)
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error.strerror}", on_this_rank_only=True) from None
        self.trackers.log({k: v for k, v in values.items() if v is not None}, update)

    def sync(self) -> None:
        """Force what was written to the disk, before a checkpoint that follows it."""
        for file in self._files.values():
            with where_supported():
                os.fsync(file.fileno())

    def _append(self, name: str, values: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        path = self.directory / name
        try:
            if name not in self._files:
                self._files[name] = open_to_append(path)
            self._files[name].write(json.dumps(json_value(values), allow_nan=False) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error.strerror}", on_this_rank_only=True) from None

    def close(self) -> None:
        """Close both files; the next line opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def source_columns(config: Config) -> list[str]:
    """The columns of a mixture's sources: passes of each, then tokens of each."""
    labels = [source.label for source in config.data.sources]
    return [f"source/{label}/{what}" for what in ("passes", "tokens") for label in labels]


def with_lower_rate(config: Config) -> str:
    """How to train again with half the learning rate: that is another run, which a resume refuses."""
    lower = f"--optimizer.learning_rate {config.optimizer.learning_rate / 2:g} --resume fresh"
    other = shlex.quote(f"{config.run.directory.rstrip('/')}-lower-rate")
    return (
        f"for a lower rate begin again, by the same command with {lower}, which moves this run to previous/, or with "
        f"{lower} --run.directory {other}, which leaves it"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger.jsonl or events.jsonl; none if there is no file. Half-written ones are left out."""
    return [values for _, values in _parsed_lines(path)]


def read_updates(directory: Path) -> list[dict[str, Any]]:
    """The ledger of a run.

    Raises:
        RecipeError: an earlier version has written it.
    """
    lines = read_lines(directory / LEDGER)
    if any("event" in line for line in lines):
        raise RecipeError(
            f"{directory} was written by version 0.1.0 of this recipe, which can go on with it; here use another "
            "--run.directory, or --resume fresh to move it to previous/"
        )
    return lines


def read_events(path: Path, event: str, update: int) -> list[dict[str, Any]]:
    """The events of one kind after at most `update` updates."""
    return [values for values in read_lines(path) if values.get("event") == event and values["update"] <= update]


def utc_now() -> str:
    """The wall clock, to the second: 2026-11-23T12:00:00Z."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _parsed_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, its values) of each line that has an update: others were half written when the power went."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            values = json.loads(line)
            values["update"] = int(values["update"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
        found.append((line, values))
    return found


def _truncate(path: Path, update: int) -> None:
    """Keep the lines of updates up to `update`. Atomic."""
    if not path.exists():
        return
    _write_lines(path, [line for line, values in _parsed_lines(path) if values["update"] <= update])


def _write_lines(path: Path, lines: list[bytes]) -> None:
    """Put these lines in place of a file's, all or none."""
    with new_file(path) as file:
        file.write_bytes(b"".join(line + b"\n" for line in lines))
