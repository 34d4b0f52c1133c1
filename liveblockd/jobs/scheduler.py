"""Moves jobs through their lives: the only one who changes a status, and who says so.

Specification: qapi/job.json; the order of events in ``jobs/README.md``. Runs on the event loop.

Invariants:

* Every transition is in ``transitions.NEXT`` and is announced at once.
* Each step of a life (work, finalization, dismissal) runs in a task of the scheduler: a client
  that goes away, or whose command is cancelled, does not stop it halfway.
* A job always gets to ``concluded``, whatever its hooks raise.
* The hooks of a job run in their order, each once, after its work has ended. The events wait for
  them, but not those of a job that is *left* (``hanging``): its hooks follow when they can.
* Jobs of one ``Transaction`` succeed together or not at all; most are alone in theirs.

Errors that escape: BlockError, in QEMU's words.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from liveblockd.errors import NO_SPACE, BlockError
from liveblockd.events import (
    BlockJobCancelled,
    BlockJobCompleted,
    BlockJobError,
    BlockJobPending,
    BlockJobReady,
    JobStatusChange,
    Publisher,
)
from liveblockd.jobs.hanging import hurry, lose_patience
from liveblockd.jobs.job import BlockDeviceIoStatus, ErrorAction, Job, JobCancelled
from liveblockd.jobs.transitions import JobStatus, JobVerb, check_verb, may_become
from liveblockd.jobs.turns import Turns
from liveblockd.runtime.clock import Clock, SystemClock
from liveblockd.runtime.halting import Halt

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)
_AT_WORK = (JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.READY, JobStatus.STANDBY)
_GOING = (JobStatus.RUNNING, JobStatus.READY)
_ENDED = (JobStatus.CONCLUDED, JobStatus.NULL)
#: seconds for which a command waits for what an ended job makes durable
LET_GO: Final = 10


def _waits_for_client(job: Job) -> bool:
    """Whether nothing more happens to the job by itself."""
    if job.status is JobStatus.PENDING:
        return not job.auto_finalize
    return job.status is JobStatus.CONCLUDED and not job.auto_dismiss


class Transaction:
    """Jobs that succeed or fail together."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.ending: asyncio.Task[None] | None = None
        self.aborted = False


