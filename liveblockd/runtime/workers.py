"""A few threads that run blocking calls for the event loop, with one wake-up per batch of results.

Runs on: ``submit``, ``run``, ``idle`` and ``close`` on the event loop; the jobs on workers.

Invariants:

* A job that was submitted runs, once and to its end: a system call cannot be taken back. So its
  future cannot be cancelled either: a task that is cancelled while it awaits a job gets its
  CancelledError when the job has ended. A write that a cancelled job started can therefore not land
  later on, in clusters that belong to somebody else by then, and buffers and descriptors outlive
  the system calls on them.
* Whoever submits without awaiting does so through a ``JobGroup`` and awaits ``group.idle()`` before
  it closes the descriptor.
* A job is self-contained: it gets descriptors, offsets and buffers, and touches no state that the
  event loop changes.
* Results reach the loop in the order in which the jobs ended.

* At most so many threads as asked for are at work. One that sleeps in a system call is not: while a
  queue does not move others take its place (``stuck``), and leave when it comes back.

Errors: what the job raised comes out of the future; ``RuntimeError`` from a pool that is closed.
"""

from __future__ import annotations

import _thread
import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

from liveblockd.runtime.demand import Demand
from liveblockd.runtime.slices import COPY_SLICE, ask_for_slices
from liveblockd.runtime.stuck import LOOK, Worker

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

DEFAULT_THREADS = 4
#: for copies of jobs, however many jobs there are
COPY_THREADS = 3
#: for what waits for a disk and uses no processor: a file system makes many such calls wait for one
#: write of its journal, which they share if they are there in time
SYNC_THREADS = 8
#: in the place of those that wait for slow disks, at most, a pool
SPARE_THREADS = 16


class JobFuture(asyncio.Future[T]):
    """The result of a job; ``cancel`` is refused, see the module."""

    unwanted = False

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ARG002
        """Note that whoever waits was cancelled; it learns of that when the job has ended."""
        self.unwanted = True
        return False


# (future, function, arguments, group, lane); None ends a thread
_Job = tuple[JobFuture[Any], Callable[..., Any], tuple[Any, ...], "JobGroup | None", "Lane | None"]


