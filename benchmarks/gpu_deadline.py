"""A limit on the time of something that does not look at a clock, such as a compiler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """The time is over in the middle of a row. Not an Exception, since compilers catch those."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTime when `seconds` have passed."""

    def end(number: int, frame: object) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)  # again, should somebody have caught the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
