"""Asking a run to stop: SIGINT, SIGTERM or SIGUSR1 on any rank, agreed over all of them."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """Remembers that a signal came. The same signal a second time leaves at once, with nothing saved.

    Launchers follow a Ctrl-C with a SIGTERM of their own, so another signal is not a second one.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._group: Any = None
        self._ranks = 1
        self._seen: set[int] = set()
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def connect(self, ranks: int) -> None:
        """Form a group of all ranks on the CPU, so that agreeing never waits for a GPU. Collective."""
        self._ranks = ranks
        if ranks > 1:
            import torch

            self._group = torch.distributed.new_group(backend="gloo")

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective: each rank calls it once for each update or evaluation."""
        if self._ranks > 1:
            import torch

            flag = torch.tensor(self.signal)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group)
            self.signal = int(flag)
        return self.signal > 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            os._exit(128 + number)
        self._seen.add(number)
        self.signal = self.signal or number
