"""Time as an argument: who measures or waits is given a ``Clock``, so that tests can turn it.

Runs on: the event loop. No errors escape.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forward, the time of day, and waiting."""

    def monotonic(self) -> float:
        """Seconds since some moment; never goes back."""

    def time(self) -> float:
        """Seconds since the epoch, for what is shown to people and QMP clients."""

    async def sleep(self, seconds: float) -> None:
        """Return when ``seconds`` have gone by."""


class SystemClock:
    """The clock of the host."""

    def monotonic(self) -> float:
        """CLOCK_MONOTONIC, which the event loop uses too."""
        return time.monotonic()

    def time(self) -> float:
        """CLOCK_REALTIME."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """By the event loop."""
        await asyncio.sleep(seconds)
