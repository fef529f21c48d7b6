"""What a person sees: one bar on a terminal, plain lines in a pipe, from rank 0 only."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from recipe.run.ledger import LedgerEntry

# In a pipe: a line for each of the first updates, then by time, first often and then more rarely.
FIRST_LINES = 10
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 30.0, 600.0
PAUSE_SHARE = 0.05  # of the time since the start


class Console:
    """Prints on rank 0. `tokens_after` says how much of the work so many of the `updates` are."""

    def __init__(self, enabled: bool, updates: int, tokens_after: Callable[[int], int] = int) -> None:
        self.enabled, self.updates, self.tokens_after = enabled, updates, tokens_after
        self._bar: Any = None
        self._started, self._first, self._next_line = 0.0, 0, 0.0

    def section(self, title: str, text: object) -> None:
        """A titled paragraph."""
        self.say(f"\n{title}\n{text}")

    def say(self, text: str) -> None:
        """A line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self.enabled:
            print(text, flush=True)

    def start(self, update: int) -> None:
        """Training begins after `update` updates."""
        self._started, self._first = time.perf_counter(), update
        if self.enabled and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:
            from tqdm import tqdm

            self._bar = tqdm(total=self.updates, initial=update, unit=" updates", dynamic_ncols=True)

    def progress(self, entry: LedgerEntry) -> None:
        """One update is done."""
        if not entry.is_finite:
            self.say(f"update {entry.update:,} skipped: loss {entry.loss}, gradient norm {entry.grad_norm}")
        values = f"loss {entry.loss:.4f}, {entry.tokens_per_second:,.0f} tokens/s, lr {entry.learning_rate:.2e}"
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(entry.update - self._bar.n)  # back, after a rollback
            return
        passed, done = time.perf_counter() - self._started, self.tokens_after(entry.update)
        if entry.update - self._first <= FIRST_LINES or passed >= self._next_line or entry.update == self.updates:
            pause = min(max(SHORTEST_PAUSE_SECONDS, PAUSE_SHARE * passed), LONGEST_PAUSE_SECONDS)
            self._next_line = passed + pause
            trained = max(done - self.tokens_after(self._first), 1)
            left = timedelta(seconds=round(passed * (self.tokens_after(self.updates) - done) / trained))
            self.say(f"update {entry.update:>6,}/{self.updates:,}  {values}, {left} left")

    def finish(self) -> None:
        """Training is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