class Scheduler:
    """All jobs of the daemon by id; the oldest first."""

    def __init__(
        self,
        publisher: Publisher,
        *,
        clock: Clock | None = None,
        max_concurrent: int = 0,
    ) -> None:
        self.publisher = publisher
        self.clock: Clock = clock or SystemClock()
        #: who may copy, where not all may at once
        self.turns: Turns[Job] = Turns(max_concurrent)
        #: told of a job that has another speed now
        self.on_speed: Callable[[Job], None] = lambda _: None
        #: of the journal: returns when it is durable that the job, which is to start, was there
        self.write_down: Callable[[Job], Coroutine[Any, Any, None]] | None = None
        self.jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._working: set[Job] = set()
        self._settled: dict[Job, list[asyncio.Future[None]]] = {}
        self._hurried: dict[Job, asyncio.Task[None]] = {}
        self._patience: dict[Job, asyncio.Task[None]] = {}

    # -- starting

    def check_id(self, job_id: str) -> None:
        """BlockError unless ``job_id`` is well formed and free."""
        if not _ID.fullmatch(job_id):
            raise BlockError(f"Invalid job ID '{job_id}'")
        if job_id in self.jobs:
            raise BlockError(f"Job ID '{job_id}' already in use")

    def create(self, job: Job, transaction: Transaction | None = None) -> None:
        """Make the job known. Follow it by ``start``, or by ``refuse`` if it cannot be started.

        A bad speed is found here, after the job was there, as clients know it.
        """
        self.check_id(job.id)
        job.scheduler = self
        job.halt = Halt(self.clock.monotonic)
        job.transaction = transaction or Transaction()
        job.transaction.jobs.append(job)
        self.jobs[job.id] = job
        self._move(job, JobStatus.CREATED)
        if job.speed < 0:
            self.refuse(job)
            raise BlockError("Parameter 'speed' expects a non-negative value")

    def refuse(self, job: Job) -> None:
        """Undo ``create``."""
        job.transaction.jobs.remove(job)
        del self.jobs[job.id]
        self._move(job, JobStatus.NULL)

    async def start(self, job: Job) -> None:
        """Let the job run. Returns at once, or after its whole life when it is ``immediate``."""
        self.launch(job)
        await self.over_if_immediate(job)

    def launch(self, job: Job) -> None:
        """Let the job run, unless it was ended before that. Follow it by ``over_if_immediate``."""
        if job.status is not JobStatus.CREATED:
            return
        self._move(job, JobStatus.RUNNING)
        job.started = job.busy = True
        self._spawn(self._work(job), f"job {job.id}")

    async def over_if_immediate(self, job: Job) -> None:
        """Return when an ``immediate`` job needs nobody any more; the others' lives go on."""
        if all(other.immediate for other in job.transaction.jobs):
            await self._until(job, lambda: _waits_for_client(job))

    async def discard(self, job: Job) -> None:
        """End a job that was created, with all of its transaction, and not started.

        The hooks run in the task of the caller, who may hold the lock of the graph.
        """
        transaction = job.transaction
        if transaction.ending is None and not transaction.aborted:
            transaction.aborted = True
            await self._abort(transaction)

    # -- steering

    def find(self, job_id: str) -> Job | None:
        """The job, or None; the commands word the error."""
        return self.jobs.get(job_id)

    def pause(self, job: Job) -> None:
        """Ask the job to stand still."""
        check_verb(job.id, job.status, JobVerb.PAUSE)
        if job.user_paused:
            raise BlockError("Job is already paused")
        job.user_paused = True
        job.pause_count += 1
        job.halt.ask()
        job.wake()

    def resume(self, job: Job) -> None:
        """Let it go on; forgets the error that stopped it."""
        if not job.user_paused:
            raise BlockError("Can't resume a job that was not paused")
        check_verb(job.id, job.status, JobVerb.RESUME)
        self._resume(job)

    def set_speed(self, job: Job, speed: int) -> None:
        """Bytes per second from now on; 0 for no limit."""
        check_verb(job.id, job.status, JobVerb.SET_SPEED)
        if speed < 0:
            raise BlockError("Parameter 'speed' expects a non-negative value")
        job.limit.set_speed(speed, self.clock.monotonic())
        job.wake()
        self.on_speed(job)

    def complete(self, job: Job) -> None:
        """Let a ready job switch over."""
        check_verb(job.id, job.status, JobVerb.COMPLETE)
        job.complete()
        job.wake()

    def cancel(self, job: Job, *, force: bool = False) -> None:
        """Ask the job to end; the end is announced by events. Also wakes a paused job."""
        check_verb(job.id, job.status, JobVerb.CANCEL)
        forced = job.cancel_is_forced(force)
        if forced:
            self._hurry(job)
        if job.transaction.ending is not None and not job.transaction.aborted:
            return  # it is being finalized: what it does now is true whatever we say
        if forced:
            job.cancel_requested = True
            job.halt.ask()
            job.let_go()
        else:
            job.end_gently()
        if job.user_paused:
            self._resume(job)
        if forced and job.status in (JobStatus.WAITING, JobStatus.PENDING):
            self._abort_transaction(job)
        job.wake()

    async def finalize(self, job: Job) -> None:
        """Let a pending job (with its transaction) take effect; returns after its events."""
        check_verb(job.id, job.status, JobVerb.FINALIZE)
        transaction = job.transaction
        if transaction.ending is None:
            if any(j.status is not JobStatus.PENDING for j in transaction.jobs):
                raise BlockError(f"Job '{job.id}' waits for other jobs of its transaction")
            self._end(transaction, self._finalize(transaction))
        assert transaction.ending is not None
        await asyncio.shield(transaction.ending)

    async def dismiss(self, job: Job) -> None:
        """Forget a concluded job; returns after it."""
        check_verb(job.id, job.status, JobVerb.DISMISS)
        await asyncio.shield(self._spawn(self._dismiss(job), f"dismiss {job.id}"))

    def request_end(self) -> None:
        """Ask every job to end."""
        for job in reversed(tuple(self.jobs.values())):
            if job.status is JobStatus.CREATED:
                self._abort_transaction(job)
            elif job.status not in (*_ENDED, JobStatus.ABORTING):
                self.cancel(job, force=True)

    async def cancel_all(self) -> None:
        """End every job, with its events, and forget it (quit, SIGTERM)."""
        self.request_end()
        for job in tuple(self.jobs.values()):
            await self._until(job, lambda job=job: job.status in _ENDED)  # type: ignore[misc]
            if job.status is JobStatus.CONCLUDED:
                await self.dismiss(job)
        while self._tasks - {asyncio.current_task()}:  # also what was left
            await asyncio.wait(self._tasks - {asyncio.current_task()})

    def leave(self, job: Job) -> bool:
        """Tell the end of a job that was cancelled, or failed, though it is held up.

        What is in flight ends when it does, and only then are its nodes given back. Not where it
        is being finalized: then it succeeds, or is about to. Returns whether it is left.
        """
        transaction, at_work = job.transaction, job.status in _AT_WORK
        if job.left.is_set():
            return True
        if transaction.ending is not None and not transaction.aborted:
            return False
        if at_work and not (job.cancel_requested and job.status in _GOING):
            return False
        if job.worked.is_set() and job.status not in (JobStatus.ABORTING, JobStatus.CONCLUDED):
            return False  # it waits for others
        logger.warning("job %s ends, but requests of it hang: its nodes stay in use", job.id)
        job.left.set()
        job.stop_mattering()
        if at_work:
            self._rest(job)
            job.fail_as_cancelled()
            self._abort_transaction(job)
        return True

    # -- what jobs call

    async def stand_still(self, job: Job) -> None:
        """The job has come to a halt: return when it may go on, or is cancelled."""
        while not job.cancel_requested:
            if job.pause_count:
                await self._stay_paused(job)
            elif self.turns.waits(job):
                # To its clients it runs and is not busy: what waits is not for them to resume.
                await job.wait()
            else:
                return

    async def _stay_paused(self, job: Job) -> None:
        running = job.status
        self._move(job, JobStatus.STANDBY if job.ready else JobStatus.PAUSED)
        self.turns.rest(job)
        while job.pause_count and not job.cancel_requested:
            await job.wait()
        self.turns.ask(job)
        self._move(job, running)

    def set_ready(self, job: Job) -> None:
        """The job is in step with its source (mirror, active commit)."""
        self._move(job, JobStatus.READY)
        self.turns.leave(job)  # it may stay ready for days, and has to keep up with its guest
        self.publisher.publish(BlockJobReady(**self._progress(job)))

    def io_error(self, job: Job, operation: str, code: int, action: ErrorAction) -> None:
        """Announce an error of the job's I/O; STOP pauses it as a user would."""
        self.publisher.publish(BlockJobError(device=job.id, operation=operation, action=action))
        if action is ErrorAction.STOP:
            if not job.user_paused:
                job.user_paused = True
                job.pause_count += 1
            if job.io_status is BlockDeviceIoStatus.OK:
                full = code in NO_SPACE
                job.io_status = BlockDeviceIoStatus.NOSPACE if full else BlockDeviceIoStatus.FAILED

    def share(self, job: Job) -> int:
        """How many pieces of work ``job`` may have in flight now.

        The jobs share what one of them would keep busy, so that the guests' requests find a worker
        however many jobs there are, and no job is starved by another.
        """
        return max(1, job.parallel // max(1, self._working_now()))

    def crowding(self, job: Job) -> float:
        """How many times longer a piece of ``job`` takes because those of other jobs go first."""
        return max(1.0, self._working_now() / max(1, job.parallel))

    def _working_now(self) -> int:
        return sum(
            1 for other in self._working if not other.pause_count and not self.turns.waits(other)
        )

    # -- inside: one life

    async def _work(self, job: Job) -> None:
        try:
            self._working.add(job)
            if job.takes_turns and not job.immediate:
                self.turns.enter(job)
                await job.checkpoint()
            await job.run()
            if job.cancel_requested:
                raise JobCancelled
        except JobCancelled:
            job.cancel_requested = True
            job.fail_as_cancelled()
        except (OSError, BlockError) as error:
            job.fail(error)
        except Exception as error:
            logger.exception("job %s failed by a defect", job.id)
            job.fail(BlockError(f"Internal error: {error!r}"))
        finally:
            self._rest(job)
            job.worked.set()
        if job.left.is_set():
            return  # its end has been told
        if job.error is not None or job.transaction.aborted:
            self._abort_transaction(job)
            return
        self._move(job, JobStatus.WAITING)
        self._all_waiting(job.transaction)

    def _rest(self, job: Job) -> None:
        """It does nothing any more that others have to share with."""
        job.busy = False
        self._working.discard(job)
        self.turns.leave(job)

    def _all_waiting(self, transaction: Transaction) -> None:
        if any(job.status is not JobStatus.WAITING for job in transaction.jobs):
            return
        for job in transaction.jobs:
            self._move(job, JobStatus.PENDING)
            if job.is_block_job and not job.auto_finalize:
                self.publisher.publish(BlockJobPending(type=job.type, id=job.id))
        if all(job.auto_finalize for job in transaction.jobs):
            self._end(transaction, self._finalize(transaction))
        for job in transaction.jobs:
            self._notify(job)

    async def _finalize(self, transaction: Transaction) -> None:
        for job in transaction.jobs:
            try:
                await job.prepare()
            except (OSError, BlockError) as error:
                job.fail(error)
            except Exception as error:
                logger.exception("job %s could not be finalized by a defect", job.id)
                job.fail(BlockError(f"Internal error: {error!r}"))
            if job.error is not None:
                transaction.aborted = True
                await self._abort(transaction)
                return
        for job in tuple(transaction.jobs):
            await self._guarded(job, job.commit)
            await self._clean(job)
            await self._conclude(job)

    def _abort_transaction(self, job: Job) -> None:
        """One of the jobs failed: so do the others, and none of them takes effect."""
        transaction = job.transaction
        transaction.aborted = True
        for other in transaction.jobs:
            if other is not job:
                other.cancel_requested = True
                other.halt.ask()
                other.let_go()
                self._hurry(other)
                if other.user_paused:
                    self._resume(other)
                other.wake()
        if any(j is not job and j.status in _AT_WORK and j.error is None for j in transaction.jobs):
            return  # the last one to end comes here again
        if transaction.ending is None:
            self._end(transaction, self._abort(transaction))

    async def _abort(self, transaction: Transaction) -> None:
        for job in transaction.jobs:
            if job.error is None:
                job.cancel_requested = True
                job.fail_as_cancelled()
            self._move(job, JobStatus.ABORTING)
            self._lose_patience(job)
        for job in tuple(transaction.jobs):
            await self._unless_left(job, self._undo(job))
            await self._conclude(job)

    async def _undo(self, job: Job) -> None:
        if job.started:
            await job.worked.wait()
        await self._guarded(job, job.abort)
        await self._clean(job)

    async def _clean(self, job: Job) -> None:
        await self._guarded(job, job.clean)
        if (hurried := self._hurried.pop(job, None)) is not None:
            hurried.cancel()
        job.cleaned.set()

    async def _conclude(self, job: Job) -> None:
        if job.is_block_job and job.started:
            self._announce_end(job)
        self._move(job, JobStatus.CONCLUDED)
        self._notify(job)
        await self._unless_left(job, self._wind_up(job))
        if job.auto_dismiss or not job.started:
            await self._dismiss(job)

    async def _wind_up(self, job: Job) -> None:
        await job.cleaned.wait()
        await self._guarded(job, job.wind_up)
        if (patience := self._patience.pop(job, None)) is not None:
            patience.cancel()
        job.wound_up.set()

    async def _unless_left(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """Do it, and wait for that, unless the job is left."""
        if not job.started:
            await work  # in the task of the caller, who may hold the lock of the graph
            return
        done = self._spawn(work, f"end of job {job.id}")
        left = asyncio.ensure_future(job.left.wait())
        await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
        left.cancel()

    @property
    def letting_go(self) -> list[Job]:
        """Jobs that have told of their end, and are gone once what they used is durable."""
        return [job for job in self.jobs.values() if job.leaving]

    async def let_go_of_ended(self) -> bool:
        """Wait until jobs that have told of their end are gone; whether there were any.

        Not of those that a client has to dismiss, and not for long.
        """
        ended = self.letting_go
        with suppress(TimeoutError):
            async with asyncio.timeout(LET_GO):
                for job in ended:
                    await job.gone.wait()
        return bool(ended)

    def _announce_end(self, job: Job) -> None:
        if job.cancelled:
            self.publisher.publish(BlockJobCancelled(**self._progress(job)))
            return
        message = job.error.message if job.error is not None else None
        self.publisher.publish(BlockJobCompleted(**self._progress(job), error=message))

    async def _dismiss(self, job: Job) -> None:
        if job.dismissing:
            return
        job.dismissing = True
        await self._unless_left(job, self._free(job))
        self.jobs.pop(job.id, None)
        self._move(job, JobStatus.NULL)
        self._notify(job)
        job.gone.set()

    async def _free(self, job: Job) -> None:
        await job.wound_up.wait()
        # The nodes are given back first: who hears "null" may use them at once.
        await self._guarded(job, job.free)
        if job.left.is_set():
            logger.warning("job %s: what it used is given back", job.id)

    async def _guarded(self, job: Job, hook: Callable[[], Awaitable[None]]) -> None:
        try:
            await hook()
        except Exception:
            logger.exception("job %s: a hook that must not fail did", job.id)

    # -- inside: small parts

    def _move(self, job: Job, status: JobStatus) -> None:
        assert may_become(job.status, status), f"job {job.id}: {job.status} -> {status}"
        job.status = status
        self.publisher.publish(JobStatusChange(id=job.id, status=status))

    def _hurry(self, job: Job) -> None:
        if job.started and job.status not in _ENDED and job not in self._hurried:
            self._hurried[job] = self._spawn(hurry(job), f"hurry {job.id}")
            self._lose_patience(job)

    def _lose_patience(self, job: Job) -> None:
        if job.started and job not in self._patience:
            self._patience[job] = self._spawn(lose_patience(job), f"patience with {job.id}")

    def _resume(self, job: Job) -> None:
        job.io_status = BlockDeviceIoStatus.OK
        job.user_paused = False
        job.pause_count -= 1
        job.wake()

    def _progress(self, job: Job) -> dict[str, Any]:
        return {
            "type": job.type,
            "device": job.id,
            "len": job.length,
            "offset": job.offset,
            "speed": job.speed,
        }

    def _end(self, transaction: Transaction, work: Coroutine[Any, Any, None]) -> None:
        transaction.ending = self._spawn(work, "end of jobs")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _until(self, job: Job, reached: Callable[[], bool]) -> None:
        """Return when ``reached``, looked at whenever the job comes to rest, or it is gone."""
        while not reached() and job.status is not JobStatus.NULL:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._settled.setdefault(job, []).append(future)
            await future

    def _notify(self, job: Job) -> None:
        for future in self._settled.pop(job, ()):
            if not future.done():
                future.set_result(None)
