"""Standard output and standard error, which may be closed, lose their reader, or be in an encoding that lacks a character."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any


class Unbreakable:
    """A text stream of this process: what it cannot take is dropped, so that saying something never ends what is being said."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what waits."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # nobody will read again: the pipe or the terminal is gone
                send_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Make the streams usable: a file for each that is closed, escapes for characters that the encoding has not.

    Standard error becomes `Unbreakable`, since it tells how a command ended.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file to be opened would get this number, and with it what libraries print
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    sys.stderr = Unbreakable(sys.stderr)


def send_nowhere(stream: Any) -> None:
    """Let what is left for a stream, and all that follows, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
