"""Copies of jobs that end at once when nobody wants them: the job is paused or cancelled.

Among many jobs a copy waits in the queue of the workers for longer than it takes, and on a slow
disk one of some MiB takes tenths of seconds. So a job works under a ``Halt``: when that is asked
for, what is queued is withdrawn, and what is under way ends between two of its system calls. The
job does those pieces again later.

Runs on: ``Halt`` and ``run`` on the event loop; ``check`` on the worker, in the work.

Invariants: work is begun once, by a worker or, withdrawn, by the loop, where it raises at once.
Whoever is given work to do calls ``check`` before anything else, so that what it was given
(descriptors) is let go of in either case. Without a ``Halt`` nothing is different.

Errors: ``HaltedError``, out of ``run``: some of the work may have been done.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar, TypeVarTuple

from liveblockd.runtime.workers import JobFuture

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Ts = TypeVarTuple("Ts")


class HaltedError(Exception):
    """The work was ended before it was done, for nobody wants it now; no failure."""


class Pool(Protocol):
    """Workers, or a lane of theirs."""

    def submit(self, fn: Callable[[*Ts], T], *args: *Ts) -> JobFuture[T]:
        """As ``WorkerPool.submit``."""


class _AtWork(threading.local):
    halt: Halt | None = None


class Effort:
    """What was done on workers within one ``over``; without a clock nothing is known of it."""

    def __init__(self, halt: Halt) -> None:
        self.halt = halt
        #: for which workers were at it; not those in which it waited for one
        self.seconds = 0.0


_at_work = _AtWork()
_current: ContextVar[Effort | None] = ContextVar("effort", default=None)


class Halt:
    """Asked for once, by ``ask``; work that begins afterwards is under another one.

    ``clock`` is for what work takes; it is looked at by workers.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock
        #: read by workers
        self.asked = False
        self._queued: set[Work[Any]] = set()

    def ask(self) -> None:
        """End what is queued now, and what is under way soon."""
        self.asked = True
        queued, self._queued = self._queued, set()
        for work in queued:
            work.withdraw()

    @contextmanager
    def over(self) -> Iterator[Effort]:
        """The work of the current task, and of those that it makes, is under this one."""
        effort = Effort(self)
        token = _current.set(effort)
        try:
            yield effort
        finally:
            _current.reset(token)


class Work(Generic[T_co]):
    """``fn(*args)`` under ``halt``; ``begun`` is called by whoever does it, and says who may."""

    def __init__(self, halt: Halt, fn: Callable[..., T_co], args: tuple[Any, ...]) -> None:
        self.halt = halt
        self.fn = fn
        self.args = args
        #: that it took a worker
        self.seconds = 0.0
        self.result: JobFuture[Any] = JobFuture(loop=asyncio.get_running_loop())
        self._claims = [None]  # list.pop is atomic

    def begun(self) -> bool:
        """Whether the caller is the first one, who does it."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        return True

    def __call__(self) -> T_co | None:
        """On a worker; None where it was withdrawn."""
        return self._do() if self.begun() else None

    def _do(self) -> T_co:
        clock = self.halt.clock
        begun = clock() if clock is not None else 0.0
        _at_work.halt = self.halt
        try:
            return self.fn(*self.args)
        finally:
            _at_work.halt = None
            if clock is not None:
                self.seconds = clock() - begun

    def withdraw(self) -> None:
        """On the loop: nothing of it is done, unless a worker has begun with it."""
        if self.begun():
            try:
                self._do()
            except BaseException as error:
                self._fail(error)
            else:
                raise AssertionError(f"{self.fn} did not look whether it is wanted")

    def ended(self, job: asyncio.Future[Any]) -> None:
        """The worker has ended it, or found it withdrawn."""
        error = job.exception()
        if self.result.done():
            return
        if error is None:
            self.result.set_result(job.result())
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.result.set_exception(error)
        if self.result.unwanted:
            self.result.exception()  # or asyncio complains that nobody looked


async def run(pool: Pool, fn: Callable[[*Ts], T], *args: *Ts) -> T:
    """``await pool.run(fn, *args)``; under a halt it may raise HaltedError instead."""
    effort = _current.get()
    if effort is None:
        return await pool.submit(fn, *args)
    halt = effort.halt
    work = Work(halt, fn, args)
    if halt.asked:
        work.withdraw()
    else:
        halt._queued.add(work)
        pool.submit(work).add_done_callback(work.ended)
    try:
        result: T = await work.result
    finally:
        halt._queued.discard(work)
        effort.seconds += work.seconds
    return result


def check() -> None:
    """On a worker: raise HaltedError if what it does is not wanted any more."""
    halt = _at_work.halt
    if halt is not None and halt.asked:
        raise HaltedError
