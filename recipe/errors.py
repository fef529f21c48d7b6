"""The one exception that is a message to the user, and how a command ends with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

USER_ERROR_EXIT_CODE = 2
DIVERGED_EXIT_CODE = 3
DATA_EXIT_CODE = 4
INTERRUPTED_EXIT_CODE = 130


class RecipeError(Exception):
    """A user's mistake or an input that cannot be used: one line that says what was given, what would be valid, what to do.

    Args:
        message: the line.
        on_this_rank_only: True where the other ranks may not have seen the problem, so this rank has to say it itself.
        exit_code: of the command that ends with it.
    """

    def __init__(self, message: str, *, on_this_rank_only: bool = False, exit_code: int = USER_ERROR_EXIT_CODE) -> None:
        super().__init__(" ".join(message.split()))
        self.on_this_rank_only = on_this_rank_only
        self.exit_code = exit_code


def run_command(main: Callable[[], None]) -> None:
    """Call `main`; turn a `RecipeError` into one line on stderr and exit code 2, and Ctrl-C into exit code 130.

    Of several ranks that hit the same error only rank 0 prints it.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        main()
    except RecipeError as error:
        if rank == 0 or error.on_this_rank_only:
            where = f" (rank {rank})" if error.on_this_rank_only and rank else ""
            print(f"error{where}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        print(f"error (rank {rank}): another rank has ended; its message says why", file=sys.stderr, flush=True)
        sys.exit(1)
