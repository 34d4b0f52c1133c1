"""An event loop whose time is simulated: nothing waits for real, one seed gives one course.

When no callback is ready the time jumps to the next timer. A loop that has neither is stuck, which
is an error at once instead of a hang.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class StuckError(Exception):
    """Everybody waits for somebody else."""


class _Selector(selectors.DefaultSelector):
    """Waits by moving the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StuckError("nothing is ready and nobody has a timer")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` is simulated."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class VirtualClock:
    """``runtime.clock.Clock`` by the running loop."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def time(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in simulated time.

    The task returns nothing: where ``asyncio`` gives SIGINT back, ``signal`` writes out the task
    with what it has returned, twice: of a log of thousands of lines that took longer than all else.
    """
    answers: list[T] = []

    async def task() -> None:
        answers.append(await main)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(task())
    return answers[0]