class WorkerPool:
    """Up to ``threads`` daemon threads, each started when there is first work for it."""

    def __init__(
        self,
        threads: int = DEFAULT_THREADS,
        *,
        demand: Demand | None = None,
        time_slice: int = 0,
    ) -> None:
        if threads < 1:
            raise ValueError("a worker pool needs a thread")
        self._limit = threads
        #: of its threads, in nanoseconds; 0: that of who starts them
        self._slice = time_slice
        #: what lanes give way to
        self.demand = demand or Demand()
        self._threads: list[Worker] = []
        #: held where a thread leaves, or all have to
        self._leaving = threading.Lock()
        #: when the threads are looked at, while jobs wait for one
        self._watch: asyncio.TimerHandle | None = None
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._done: deque[tuple[_Job, Any, BaseException | None]] = deque()
        self._wake_up_pending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        #: jobs that were submitted and whose results the loop has not seen
        self._outstanding = 0
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._copies: WorkerPool | None = None
        self._copies_in_memory: WorkerPool | None = None
        self._syncs: WorkerPool | None = None

    @property
    def outstanding(self) -> int:
        """Jobs submitted and not yet delivered, copies and syncs included."""
        return self._outstanding + sum(pool.outstanding for pool in self._lanes)

    @property
    def _lanes(self) -> list[WorkerPool]:
        pools = (self._copies, self._copies_in_memory, self._syncs)
        return [pool for pool in pools if pool is not None]

    @property
    def copies(self) -> WorkerPool:
        """The lane of long copies: it has threads of its own, so that no request queues behind one.

        Idle and closed together with this pool.
        """
        if self._copies is None:
            self._copies = self._pool(COPY_THREADS, COPY_SLICE)
        return self._copies

    @property
    def copies_in_memory(self) -> WorkerPool:
        """The same for copies that wait for nothing but a processor: no more than there are."""
        if self._copies_in_memory is None:
            threads = min(COPY_THREADS, self.demand.processors)
            self._copies_in_memory = self._pool(threads, COPY_SLICE)
        return self._copies_in_memory

    @property
    def syncs(self) -> WorkerPool:
        """As ``copies``, for fdatasync(2): while other jobs write it takes tenths of seconds.

        Four at a time would leave no thread to a guest's write.
        """
        if self._syncs is None:
            self._syncs = self._pool(SYNC_THREADS, 0)
        return self._syncs

    def _pool(self, threads: int, time_slice: int) -> WorkerPool:
        if self._closed:
            raise RuntimeError("the worker pool is closed")
        return WorkerPool(threads, demand=self.demand, time_slice=time_slice)

    def lane(self, *, waits: bool = True) -> Lane:
        """A lane among the ``copies``, for those to one file.

        ``waits``: for more than a processor, a disk.
        """
        return Lane(self, waits=waits)

    def submit(self, fn: Callable[[*Ts], T], *args: *Ts) -> JobFuture[T]:
        """Queue ``fn(*args)``; the future has its result. Raises RuntimeError after ``close``."""
        return self._submit(fn, args, None)

    async def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """The result of ``fn(*args)``, run on a worker; see the module for cancellation."""
        return await self._submit(fn, args, None)

    def group(self) -> JobGroup:
        """A set of jobs that can be waited for together, for the owner of what they use."""
        return JobGroup(self)

    async def idle(self) -> None:
        """Return when no job is queued or running, whoever waits for it or no longer does."""
        while self.outstanding:
            for pool in self._lanes:
                await pool.idle()
            if self._outstanding:
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._idle_waiters.append(waiter)
                await waiter

    def close(self) -> None:
        """Let the queued jobs end, join the threads and hand out the results.

        Blocks for as long as the jobs take: ``await idle()`` first. Twice is harmless.
        """
        with self._leaving:
            self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        for pool in self._lanes:
            pool.close()
        for _ in self._threads:
            self._queue.put(None)
        for worker in self._threads:
            worker.ended.acquire()
        if self._threads:  # one of a lane may have come behind those
            self._queue.put(None)
            self._work(Worker())
        self._threads.clear()
        if self._loop is not None and not self._loop.is_closed():
            self._deliver()

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        group: JobGroup | None,
        lane: Lane | None = None,
    ) -> JobFuture[T]:
        if self._closed:
            raise RuntimeError("the worker pool is closed")
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: JobFuture[T] = JobFuture(loop=loop)
        self._outstanding += 1
        if self._outstanding > len(self._threads):
            if len(self._threads) < self._limit:
                self._start_thread()
            elif self._watch is None:
                self._watch = loop.call_later(LOOK, self._look)
        job: _Job = (future, fn, args, group, lane)
        if lane is None or lane.enter(job):
            self._queue.put(job)
        return future

    def _look(self) -> None:
        """Jobs have waited: is there a thread for each that sleeps?"""
        self._watch = None
        if self._closed or self._outstanding <= len(self._threads):
            return
        assert self._loop is not None
        now = self._loop.time()
        stuck = sum([worker.look(now) for worker in tuple(self._threads)])
        free = min(self._limit + min(stuck, SPARE_THREADS) - len(self._threads), stuck)
        for _ in range(min(free, self._queue.qsize())):
            self._start_thread()
        self._watch = self._loop.call_later(LOOK, self._look)

    def _start_thread(self) -> None:
        # The loop does not wait until the thread runs, as ``threading.Thread.start`` does: on a
        # busy machine that takes milliseconds.
        worker = Worker()
        worker.ended.acquire()
        try:
            _thread.start_new_thread(self._live, (worker,))
        except RuntimeError:
            # The host gives no more threads: those that run take the work, but one there must be.
            if not self._threads:
                self._outstanding -= 1
                raise
            return
        self._threads.append(worker)

    def _leaves(self, worker: Worker) -> bool:
        """On a worker: whether there are enough without it, who has stood in for another one."""
        with self._leaving:
            stuck = sum([other.stuck for other in self._threads])
            if self._closed or len(self._threads) - stuck <= self._limit:
                return False
            # Not there yet: the loop has not got to it since it was started.
            if worker not in self._threads:
                return False
            self._threads.remove(worker)
            return True

    def _live(self, worker: Worker) -> None:
        """The life of a thread."""
        worker.live()
        if self._slice:
            ask_for_slices(self._slice)
        try:
            self._work(worker)
        finally:
            worker.ended.release()

    def _work(self, worker: Worker) -> None:
        """Jobs, until there is None, or nothing to do for so many threads."""
        get, done = self._queue.get, self._done
        following: _Job | None = None
        while (job := following or get()) is not None:
            following = None
            result: Any = None
            error: BaseException | None = None
            worker.begin()
            try:
                result = job[1](*job[2])
            except BaseException as exc:
                error = exc
            worker.end()
            if job[4] is not None:
                following = job[4].leave()
            if following is not None and not self._closed and not self._queue.empty():
                # Behind the jobs of others. Without any it goes on here: another thread would have
                # to wake up, and be one more to want the GIL.
                self._queue.put(following)
                following = None
            done.append((job, result, error))
            # Nothing of this job may stay alive while the thread waits for the next one.
            del job, result, error
            # Appended first, then looked at: `_deliver` clears the flag before it drains, so a
            # flag seen set means that the drain is still to come and will find this result.
            if not self._wake_up_pending:
                self._wake_up_pending = True
                assert self._loop is not None
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:
                    return  # the loop is gone, and so is everybody who could look at a result
            if len(self._threads) > self._limit and following is None and self._leaves(worker):
                return

    def _deliver(self) -> None:
        """Give out all results that are there; on the loop."""
        self._wake_up_pending = False
        pop = self._done.popleft
        while True:
            try:
                (future, _, _, group, _), result, error = pop()
            except IndexError:
                break
            self._outstanding -= 1
            if error is None:
                future.set_result(result)
            else:
                if isinstance(error, StopIteration):  # a future refuses this one
                    error = RuntimeError(f"a job raised {error!r}")
                future.set_exception(error)
                if future.unwanted:
                    future.exception()  # or asyncio complains that nobody looked
            if group is not None:
                group.job_ended()
        if not self._outstanding and self._idle_waiters:
            _wake(self._idle_waiters)


