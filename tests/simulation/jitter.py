"""Workers that take a time drawn from a seed: a page cache answers at once, a disk does not."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from liveblockd.runtime.workers import JobGroup, Lane, WorkerPool

T = TypeVar("T")


class JitterPool(WorkerPool):
    """A worker pool whose jobs begin late and end late, so that more of them overlap."""

    def __init__(self, rng: random.Random, worst: float) -> None:
        super().__init__(threads=6)
        self._rng = rng
        self._worst = worst  # seconds

    @property
    def copies(self) -> WorkerPool:
        """The same workers: copies are late as well."""
        return self

    syncs = copies

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        group: JobGroup | None,
        lane: Lane | None = None,
    ) -> asyncio.Future[T]:
        before, after = (self._rng.choice((0, 0, 0.1, 1)) * self._worst for _ in range(2))

        def slow() -> T:
            time.sleep(before)
            try:
                return fn(*args)
            finally:
                time.sleep(after)

        return super()._submit(slow, (), group, lane)
