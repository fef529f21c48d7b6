"""Launch ranks as `accelerate launch` does: `python -m recipe launch --config_file FILE recipe/train.py ...`.

accelerate's own launcher ends at most signals while its ranks train on, and with 1 whatever their exit codes are. This one
passes signals on, ends after its ranks, and with the exit code of the first that failed.
"""

import logging
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any

from recipe.errors import RecipeError
from recipe.run.stop import listened_signals

# For the last checkpoint, before the ranks that are left are killed: as long as ranks wait for each other.
SHUTDOWN_SECONDS = 1800


def main() -> None:
    """The command."""
    for number in listened_signals():
        signal.signal(number, _pass_on)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's launcher would answer the others by leaving
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks say themselves why they end
    try:
        launch_command(launch_command_parser().parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=_by_cause)
        if failure.exitcode < 0:
            raise RecipeError(
                f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}; the same command goes on from the last "
                "checkpoint",
                exit_code=128 - failure.exitcode,
            ) from None
        sys.exit(failure.exitcode)


def _by_cause(failure: tuple[int, Any]) -> tuple[bool, bool, int]:
    """The cause first: the launcher looks ten times a second, and may find ranks that have lost it, with code 1, beside it."""
    _, process = failure
    return process.exitcode >= 0, process.exitcode == 1, process.timestamp


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to the ranks, whose end is waited for; without any, leave."""
    import psutil

    ranks = psutil.Process().children()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        os._exit(128 + number)
