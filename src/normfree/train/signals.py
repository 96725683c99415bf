"""Requests to stop: a signal sets a flag, which the loop reads between steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what Slurm sends before a time limit


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `received`. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for s in _SIGNALS:
            self._before[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_code(self) -> int:
        """130 for an interrupt from the keyboard, 143 for the others."""
        return 130 if self.received == signal.SIGINT else 143
