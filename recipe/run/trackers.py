"""accelerate's trackers, each behind a wall: one that fails is left out, and training goes on with the others."""

import importlib
import io
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from recipe.config.settings import Config, flat_settings
from recipe.errors import RecipeError
from recipe.text import one_line, redact

TRACKER_PROJECT = "token-budget-recipe"
TRACKER_DIRECTORIES = (TRACKER_PROJECT, "trackio", "wandb")  # of TensorBoard and the others, in the run directory
FINISH_SECONDS = 60.0  # that W&B may take at the end for what is not sent yet; trackio gives up after 30


def check_trackers(config: Config) -> None:
    """Have trackers write into the run directory, and refuse those that cannot start, before anything is done for the run.

    Raises:
        RecipeError: one is not installed, its installation is broken, or W&B is to send and has no login.
    """
    os.environ.setdefault("TRACKIO_DIR", str((Path(config.run.directory) / "trackio").resolve()))
    os.environ.setdefault("WANDB_DIR", config.run.directory)
    for name in config.log.trackers:
        try:
            module = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
            is_ready = name != "wandb" or not _needs_login(module) or module.login(prompt=False, verify=False)
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"log.trackers: {name} is not installed ({error}): pip install {name}, or leave it out"
            ) from None
        except Exception as error:
            raise RecipeError(f"log.trackers: {name} cannot be used ({_one_line(error)}); leave it out") from None
        if not is_ready:
            raise RecipeError(
                "log.trackers: wandb has no login: `wandb login`, or set WANDB_MODE=offline, or leave it out"
            )


def _needs_login(wandb: Any) -> bool:
    return wandb.setup().settings.mode not in ("offline", "dryrun", "disabled")


class Trackers:
    """Those of `log.trackers`; on rank 0, since nothing is started elsewhere.

    `report` is called with (tracker, reason, update, whether it is left out) when one has failed.
    """

    def __init__(self, config: Config, report: Callable[[str, str, int, bool], None]) -> None:
        self.config, self._report = config, report
        self._running: dict[str, Any] = {}
        self._update = 0
        self._warnings: deque[str] = deque()  # of trackio's threads

    def start(self, update: int) -> None:
        """Start them for a run that goes on after `update` updates; 0 for a new one.

        TensorBoard and trackio go on with the run's curves, and W&B begins another run of the same name.
        """
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        directory = self.config.run.directory
        called = {"name": Path(directory).resolve().name}
        limit = {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        plain = {k: v if isinstance(v, str | int | float) else str(v) for k, v in flat_settings(self.config).items()}
        make: dict[str, Callable[[], Any]] = {
            "tensorboard": lambda: TensorBoardTracker(TRACKER_PROJECT, directory),
            "trackio": lambda: TrackioTracker(TRACKER_PROJECT, resume="allow" if update else "never", **called),
            "wandb": lambda: WandBTracker(TRACKER_PROJECT, settings=limit, **called),
        }
        self._update = update
        sys.argv[1:] = map(redact, sys.argv[1:])  # W&B sends them, and they may hold the whole address of a text
        self._hear_threads()
        for name in dict.fromkeys(self.config.log.trackers):
            with self._wall(name), redirect_stdout(io.StringIO()):  # trackio's words, in colours even in a pipe
                tracker = make[name]()
                tracker.start()
                tracker.store_init_configuration(plain)
                self._running[name] = tracker

    def log(self, values: dict[str, int | float], update: int) -> None:
        """Give them the numbers of an update."""
        self._update = update
        for name, tracker in list(self._running.items()):
            with self._wall(name):
                tracker.log(values, step=update)
        while self._warnings:
            self._report("trackio", self._warnings.popleft(), update, False)

    def finish(self) -> None:
        """Let them send what they hold."""
        for name, tracker in list(self._running.items()):
            with self._wall(name), redirect_stdout(io.StringIO()):
                tracker.finish()
        self._running.clear()
        self.log({}, self._update)

    @contextmanager
    def _wall(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what a plugin raises is anything
            self._running.pop(name, None)
            self._report(name, _one_line(error), self._update, True)

    def _hear_threads(self) -> None:
        """What trackers say in threads of their own: trackio warns, and TensorBoard's writer raises again what it printed."""
        show, hook = warnings.showwarning, threading.excepthook

        def showwarning(
            message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any
        ) -> None:
            if Path(filename).parent.name == "trackio":
                self._warnings.append(_one_line(message))
            else:
                show(message, category, filename, *rest, **more)

        def excepthook(arguments: Any) -> None:
            if not type(arguments.thread).__module__.startswith("tensorboard."):
                hook(arguments)

        if self.config.log.trackers:
            warnings.showwarning, threading.excepthook = showwarning, excepthook


def _one_line(error: Exception | str) -> str:
    return one_line(str(error)) or type(error).__name__
