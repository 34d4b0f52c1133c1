"""How often others get their turn while something runs on the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def turns_of_loop(work: Coroutine[Any, Any, T]) -> tuple[T, int]:
    """What ``work`` returns, and the turns of the loop until then."""
    task = asyncio.get_running_loop().create_task(work)
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    return task.result(), turns
