"""The exception that is a message to the user, and how a command ends with it. Imports nothing heavy."""

import os
import re
import select
import sys
import threading
from collections.abc import Callable

from recipe.streams import prepare_streams, send_nowhere
from recipe.text import one_line, redact

USER_ERROR_EXIT_CODE = 2
DIVERGED_EXIT_CODE = 3
DATA_EXIT_CODE = 4
OUT_OF_MEMORY_EXIT_CODE = 5  # of a sharded run: the same command goes on with smaller micro-batches
INTERRUPTED_EXIT_CODE = 130
BROKEN_PIPE_EXIT_CODE = 141


class RecipeError(Exception):
    """A user's mistake, or an input that cannot be used.

    Args:
        message: one line: what was given, what would be valid, what to change. Secrets in it are left out, and the middle of a
            very long line.
        on_this_rank_only: the other ranks may not see the problem, so this one prints the line even if it is not rank 0.
        exit_code: of the command.

    Attributes:
        is_on_all_ranks: they have been told, so rank 0 alone prints the line.
    """

    is_on_all_ranks = False

    def __init__(self, message: str, *, on_this_rank_only: bool = False, exit_code: int = USER_ERROR_EXIT_CODE) -> None:
        line = redact(one_line(message))
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}")
        self.on_this_rank_only = on_this_rank_only
        self.exit_code = exit_code


def run_command(main: Callable[[], None]) -> None:
    """Call `main`; turn a `RecipeError` into one line on stderr and its exit code, and Ctrl-C into exit code 130.

    What several ranks may have met, the first of each host prints; what all are known to have, rank 0.
    """
    prepare_streams()
    rank = int(found[0]) if (found := re.findall(r"^\d+$", os.environ.get("RANK", ""), re.ASCII)) else 0
    exit_code = 0
    try:
        try:
            main()
        except SystemExit as request:
            exit_code = request.code if isinstance(request.code, int) else int(request.code is not None)
        sys.stdout.flush()
    except BrokenPipeError:  # as after `| head`
        poll = select.poll()
        poll.register(sys.stdout, select.POLLOUT)
        if not any(found & select.POLLERR for _, found in poll.poll(0)):
            raise  # it was another pipe
        send_nowhere(sys.stdout)
        exit_code = BROKEN_PIPE_EXIT_CODE
    except RecipeError as error:
        is_first_of_host = os.environ.get("LOCAL_RANK") == "0" and not error.is_on_all_ranks
        if rank == 0 or error.on_this_rank_only or is_first_of_host:
            where = f" (rank {rank})" if rank else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        exit_code = error.exit_code
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        exit_code = INTERRUPTED_EXIT_CODE
    except RuntimeError as error:
        if "by peer" in str(error):  # gloo: connection closed, or reset
            message, exit_code = "another rank has ended; its message says why", 1
        elif "out of memory" in str(error) or "can't allocate memory" in str(error):
            message, exit_code = f"out of memory: {str(error).splitlines()[0]}", USER_ERROR_EXIT_CODE
        else:
            raise
        print(f"error (rank {rank}): {message}", file=sys.stderr, flush=True)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # In about one run of fifty a thread of gloo asks for the interpreter while that shuts down, and aborts a rank that is
        # done ("terminate called without an active exception"). So leave before that, after what the interpreter does
        # first: end idle pools (torch.compile's wait for ever), and wait for threads that still write.
        threading._shutdown()  # type: ignore[attr-defined]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if exit_code:
        sys.exit(exit_code)
