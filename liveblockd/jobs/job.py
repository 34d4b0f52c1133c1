"""What every job is: identity, progress, the points where it can be paused, slowed or cancelled.

Specification: qapi/job.json, qapi/block-core.json (BlockJobInfo). Runs on the event loop; the work
of a job runs in one task that the ``Scheduler`` owns.

Invariants:

* Only the scheduler changes ``status``. A job asks for it through ``checkpoint``.
* A job is never killed: a cancel is a flag that ``checkpoint`` turns into ``JobCancelled``, so a
  chunk that is under way ends before the job does, and nothing is left half-changed.
* Whatever waits inside ``run`` for longer than a chunk waits by ``wait``: pause, resume, speed and
  cancel end the wait at once.

Errors that escape: ``JobCancelled`` from ``checkpoint``; OSError and BlockError from ``run`` and
``prepare`` make the job fail. ``commit``, ``abort``, ``clean`` and ``free`` must not raise.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    contextmanager,
    nullcontext,
)
from errno import ECANCELED, EIO
from typing import TYPE_CHECKING, Any, ClassVar

from liveblockd.errors import NO_SPACE, BlockError
from liveblockd.graph.rest import lock_at_rest
from liveblockd.jobs.ratelimit import RateLimit
from liveblockd.jobs.transitions import JobStatus
from liveblockd.runtime.halting import Halt

if TYPE_CHECKING:
    from liveblockd.graph.graph import Graph
    from liveblockd.graph.node import Node
    from liveblockd.jobs.scheduler import Scheduler, Transaction


class JobCancelled(Exception):  # noqa: N818 (no error)
    """The job was asked to end; only the scheduler catches this."""


class JobType(enum.StrEnum):
    """Kinds of jobs, as QMP names them (qapi/job.json)."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"
    #: our own, no block job: it never shows up where QEMU's clients look
    X_LIVEBLOCK_CHECK = "x-liveblock-check"


