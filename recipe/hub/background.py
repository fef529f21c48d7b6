"""Pushes in the background: one at a time, the newest checkpoint waits for its turn, and training waits for nothing.

A push runs in a process of its own. A thread that hangs in the network could not be ended, and the interpreter would wait
for it at the end; and hashing and sending gigabytes would take turns with the training.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recipe.config.settings import Config
from recipe.errors import RecipeError
from recipe.hub.client import check_access, explain, push_directory, revision_of
from recipe.plan.schedule import crosses

if TYPE_CHECKING:
    from recipe.run.console import Console
    from recipe.run.ledger import Ledger
    from recipe.run.stop import StopRequest

CHECK_SECONDS = 30.0
LONGEST_PUSH_SECONDS = 3600.0
POLL_SECONDS = 0.2


def check_hub(config: Config, console: Console) -> None:
    """Before a run: see that it can be pushed. A Hub that cannot be reached now is reported, and does not stop the run.

    Raises:
        RecipeError: the Hub refuses.
    """
    if config.hub.repo_id is None:
        return
    call = BackgroundCall(check_access, config.hub)
    limit = min(CHECK_SECONDS, config.hub.wait_seconds)
    answer = call.wait(limit)
    call.end()
    if answer is None:
        console.say(f"{config.hub.repo_id} could not be checked in {limit:g} s ({call.trouble}); pushes will be tried")
    elif isinstance(answer, RecipeError):
        raise answer
    else:
        console.say(f"checkpoints are pushed to {answer}")


class Pusher:
    """Pushes the checkpoints and the finished model of a run, from rank 0; the other ranks never talk to the Hub.

    Args:
        config: of the run.
        ledger: receives an event for each push that succeeded or not.
        console: receives a line for it.
        is_main: whether this is rank 0.
        done: updates before those of this process.
    """

    def __init__(self, config: Config, ledger: Ledger, console: Console, *, is_main: bool, done: int = 0) -> None:
        self.settings, self.run_directory = config.hub, Path(config.run.directory)
        self.tokens_per_update = config.batch.tokens_per_update
        self.ledger, self.console = ledger, console
        self.enabled = is_main and config.hub.repo_id is not None
        self._tokens = done * self.tokens_per_update  # of the newest checkpoint seen
        self._call: BackgroundCall | None = None
        self._sent: tuple[int, Path] | None = None  # update, and the directory that `_call` pushes
        self._waiting: list[tuple[int, Path]] = []

    @property
    def held(self) -> set[str]:
        """Names of the checkpoints that must not be removed yet."""
        return {path.name for _, path in [*self._waiting, *([self._sent] if self._sent else [])]}

    def checkpoint(self, update: int, directory: Path) -> None:
        """Take over a finished checkpoint if a push is due. It takes the place of one that still waits."""
        before, self._tokens = self._tokens, update * self.tokens_per_update
        every = self.settings.every_tokens
        if not self.enabled or not (every is None or crosses(before, self._tokens, every)):
            return
        while self._waiting:
            self._failed(*self._waiting.pop(), f"{directory.name} took its place in the queue")
        self._waiting.append((update, directory))
        self._begin()

    def finished_model(self, update: int, directory: Path) -> None:
        """Take over the finished model, which main will hold."""
        if self.enabled:
            self._waiting.append((update, directory))
            self._begin()

    def poll(self) -> None:
        """Report a push that has ended, and begin the next. Never waits."""
        if self._call is None:
            return
        answer = self._call.wait(0)
        if answer is None and time.monotonic() - self._call.started > LONGEST_PUSH_SECONDS:
            answer = RecipeError(f"not done after {LONGEST_PUSH_SECONDS:g} s ({self._call.trouble})")
        if answer is not None:
            self._end(answer)

    def finish(self, stop: StopRequest) -> None:
        """Wait for what is not pushed yet, `hub.wait_seconds` at most and no longer than until the next signal."""
        limit, received = self.settings.wait_seconds, stop.received
        deadline = time.monotonic() + limit
        if self._call is not None:
            self.console.say(f"waiting for the push to {self.settings.repo_id}, {limit:g} s at most")
        while self._call is not None:
            answer = self._call.wait(min(POLL_SECONDS, deadline - time.monotonic()))
            if answer is None and stop.received != received:
                answer = RecipeError(f"not done when {stop.reason} ended the wait ({self._call.trouble})")
            elif answer is None and time.monotonic() >= deadline:
                answer = RecipeError(f"not done {limit:g} s after the end of training ({self._call.trouble})")
            if answer is not None:
                self._end(answer)

    def _begin(self) -> None:
        if self._call is None and self._waiting:
            self._sent = self._waiting.pop(0)
            self._call = BackgroundCall(push_directory, self._sent[1], self.settings)

    def _end(self, answer: str | RecipeError) -> None:
        """Report how the push under way has ended, and begin the next."""
        assert self._call is not None
        assert self._sent is not None
        self._call.end()
        seconds = time.monotonic() - self._call.started
        (update, directory), self._sent, self._call = self._sent, None, None
        if isinstance(answer, RecipeError):
            self._failed(update, directory, str(answer))
        else:
            repo_id, revision = self.settings.repo_id, revision_of(directory, self.settings)
            self.console.say(f"pushed {directory.name} to {repo_id}@{revision}")
            self.ledger.event("push", update, repo=repo_id, revision=revision, commit=answer, seconds=round(seconds, 1))
        self._begin()

    def _failed(self, update: int, directory: Path, reason: str) -> None:
        repo_id, revision = self.settings.repo_id, revision_of(directory, self.settings)
        self.console.say(
            f"{directory.name} was not pushed to {repo_id}: {reason}; `python -m recipe push {self.run_directory}` "
            "pushes what is missing"
        )
        self.ledger.event("push_failed", update, repo=repo_id, revision=revision, reason=reason)


class BackgroundCall:
    """A function of the Hub client that is called in another process, which can be ended at any time and ends with this one.

    Args:
        function: is also given a function that it can report trouble to, in words.
        arguments: before that.
    """

    def __init__(self, function: Callable[..., str], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locks of threads and the GPU's state
        self._receiver, sender = spawn.Pipe(duplex=False)
        self._process = spawn.Process(target=_answer, args=(sender, function, arguments), daemon=True)
        self._process.start()
        sender.close()  # so that this end notices when the other is gone
        self.started = time.monotonic()
        self.trouble = "no answer"

    def wait(self, seconds: float) -> str | RecipeError | None:
        """What the function returned, or the error it raised as a RecipeError; None where it is not done in time."""
        deadline = time.monotonic() + seconds
        while self._receiver.poll(max(0.0, deadline - time.monotonic())):
            try:
                is_answer, value = self._receiver.recv()
            except EOFError:
                self._process.join()
                return RecipeError(f"its process ended with exit code {self._process.exitcode}")
            if is_answer:
                return cast("str | RecipeError", value)
            self.trouble = value
        return None

    def end(self) -> None:
        """Let nothing of it remain."""
        self._process.kill()
        self._process.join()
        self._receiver.close()


def _answer(sender: Connection, function: Callable[..., str], arguments: tuple[Any, ...]) -> None:
    """What the other process does."""
    from huggingface_hub import logging
    from huggingface_hub.utils import disable_progress_bars

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C here too; what it ends is the run's decision
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.set_verbosity_error()
    disable_progress_bars()
    value: str | RecipeError
    try:
        value = function(*arguments, lambda trouble: sender.send((False, trouble)))
    except Exception as error:
        value = RecipeError(explain(error))
    sender.send((True, value))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
