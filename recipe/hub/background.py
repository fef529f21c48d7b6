"""Pushes beside the training: one at a time, the newest checkpoint waits for its turn, and training waits for nothing.

Each push is a process, `python -m recipe push RUN --follow DIRECTORY`: a thread that hangs in the network cannot be ended, and
the interpreter would wait for it at the end. Its standard input stays open as long as the training lives.
"""

import os
import re
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

from recipe.hub.client import explain, files_of, revision_of
from recipe.plan.schedule import crosses
from recipe.run.run import Run
from recipe.text import one_line, redact

PUSHING = ".pushing"  # in the run directory: links to what is not pushed yet, so that pruning may remove the checkpoint
LONGEST_PUSH_SECONDS = 3600.0
POLL_SECONDS = 0.1


class Pusher:
    """Pushes checkpoints and the finished model from rank 0; on the other ranks it does nothing.

    `done` updates come before those of this process.
    """

    def __init__(self, run: Run, done: int = 0) -> None:
        self.run, self.settings, self.links = run, run.config.hub, run.directory / PUSHING
        self._saved = done  # updates of the newest checkpoint
        self._queue: list[tuple[int, Path]] = []  # (update, links to its files); the first is on its way
        self._child: Popen[str] | None = None
        self._started = 0.0
        if run.is_main:
            shutil.rmtree(self.links, ignore_errors=True)  # of a run that was killed
            if self.links.is_symlink():  # which would lead what is linked here to another place
                self.links.unlink()

    def push(self, update: int, directory: Path) -> None:
        """Push a checkpoint if one is due, or the finished model. A checkpoint takes the place of one that waits."""
        if not self.run.is_main or self.settings.repo_id is None:
            return
        if directory.name != "final":
            before, self._saved, every = self._saved, update, self.settings.every_tokens
            if every and not crosses(self.run.plan.tokens_after(before), self.run.plan.tokens_after(update), every):
                return
            while len(self._queue) > 1:
                self._report(*self._queue.pop(), f"{directory.name} took its place in the queue")
        links = self.links / str(time.time_ns()) / directory.name
        try:
            for name, path in files_of(directory).items():
                (links / name).parent.mkdir(parents=True, exist_ok=True)
                _link(path, links / name)
        except OSError as error:
            return self._report(update, links, explain(error))
        self._queue.append((update, links))
        self.poll()

    def poll(self) -> None:
        """Report a push that has ended, and begin the next. Never waits."""
        if self._child is not None and self._child.poll() is not None:
            self._end()
        elif self._child is not None and time.monotonic() - self._started > LONGEST_PUSH_SECONDS:
            self._end(f"not done after {LONGEST_PUSH_SECONDS:g} s")
        if self._child is None and self._queue:
            self._begin()

    def finish(self) -> None:
        """Wait for what is not pushed yet: `hub.wait_seconds` at most, and no longer than until the next signal."""
        limit, stop = self.settings.wait_seconds, self.run.stop
        received, deadline = stop.received, time.monotonic() + limit
        self.poll()
        if self._queue:
            self.run.console.say(f"waiting for the push to {self.settings.repo_id}, {limit:g} s at most")
        while self._queue and stop.received == received and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self.poll()
        late = f"{limit:g} s after the end of training"
        while self._queue:
            self._end(f"not done {late if stop.received == received else f'when {stop.reason} ended the wait'}")

    def _begin(self) -> None:
        """Start the process that pushes the first of the queue."""
        root = str(Path(__file__).resolve().parents[2])  # so that it finds the recipe, installed or not
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", root)])
        # What it prints waits in a pipe, whatever this console's encoding is.
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error", "PYTHONIOENCODING": "utf-8:replace"}
        pipes: dict[str, Any] = {
            "stdin": PIPE,
            "stdout": PIPE,
            "stderr": STDOUT,
            "encoding": "utf-8",
            "errors": "replace",
        }
        self._started = time.monotonic()
        try:
            self._child = Popen(
                [sys.executable, "-m", "recipe", "push", str(self.run.directory), "--follow", str(self._queue[0][1])],
                env=os.environ | quiet | {"PYTHONPATH": path},
                start_new_session=True,  # a terminal's Ctrl-C goes to the training alone, which decides what it ends
                **pipes,
            )
        except OSError as error:
            self._report(*self._queue.pop(0), explain(error))

    def _end(self, given_up: str = "") -> None:
        """Report the first of the queue: what its process printed last, or the reason why it is given up."""
        (update, links), child, self._child = self._queue.pop(0), self._child, None
        said, commit = "no answer", None
        if child is not None:
            child.kill()
            output = child.communicate()[0]
            said = output or (said if given_up else f"exit code {child.returncode}")
            commit = re.search(r", commit (\w+)$", output, re.MULTILINE)
        last = said.splitlines()[-1].rpartition(f" was not pushed to {self.settings.repo_id}: ")[2]
        last = redact(one_line(last))
        self._report(update, links, f"{given_up} ({last})" if given_up else last, commit[1] if commit else None)

    def _report(self, update: int, links: Path, reason: str, commit: str | None = None) -> None:
        """Remove the links to a directory, and say that it was pushed as `commit`, or the reason why it was not."""
        shutil.rmtree(links.parent if self._queue else self.links, ignore_errors=True)
        repo_id, revision = self.settings.repo_id, revision_of(links, self.settings)
        if commit:
            seconds = round(time.monotonic() - self._started, 1)
            self.run.console.say(f"pushed {links.name} to {repo_id}@{revision}")
            self.run.ledger.event("push", update, repo=repo_id, revision=revision, commit=commit, seconds=seconds)
        else:
            later = f"`python -m recipe push {shlex.quote(str(self.run.directory))}` pushes what is missing"
            self.run.console.say(f"{links.name} was not pushed to {repo_id}: {reason}; {later}")
            self.run.ledger.event("push_failed", update, repo=repo_id, revision=revision, reason=reason)


def end_with_training(run_directory: Path) -> None:
    """In the process that pushes: end as soon as the standard input closes, because then the training is gone."""

    def watch() -> None:
        os.read(0, 1)
        shutil.rmtree(run_directory / PUSHING, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy on a file system that has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