class BlockJobType(enum.StrEnum):
    """Kinds of jobs as QEMU's clients know them: those in events and in query-block-jobs."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


class BlockdevOnError(enum.StrEnum):
    """What a job does about an I/O error (qapi/block-core.json)."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class ErrorAction(enum.StrEnum):
    """What comes of it for one error."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


class BlockDeviceIoStatus(enum.StrEnum):
    """Whether an error stopped the job."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class Job:
    """Base of all jobs; a subclass has ``type`` and ``run`` and what else it needs of the hooks."""

    type: ClassVar[JobType]
    #: whether it is listed by query-block-jobs and announced by BLOCK_JOB_* events
    is_block_job: ClassVar[bool] = True
    #: how many pieces of work it keeps in flight when it is alone
    parallel: ClassVar[int] = 1
    #: whether it counts for, and waits because of, ``max-concurrent``
    takes_turns: bool = True

    def __init__(
        self,
        job_id: str,
        *,
        speed: int = 0,
        on_error: BlockdevOnError = BlockdevOnError.REPORT,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        self.id = job_id
        self.status = JobStatus.UNDEFINED
        self.on_error = on_error
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.offset = 0  # bytes done
        self.length = 0  # bytes in all
        self.io_status = BlockDeviceIoStatus.OK
        self.error: BlockError | None = None
        #: at work, and not in a ``wait`` with nothing in flight
        self.busy = False
        #: nothing to do: the whole life comes before the return of the command
        self.immediate = False
        self.pause_count = 0
        self.user_paused = False
        self.cancel_requested = False
        self.cancelled = False  # ended because of that
        self.started = False
        self.dismissing = False
        #: set when its end is told although things of it are in flight that hang (``hanging``)
        self.left = asyncio.Event()
        #: set when ``run`` has ended
        self.worked = asyncio.Event()
        #: set when ``clean`` has ended
        self.cleaned = asyncio.Event()
        #: set when ``wind_up`` has ended
        self.wound_up = asyncio.Event()
        #: set when it is null
        self.gone = asyncio.Event()
        self.limit = RateLimit(speed)
        #: of the copies that begin now, asked for by pause and cancel
        self.halt = Halt()
        # Set by the scheduler.
        self.scheduler: Scheduler = None  # type: ignore[assignment]
        self.transaction: Transaction = None  # type: ignore[assignment]
        self._wake = asyncio.Event()
        self._readers: set[asyncio.Task[Any]] = set()

    # -- what a subclass is about

    async def run(self) -> None:
        """The work. Calls ``checkpoint`` between chunks; OSError and BlockError make it fail."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Last step that may fail; what it does must be durable when it returns."""

    async def commit(self) -> None:
        """The job (and all of its transaction) succeeded."""

    async def abort(self) -> None:
        """It failed or was cancelled; called instead of ``commit``."""

    async def clean(self) -> None:
        """After ``commit`` or ``abort``: give back what the work needed."""

    async def wind_up(self) -> None:
        """Its end is announced: what no client has to wait for, a sync of what nobody was promised.

        The job is not dismissed before the end of this.
        """

    async def free(self) -> None:
        """The job is dismissed: give back the nodes that it was allowed to hold until now."""

    async def settle(self) -> None:
        """Return when nothing is in flight: the job is about to stand still."""

    def in_flight(self) -> bool:
        """Whether something of its work goes on while its task waits."""
        return False

    def complete(self) -> None:
        """job-complete of a ready job."""
        raise BlockError(f"The active block job '{self.id}' cannot be completed")

    def cancel_is_forced(self, force: bool) -> bool:  # noqa: ARG002
        """Whether a cancel ends the job as cancelled; a ready mirror ends as completed."""
        return True

    def let_go(self) -> None:
        """It was cancelled: what it has in flight need not come to a good end."""

    def end_gently(self) -> None:
        """A cancel that is not forced: end as completed, without switching over."""

    def nothing_held(self) -> AbstractContextManager[None]:
        """A context in which no filter (throttle) lets requests of the job wait."""
        return nullcontext()

    def cut_off(self, silence: float) -> None:
        """It was asked to end: give up what nobody needs then, if it hangs for so many seconds."""

    def stop_mattering(self) -> None:
        """It is left: no guest's request may wait for what is in flight of it."""

    def images(self) -> tuple[list[Node], Node | None]:
        """The layers that it works on, the highest first, and the base below or the target."""
        return [], None

    def lock_to_undo(self, graph: Graph, *nodes: Node) -> AbstractAsyncContextManager[None]:
        """The lock of the graph for ``clean``, which lets the users above ``nodes`` stand still.

        Of a job that ended badly: when nothing hangs there.
        """
        return lock_at_rest(graph, *nodes) if self.error and self.started else graph.lock

    # -- where it stands

    @property
    def speed(self) -> int:
        """Bytes per second, 0 without a limit."""
        return self.limit.speed

    @property
    def ready(self) -> bool:
        """Whether the job is in step with its source."""
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    @property
    def leaving(self) -> bool:
        """Whether its end is told, and nobody has to dismiss it: to clients it is gone."""
        return self.status is JobStatus.CONCLUDED and (self.auto_dismiss or not self.started)

    def fail(self, error: OSError | BlockError) -> None:
        """Remember the first reason for which the job fails."""
        if self.error is not None:
            return
        if isinstance(error, OSError):
            code = error.errno or EIO
            error = BlockError(error.strerror or os.strerror(code), errno=code)
        self.error = error

    def fail_as_cancelled(self) -> None:
        """The result of a cancelled job, as query-jobs shows it."""
        if self.error is None:
            self.cancelled = True
            self.error = BlockError(os.strerror(ECANCELED), errno=ECANCELED)

    # -- what the work calls

    async def checkpoint(self) -> None:
        """Stand still while paused or out of turn; raises JobCancelled once asked to end."""
        halted = self.pause_count or self.scheduler.turns.waits(self)
        if halted and not self.cancel_requested:
            await self.settle()
            await self.scheduler.stand_still(self)
        self.check_wanted()

    def check_wanted(self) -> None:
        """Raise JobCancelled once asked to end."""
        if self.cancel_requested:
            raise JobCancelled

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context to read the disk in: OSError(ECANCELED) once ``give_up_reads`` was called."""
        task = asyncio.current_task()
        assert task is not None
        self._readers.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task in self._readers:  # somebody else wants the whole task to end
                raise
            task.uncancel()
            raise OSError(ECANCELED, os.strerror(ECANCELED)) from None
        finally:
            self._readers.discard(task)

    def give_up_reads(self) -> None:
        """Wait for none of the reads under way any more; only those that wait are tasks here."""
        readers, self._readers = self._readers, set()
        for task in readers:
            task.cancel()

    def wake(self) -> None:
        """Something changed: end the wait of the job's task, now or when it begins."""
        self._wake.set()

    async def wait(self, seconds: float | None = None) -> None:
        """Sleep until ``wake``, at most ``seconds``. The caller looks at everything again."""
        timer = None
        if seconds is not None and not self._wake.is_set():
            timer = asyncio.create_task(self._alarm(seconds))
        at_work, self.busy = self.busy, self.busy and self.in_flight()
        try:
            await self._wake.wait()
        finally:
            self.busy = at_work
            self._wake.clear()
            if timer is not None:
                timer.cancel()

    async def _alarm(self, seconds: float) -> None:
        await self.scheduler.clock.sleep(seconds)
        self._wake.set()

    def rate_delay(self) -> float:
        """Seconds until the next chunk may start."""
        return self.limit.delay(self.scheduler.clock.monotonic())

    def account(self, count: int) -> None:
        """``count`` bytes start to move."""
        self.limit.account(self.scheduler.clock.monotonic(), count)

    def new_halt(self) -> Halt:
        """What copies that begin now are under; the job is at work, whatever it was before."""
        if self.halt.asked:
            self.halt = Halt(self.scheduler.clock.monotonic)
        return self.halt

    def action_on(
        self, operation: str, code: int, policy: BlockdevOnError | None = None
    ) -> ErrorAction:
        """Announce an I/O error (``operation`` read or write) and say what to do about it.

        ``policy`` is for jobs that have more than one. STOP has paused the job already: the caller
        goes to ``checkpoint`` and tries again after.
        """
        match policy or self.on_error:
            case BlockdevOnError.STOP:
                action = ErrorAction.STOP
            case BlockdevOnError.IGNORE:
                action = ErrorAction.IGNORE
            case BlockdevOnError.ENOSPC | BlockdevOnError.AUTO if code in NO_SPACE:
                action = ErrorAction.STOP
            case _:
                action = ErrorAction.REPORT
        self.scheduler.io_error(self, operation, code, action)
        return action
