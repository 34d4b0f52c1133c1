"""Doubles of ``runtime.workers.WorkerPool`` without threads.

``InlineWorkers`` runs a job when it is submitted. ``SeededWorkers`` queues the jobs and runs them
on the loop one by one in an order that a seed decides: what a test saw once it can see again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, TypeVar

from liveblockd.runtime.workers import JobFuture, JobGroup, Lane, WorkerPool

T = TypeVar("T")


def _finish(future: asyncio.Future[Any], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        result = fn(*args)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class InlineWorkers(WorkerPool):
    """A job has run when ``submit`` returns."""

    @property
    def copies(self) -> WorkerPool:
        """The same workers: one order of all jobs."""
        return self

    syncs = copies_in_memory = copies

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        group: JobGroup | None,
        lane: Lane | None = None,
    ) -> JobFuture[T]:
        if self._closed:
            raise RuntimeError("the worker pool is closed")
        future: JobFuture[T] = JobFuture(loop=asyncio.get_running_loop())
        _finish(future, fn, args)
        if group is not None:
            asyncio.get_running_loop().call_soon(group.job_ended)
        return future


class SeededWorkers(WorkerPool):
    """Jobs run later, in an order drawn from ``seed``; ``step`` runs one now."""

    def __init__(self, seed: int, *, automatic: bool = True) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.automatic = automatic
        self.queued: list[tuple[JobFuture[Any], Any, tuple[Any, ...], JobGroup | None]] = []

    @property
    def copies(self) -> WorkerPool:
        """The same workers: one order of all jobs."""
        return self

    syncs = copies_in_memory = copies

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        group: JobGroup | None,
        lane: Lane | None = None,
    ) -> JobFuture[T]:
        if self._closed:
            raise RuntimeError("the worker pool is closed")
        loop = asyncio.get_running_loop()
        future: JobFuture[T] = JobFuture(loop=loop)
        self._outstanding += 1
        self.queued.append((future, fn, args, group))
        if self.automatic:
            loop.call_soon(self._later, self.random.randrange(4))
        return future

    def _later(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._later, turns - 1)
        else:
            self.step()

    def step(self) -> bool:
        """Run one queued job; False when there is none."""
        if not self.queued:
            return False
        future, fn, args, group = self.queued.pop(self.random.randrange(len(self.queued)))
        _finish(future, fn, args)
        self._outstanding -= 1
        if group is not None:
            group.job_ended()
        if not self._outstanding:
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
        return True
