"""What a run is doing where it does nothing."""

from __future__ import annotations

import faulthandler
from types import TracebackType

_STANDARD_ERROR = 2


class Watchdog:
    """Prints the stacks of all threads to standard error when `alive` was not called for a time, and again and again.

    Args:
        minutes: that time; 0 is never.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    def __enter__(self) -> Watchdog:
        self.alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Begin to count anew. It runs in a thread that needs nothing of Python, so that it sees every hang."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=_STANDARD_ERROR)
