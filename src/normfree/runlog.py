"""What a run says while it runs: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_PLAIN_SECONDS = 10.0  # between plain lines


class Screen:
    """Prints messages, and the progress of a run between `with screen.progress(..)` and its end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line, above the bar if there is one."""
        self.console.print(text, markup=False)

    def progress(self, total: int, start: int) -> ProgressLine:
        """A bar of `total` steps, `start` of which are done."""
        return ProgressLine(self, total, start)


class ProgressLine:
    """The bar, or its plain substitute."""

    def __init__(self, screen: Screen, total: int, start: int) -> None:
        self._screen, self._total, self._start, self._step = screen, total, start, start
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if screen.console.is_terminal:
            # 80 columns hold the count, the numbers and the time left; the bar gets what is over
            self._bar = Progress(
                BarColumn(bar_width=max(4, screen.console.width - 78)),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True),
                console=screen.console,
            )
            self._task = self._bar.add_task("step", total=total, completed=start, numbers="")

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done; the numbers stay."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def update(self, step: int, numbers: str) -> None:
        """`step` steps are done; `numbers` describe the last ones."""
        self._step = step
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._screen.say(f"step {step}/{self._total}  {numbers}  {self._left()} left")

    def _left(self) -> str:
        done = max(1, self._step - self._start)
        return duration((time.monotonic() - self._began) / done * (self._total - self._step))


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def percent(fraction: float) -> str:
    """99.12 %"""
    return f"{100 * fraction:.2f} %"
