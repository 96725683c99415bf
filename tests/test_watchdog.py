"""Stacks of a run that hangs."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.parametrize(("minutes", "alive", "printed"), [(0.02, False, True), (0.02, True, False), (0, False, False)])
def test_stacks_are_printed_where_nothing_happens(minutes: float, alive: bool, printed: bool) -> None:
    """Not where steps end, nor where it is switched off."""
    program = f"""
        import time
        from normfree.train.watchdog import Watchdog

        def hang():
            for _ in range(30):
                time.sleep(0.1)
                if {alive}:
                    watchdog.alive()

        with Watchdog({minutes}) as watchdog:
            hang()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ("in hang" in ended.stderr) == printed
