"""What ranks agree on once per update: to stop, or that one of them ran out of memory. Either abandons the open update.

A request to stop is SIGINT, SIGTERM, SIGUSR1, SIGHUP, or an error after which a rank cannot go on.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from recipe.errors import RecipeError
from recipe.text import one_line

# A terminal that is closed sends SIGHUP.
STOP_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, n)]
REPEAT_SECONDS = 1.0
INTERFACE = (
    "if machines do not reach each other by their names, set GLOO_SOCKET_IFNAME to their network's interface, as eth0"
)
_ERROR = 1000  # beyond any signal's number; the rest is an exit code
# Until the process ends: the destructor of a process group waits for its threads while it holds the interpreter, and they may
# want it, to let go of a last tensor. Now and then a rank whose work was done hung, when train() returned.
KEPT_GROUPS: list[Any] = []


class Stopped(Exception):
    """All ranks have agreed to stop: they abandon the open update or evaluation."""


class DoesNotFit(RuntimeError):
    """All ranks have agreed that one of them ran out of memory: they abandon the open update."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} ran out of memory")
        self.rank = rank


class StopRequest:
    """A request to stop, and the ranks' agreement on it.

    Attributes:
        signal: request on this rank, or the one that the ranks agreed on; 0: none.
        received: signals that came to this rank.
        agreements: times that the ranks have agreed.
        rank_out_of_memory: 1 + the rank that ran out of memory in this update; 0: none.
        is_agreed: whether the ranks have agreed to stop.
        is_preparing: nothing is to be saved yet, so a signal ends this process at once.
    """

    def __init__(self) -> None:
        self.signal = self.received = self.agreements = self.rank_out_of_memory = 0
        self.is_agreed = self.is_preparing = False
        self._group: Any = None
        self._ranks, self._words = 1, ""

    def listen(self) -> None:
        """Take signals as requests. The same signal a second time leaves at once, with nothing saved.

        Launchers follow a Ctrl-C with a SIGTERM of their own, so another signal is not a second one; and they pass on a
        SIGTERM that the ranks may have had already, so one that follows within a second is not either.
        """
        # Python calls a handler when the main thread comes back to it, which takes a while if that is in a library or waits for
        # another rank. The number of the signal is written at once, for a thread that waits for it.
        received, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(received,), name="signals", daemon=True).start()
        for number in listened_signals():
            signal.signal(number, self._receive)

    def prepare(self, words: str = "before training began") -> None:
        """Until `prepared` nothing is to be saved: a signal ends this process at once, and a line says so in these words."""
        self.is_preparing, self._words = True, words

    def prepared(self) -> None:
        """From here on a signal is a request, and what is done is saved."""
        self.is_preparing = False

    def connect(self, ranks: int) -> None:
        """Form a group of all ranks on the CPU, so that agreeing never waits for a GPU. Collective.

        Raises:
            RecipeError: the ranks do not reach each other.
        """
        self._ranks = ranks
        if ranks > 1:
            import torch

            try:
                self._group = torch.distributed.new_group(backend="gloo")
            except RuntimeError as error:
                reason = one_line(str(error))[:300]
                raise RecipeError(
                    f"this rank does not reach the others over gloo: {reason}; {INTERFACE}", on_this_rank_only=True
                ) from error
            KEPT_GROUPS.extend([torch.distributed.group.WORLD, self._group])

    def agree(self) -> None:
        """Agree with the other ranks whether to abandon what is open. Collective: each rank calls it once per update.

        Raises:
            Stopped: a rank was asked to stop.
            DoesNotFit: a rank ran out of memory, and none was asked to stop.
        """
        self.agreements += 1
        agreed, out_of_memory = self.signal, self.rank_out_of_memory
        if self._ranks > 1:
            import torch

            flags = torch.tensor([agreed, out_of_memory])
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=self._group)
            agreed, out_of_memory = flags.tolist()
        self.signal = agreed or self.signal  # one that came meanwhile counts the next time
        self.rank_out_of_memory = 0
        if agreed:
            self.is_agreed = True
            raise Stopped
        if out_of_memory:
            raise DoesNotFit(out_of_memory - 1)

    def request_stop(self, error: RecipeError, rank: int, already_printed: bool = False) -> None:
        """Ask to stop because this rank cannot go on; the others learn of it when they agree."""
        if not already_printed:
            print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
        self.signal = _ERROR + error.exit_code

    @property
    def reason(self) -> str:
        """What stopped the run."""
        return f"signal {self.signal}" if self.signal < _ERROR else "an error"

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it, or that of the error."""
        return 128 + self.signal if self.signal < _ERROR else self.signal - _ERROR

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        self.signal = self.signal or number

    def _watch(self, received: int) -> None:
        """Leave at once at a signal while there is nothing to save, and at one that came more than a moment ago already."""
        first: dict[int, float] = {}  # signal -> when it came first
        while numbers := os.read(received, 1):
            number = numbers[0]
            if number not in STOP_SIGNALS:
                continue
            if self.is_preparing and os.environ.get("RANK", "0") == "0":
                print(f"stopped by signal {number} {self._words}", file=sys.stderr, flush=True)
            if self.is_preparing or time.monotonic() - first.setdefault(number, time.monotonic()) > REPEAT_SECONDS:
                os._exit(128 + number)


def listened_signals() -> list[int]:
    """The signals that ask to stop, without a SIGHUP that `nohup` has switched off."""
    return [n for n in STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN or n == signal.SIGINT]
