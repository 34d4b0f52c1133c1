"""Waiting for what must come: by looking, not by a sleep that is enough on a quiet machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: seconds; only a test that fails waits for so long
TIMEOUT = 30.0


async def until(reached: Callable[[], object]) -> None:
    """Let the others go on until ``reached()``; AssertionError when it does not come."""
    loop = asyncio.get_running_loop()
    end = loop.time() + TIMEOUT
    turns = 0
    while not reached():
        assert loop.time() < end, "it did not come to that"
        turns += 1
        await asyncio.sleep(0 if turns < 100 else 0.001)