class Lane:
    """Jobs that all copy to one file: fewer at a time while somebody outside is served.

    Copies to one file do not become faster by being many, for the file system makes them wait for
    each other, but they keep processors from the event loop and from the clients.
    """

    def __init__(self, pool: WorkerPool, *, waits: bool) -> None:
        self._pool = pool
        self._waits = waits
        #: how many may run now
        self.width = 1
        self._running = 0
        # not empty: one runs, which is followed by the first of them
        self._waiting: deque[_Job] = deque()
        self._lock = threading.Lock()

    def submit(self, fn: Callable[[*Ts], T], *args: *Ts) -> JobFuture[T]:
        """As ``WorkerPool.submit``."""
        copies = self._pool.copies if self._waits else self._pool.copies_in_memory
        self.width = copies.demand.width(copies._limit, asyncio.get_running_loop().time())
        return copies._submit(fn, args, None, self)

    async def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """As ``WorkerPool.run``."""
        return await self.submit(fn, *args)

    def enter(self, job: _Job) -> bool:
        """On the loop: whether the job may be queued now; else it is when it follows another."""
        with self._lock:
            if self._running >= self.width:
                self._waiting.append(job)
                return False
            self._running += 1
            return True

    def leave(self) -> _Job | None:
        """On a worker: a job has ended; the one that follows it, to be queued."""
        with self._lock:
            if self._waiting and self._running <= self.width:
                return self._waiting.popleft()
            self._running -= 1
            return None


class JobGroup:
    """The jobs of one owner (of a descriptor, of buffers): ``await idle()`` before letting go."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._count = 0
        self._idle_waiters: list[asyncio.Future[None]] = []

    @property
    def count(self) -> int:
        """Jobs of this group that have not ended."""
        return self._count

    def submit(self, fn: Callable[[*Ts], T], *args: *Ts) -> JobFuture[T]:
        """As ``WorkerPool.submit``; the job counts until it has ended, waited for or not."""
        future = self._pool._submit(fn, args, self)
        self._count += 1
        return future

    def submit_sync(self, fn: Callable[[*Ts], T], *args: *Ts) -> JobFuture[T]:
        """The same by one of the ``syncs``."""
        future = self._pool.syncs._submit(fn, args, self)
        self._count += 1
        return future

    async def run(self, fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """As ``WorkerPool.run``."""
        return await self.submit(fn, *args)

    async def idle(self) -> None:
        """Return when every job of the group has ended."""
        while self._count:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def job_ended(self) -> None:
        """Called by the pool, once a job."""
        self._count -= 1
        assert self._count >= 0
        if not self._count and self._idle_waiters:
            _wake(self._idle_waiters)


def _wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()
