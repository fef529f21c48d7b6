"""Try again what may succeed later: the one loop for requests that fail, and the pauses between its attempts."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def retry(
    action: Callable[[], Result],
    pauses: Iterable[float],
    may_pass: Callable[[Exception], bool] = lambda error: True,
    report: Callable[[Exception], None] = lambda error: None,
) -> Result:
    """The result of `action`, tried again after each of `pauses`, in seconds, as long as its error may pass.

    Raises:
        Exception: the error of `action` that may not pass, or the one after the last pause. An error that leads to another
            attempt goes to `report` instead.
    """
    left = iter(pauses)
    while True:
        try:
            return action()
        except Exception as error:
            pause = next(left, None) if may_pass(error) else None
            if pause is None:
                raise
            report(error)
        time.sleep(pause)


def growing_pauses(first: float, longest: float, within: float) -> Iterator[float]:
    """Pauses in seconds, each twice the one before up to `longest`, that end `within` seconds after the first failure."""
    pause, deadline = first, time.monotonic() + within  # nothing runs before the first pause is asked for
    while time.monotonic() + pause <= deadline:
        yield pause
        pause = min(2 * pause, longest)
