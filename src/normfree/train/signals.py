"""Requests to stop: a signal sets a flag, which the loop reads between steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what Slurm sends before a time limit


def exit_code(number: int) -> int:
    """130 for an interrupt from the keyboard, 143 for the others."""
    return 130 if number == signal.SIGINT else 143


class EndNow(KeyboardInterrupt):
    """A signal, by its `number`, came within `StopRequest.at_once`. No Exception: compilers would wrap it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `received`. A second SIGINT interrupts at once.

    deaf: behind an error they are ignored: whoever started several processes ends those that are left when the first
        of them has gone, and this one is about to end by itself, with the right exit code.
    """

    def __init__(self, deaf: bool = False) -> None:
        self._deaf = deaf
        self._at_once = False
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for s in _SIGNALS:
            self._before[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for s, handler in self._before.items():
            signal.signal(s, signal.SIG_IGN if self._deaf and isinstance(e, Exception) else handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While it lasts a signal raises EndNow, in the middle of whatever is done; at the end, where that was lost."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
        if self.received is not None:
            raise EndNow(self.received)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
        if self._at_once:
            raise EndNow(number)
