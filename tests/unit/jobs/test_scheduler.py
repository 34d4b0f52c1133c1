"""Lives of jobs: the order of events, every verb in every status, errors, pauses, cancels."""

import asyncio
from errno import EIO

import pytest

from liveblockd.errors import NO_SPACE, BlockError
from liveblockd.events import Publisher
from liveblockd.jobs import hanging
from liveblockd.jobs.job import BlockDeviceIoStatus, BlockdevOnError, ErrorAction, Job, JobType
from liveblockd.jobs.scheduler import Scheduler, Transaction
from liveblockd.jobs.transitions import OBEYED, JobStatus, JobVerb
from tests.support.clock import ManualClock

CHUNK = 512 * 1024


class Copy(Job):
    """Moves ``chunks`` chunks; ``gate`` holds each back; ``errors`` are raised once a chunk."""

    type = JobType.STREAM
    parallel = 3

    def __init__(self, job_id="s", *, chunks=4, ready=False, **options):
        super().__init__(job_id, **options)
        self.chunks = chunks
        self.length = chunks * CHUNK
        self.with_ready = ready
        self.gate = asyncio.Event()
        self.gate.set()
        self.errors: dict[int, OSError] = {}
        self.hooks: list[str] = []
        self.prepare_error: Exception | None = None
        self.prepare_gate: asyncio.Event | None = None
        self.clean_gate: asyncio.Event | None = None
        self.completed = False
        self.in_chunk = False

    async def run(self):
        done = 0
        failed = None
        while done < self.chunks:
            await self.checkpoint()
            if (delay := self.rate_delay()) > 0:
                await self.wait(delay)
                continue
            self.account(CHUNK)
            self.in_chunk = True
            await self.gate.wait()
            self.in_chunk = False
            try:
                if done in self.errors:
                    raise self.errors.pop(done)
            except OSError as error:
                match self.action_on("read", error.errno):
                    case ErrorAction.STOP:
                        continue
                    case ErrorAction.REPORT:
                        raise
                failed = error
            done += 1
            self.offset += CHUNK
            await asyncio.sleep(0)
        if failed:
            raise failed
        if self.with_ready:
            self.scheduler.set_ready(self)
            while not self.completed:
                await self.checkpoint()
                await self.wait()

    def complete(self):
        self.completed = True

    def cancel_is_forced(self, force):
        if self.ready and not force:
            self.completed = True
            return False
        return True

    async def prepare(self):
        self.hooks.append("prepare")
        if self.prepare_gate:
            await self.prepare_gate.wait()
        if self.prepare_error:
            raise self.prepare_error

    async def commit(self):
        self.hooks.append("commit")

    async def abort(self):
        self.hooks.append("abort")

    async def clean(self):
        if self.clean_gate:
            await self.clean_gate.wait()
        self.hooks.append("clean")

    def stop_mattering(self):
        self.hooks.append("stop mattering")

    async def free(self):
        self.hooks.append("free")


class Bench:
    """A scheduler with what it published, shortened."""

    def __init__(self, **options):
        publisher = Publisher()
        publisher.subscribe(self.note)
        self.clock = ManualClock()
        self.scheduler = Scheduler(publisher, clock=self.clock, **options)
        self.events: list[str] = []
        self.raw = []

    def note(self, event):
        self.raw.append(event)
        data = event.data()
        if event.name == "JOB_STATUS_CHANGE":
            self.events.append(data["status"])
        else:
            self.events.append(event.name.removeprefix("BLOCK_JOB_"))

    async def start(self, job):
        self.scheduler.create(job)
        await self.scheduler.start(job)
        return job

    async def turn(self, n=20):
        for _ in range(n):
            await asyncio.sleep(0)

    async def advance(self, seconds):
        """Of all that begins to wait now."""
        await self.turn()
        await self.clock.advance(seconds)

    async def until(self, job, status):
        async with asyncio.timeout(30):
            while job.status != status:  # noqa: ASYNC110
                await asyncio.sleep(0)


GOOD = ["waiting", "pending", "COMPLETED", "concluded", "null"]


async def test_a_good_life():
    bench = Bench()
    job = await bench.start(Copy())
    assert bench.events == ["created", "running"]
    await bench.until(job, "null")
    assert bench.events == ["created", "running", *GOOD]
    assert job.hooks == ["prepare", "commit", "clean", "free"]
    assert bench.raw[-3].data() == {
        "type": "stream", "device": "s", "len": 4 * CHUNK, "offset": 4 * CHUNK, "speed": 0
    }  # fmt: skip
    assert not bench.scheduler.jobs


async def test_an_immediate_life_is_over_at_the_return():
    bench = Bench()
    job = Copy(chunks=0)
    job.immediate = True
    await bench.start(job)
    assert bench.events == ["created", "running", *GOOD]


@pytest.mark.parametrize("option", ["auto_finalize", "auto_dismiss"])
async def test_an_immediate_life_that_waits_for_the_client_returns(option):
    bench = Bench()
    job = Copy(chunks=0, **{option: False})
    job.immediate = True
    async with asyncio.timeout(30):
        await bench.start(job)
    assert job.status == ("pending" if option == "auto_finalize" else "concluded")


async def test_manual_finalize_and_dismiss():
    bench = Bench()
    job = await bench.start(Copy(auto_finalize=False, auto_dismiss=False))
    await bench.until(job, "pending")
    assert bench.events == ["created", "running", "waiting", "pending", "PENDING"]
    assert job.hooks == []
    await bench.scheduler.finalize(job)
    assert bench.events[5:] == ["COMPLETED", "concluded"]
    assert "free" not in job.hooks
    with pytest.raises(BlockError, match="already in use"):
        bench.scheduler.check_id("s")
    await bench.scheduler.dismiss(job)
    assert bench.events[7:] == ["null"]
    assert job.hooks[-1] == "free"
    assert bench.scheduler.find("s") is None


async def test_a_finalize_whose_client_goes_away_still_ends():
    bench = Bench()
    job = Copy(auto_finalize=False)
    job.prepare_gate = asyncio.Event()
    await bench.start(job)
    await bench.until(job, "pending")
    command = asyncio.create_task(bench.scheduler.finalize(job))
    await bench.turn()
    command.cancel()
    await bench.turn()
    bench.scheduler.cancel(job, force=True)  # too late, and it must not lie about it
    job.prepare_gate.set()
    await bench.until(job, "null")
    assert bench.events[-3:] == ["COMPLETED", "concluded", "null"]


async def test_cancel_of_a_running_job():
    bench = Bench()
    job = Copy()
    job.gate.clear()
    await bench.start(job)
    await bench.turn()
    bench.scheduler.cancel(job)
    await bench.turn()
    assert job.in_chunk and job.status == "running", "never killed inside a chunk"
    job.gate.set()
    await bench.until(job, "null")
    assert bench.events[2:] == ["aborting", "CANCELLED", "concluded", "null"]
    assert job.hooks == ["abort", "clean", "free"]
    assert job.error.message == "Operation canceled"


async def test_cancel_that_comes_after_the_last_chunk():
    bench = Bench()
    job = Copy(chunks=1)
    job.gate.clear()
    await bench.start(job)
    await bench.turn()
    bench.scheduler.cancel(job)
    job.gate.set()
    await bench.until(job, "null")
    assert bench.events[2:] == ["aborting", "CANCELLED", "concluded", "null"]


async def test_cancel_of_a_paused_job_wakes_it():
    bench = Bench()
    job = await bench.start(Copy(speed=1))
    bench.scheduler.pause(job)
    await bench.until(job, "paused")
    bench.scheduler.cancel(job, force=True)
    await bench.until(job, "null")
    assert bench.events[2:] == ["paused", "running", "aborting", "CANCELLED", "concluded", "null"]


async def test_cancel_of_a_pending_job():
    bench = Bench()
    job = await bench.start(Copy(auto_finalize=False))
    await bench.until(job, "pending")
    bench.scheduler.cancel(job)
    await bench.until(job, "null")
    assert bench.events[5:] == ["aborting", "CANCELLED", "concluded", "null"]
    assert job.hooks == ["abort", "clean", "free"]


async def test_ready_complete_and_gentle_cancel():
    for verb in ("complete", "cancel"):
        bench = Bench()
        job = await bench.start(Copy(ready=True))
        await bench.until(job, "ready")
        assert bench.events[2:] == ["ready", "READY"]
        bench.scheduler.pause(job)
        await bench.until(job, "standby")
        bench.scheduler.resume(job)
        await bench.until(job, "ready")
        getattr(bench.scheduler, verb)(job)
        await bench.until(job, "null")
        assert bench.events[4:] == ["standby", "ready", *GOOD]


async def test_forced_cancel_of_a_ready_job():
    bench = Bench()
    job = await bench.start(Copy(ready=True))
    await bench.until(job, "ready")
    bench.scheduler.cancel(job, force=True)
    await bench.until(job, "null")
    assert bench.events[4:] == ["aborting", "CANCELLED", "concluded", "null"]


async def test_pause_stops_a_job_that_sleeps_in_its_rate_limit():
    bench = Bench()
    job = await bench.start(Copy(speed=1))
    await bench.turn()
    assert job.offset == CHUNK, "one chunk always goes"
    bench.scheduler.pause(job)
    with pytest.raises(BlockError, match="Job is already paused"):
        bench.scheduler.pause(job)
    await bench.turn()
    assert job.status == "paused", "though no time went by"
    bench.scheduler.set_speed(job, 0)
    await bench.turn()
    assert job.status == "paused" and job.offset == CHUNK
    bench.scheduler.resume(job)
    with pytest.raises(BlockError, match="Can't resume a job that was not paused"):
        bench.scheduler.resume(job)
    await bench.until(job, "null")
    assert bench.events[2:] == ["paused", "running", *GOOD]


async def test_speed_works_by_the_clock_and_a_change_at_once():
    bench = Bench()
    job = await bench.start(Copy(chunks=8, speed=CHUNK))
    await bench.turn()
    assert job.offset == CHUNK
    await bench.clock.advance(2.05)
    assert job.offset == 3 * CHUNK
    bench.scheduler.set_speed(job, 0)
    await bench.until(job, "null")
    assert bench.clock.now == 1002.05


async def test_a_negative_speed_is_found_with_the_job_there():
    bench = Bench()
    with pytest.raises(BlockError, match="Parameter 'speed' expects a non-negative value"):
        await bench.start(Copy(speed=-1))
    assert bench.events == ["created", "null"]
    assert not bench.scheduler.jobs
    job = await bench.start(Copy(speed=1))
    with pytest.raises(BlockError, match="Parameter 'speed' expects a non-negative value"):
        bench.scheduler.set_speed(job, -5)
    await bench.scheduler.cancel_all()


@pytest.mark.parametrize("bad", ["", "1st", "a b", "-dash", "#auto", "é", "a\n", "a/b"])
async def test_ids_that_are_refused(bad):
    bench = Bench()
    with pytest.raises(BlockError) as caught:
        await bench.start(Copy(bad))
    assert caught.value.message == f"Invalid job ID '{bad}'"
    assert bench.events == []


async def test_id_in_use():
    bench = Bench()
    await bench.start(Copy("A-z_0.9", speed=1))
    with pytest.raises(BlockError, match=r"^Job ID 'A-z_0\.9' already in use$"):
        await bench.start(Copy("A-z_0.9"))
    await bench.scheduler.cancel_all()


async def reach(bench, status):
    """A job in ``status``, standing still there."""
    job = Copy(auto_finalize=False, auto_dismiss=False, ready=status in ("ready", "standby"))
    if status in ("running", "paused"):
        job.limit.set_speed(1, 0)
    if status in ("aborting", "waiting"):
        job.gate.clear()
    if status == "created":
        bench.scheduler.create(job)
        return job
    transaction = Transaction()
    bench.scheduler.create(job, transaction)
    if status == "waiting":
        bench.scheduler.create(Copy("other", speed=1), transaction)
        await bench.scheduler.start(bench.scheduler.jobs["other"])
    await bench.scheduler.start(job)
    await bench.turn()
    job.gate.set()
    match status:
        case "running":
            return job
        case "paused" | "standby":
            await bench.until(job, "ready" if status == "standby" else "running")
            bench.scheduler.pause(job)
        case "aborting":
            hold = asyncio.Event()
            job.abort = hold.wait
            bench.hold = hold
            bench.scheduler.cancel(job, force=True)
        case "concluded" | "null":
            await bench.until(job, "pending")
            await bench.scheduler.finalize(job)
            if status == "null":
                await bench.scheduler.dismiss(job)
    await bench.until(job, status)
    return job


VERBS = {
    "cancel": lambda s, j: s.cancel(j, force=True),
    "pause": lambda s, j: s.pause(j),
    "resume": lambda s, j: s.resume(j),
    "set-speed": lambda s, j: s.set_speed(j, 7),
    "complete": lambda s, j: s.complete(j),
    "finalize": lambda s, j: s.finalize(j),
    "dismiss": lambda s, j: s.dismiss(j),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("status", [s for s in JobStatus if s != "undefined"])
async def test_every_verb_in_every_status(verb, status):
    bench = Bench()
    job = await reach(bench, status)
    assert job.status == status
    error = None
    try:
        result = VERBS[verb](bench.scheduler, job)
        if asyncio.iscoroutine(result):
            await result
    except BlockError as caught:
        error = caught.message
    if verb == "resume" and status not in ("paused", "standby"):
        assert error == "Can't resume a job that was not paused"
    elif verb == "pause" and status in ("paused", "standby"):
        assert error == "Job is already paused"
    elif status in OBEYED[JobVerb(verb)]:
        assert error is None
    else:
        assert error == f"Job 's' in state '{status}' cannot accept command verb '{verb}'"
    if hasattr(bench, "hold"):
        bench.hold.set()
    async with asyncio.timeout(30):
        await bench.scheduler.cancel_all()
    assert not bench.scheduler.jobs
    assert job.status == "null"


class TestErrors:
    async def run(self, on_error, code=EIO):
        bench = Bench()
        job = Copy(on_error=on_error)
        job.errors = {1: OSError(code, "injected"), 2: OSError(code, "again")}
        await bench.start(job)
        return bench, job

    @pytest.mark.parametrize("policy", ["report", "enospc", "auto"])
    async def test_report(self, policy):
        bench, job = await self.run(BlockdevOnError(policy))
        await bench.until(job, "null")
        assert bench.events[2:] == ["ERROR", "aborting", "COMPLETED", "concluded", "null"]
        assert bench.raw[2].data() == {"device": "s", "operation": "read", "action": "report"}
        assert bench.raw[4].data()["error"] == "injected"
        assert job.hooks == ["abort", "clean", "free"]

    async def test_ignore_goes_on_and_fails_in_the_end(self):
        bench, job = await self.run(BlockdevOnError.IGNORE)
        await bench.until(job, "null")
        assert bench.events[2:] == ["ERROR", "ERROR", "aborting", "COMPLETED", "concluded", "null"]
        assert job.offset == job.length
        assert bench.raw[-3].data()["error"]

    @pytest.mark.parametrize(
        ("policy", "code", "io_status"),
        [
            ("stop", EIO, "failed"),
            *((policy, code, "nospace") for policy in ("stop", "enospc") for code in NO_SPACE),
        ],
    )
    async def test_stop(self, policy, code, io_status):
        bench, job = await self.run(BlockdevOnError(policy), code)
        for _ in range(2):
            await bench.until(job, "paused")
            assert job.io_status == io_status and job.user_paused
            bench.scheduler.resume(job)
            assert job.io_status is BlockDeviceIoStatus.OK
            assert bench.events[-2:] == ["ERROR", "paused"]
            await bench.until(job, "running")
        await bench.until(job, "null")
        assert bench.events[2:] == ["ERROR", "paused", "running"] * 2 + GOOD
        assert job.offset == job.length

    async def test_cancel_of_a_job_that_an_error_stopped(self):
        bench, job = await self.run(BlockdevOnError.STOP)
        await bench.until(job, "paused")
        bench.scheduler.cancel(job, force=True)
        await bench.until(job, "null")
        assert bench.events[-4:] == ["aborting", "CANCELLED", "concluded", "null"]

    async def test_prepare_fails(self):
        bench = Bench()
        job = Copy()
        job.prepare_error = OSError(EIO, "header")
        await bench.start(job)
        await bench.until(job, "null")
        assert bench.events[2:] == [
            "waiting", "pending", "aborting", "COMPLETED", "concluded", "null"
        ]  # fmt: skip
        assert bench.raw[-3].data()["error"] == "header"
        assert job.hooks == ["prepare", "abort", "clean", "free"]

    async def test_a_defect_ends_the_job_and_nothing_else(self, caplog):
        bench = Bench()
        job = Copy()

        async def bad():
            raise ZeroDivisionError

        job.run = bad
        job.clean = bad
        await bench.start(job)
        await bench.until(job, "null")
        assert bench.events[2:] == ["aborting", "COMPLETED", "concluded", "null"]
        assert "by a defect" in caplog.text


class TestTransactions:
    async def pair(self, **options):
        bench = Bench()
        transaction = Transaction()
        jobs = [Copy("a", **options), Copy("b", speed=1)]
        for job in jobs:
            bench.scheduler.create(job, transaction)
        for job in jobs:
            await bench.scheduler.start(job)
        return bench, jobs

    async def test_nobody_ends_before_all_can(self):
        bench, (a, b) = await self.pair()
        await bench.until(a, "waiting")
        await bench.turn()
        assert a.hooks == []
        bench.scheduler.set_speed(b, 0)
        await bench.until(b, "null")
        await bench.until(a, "null")
        assert a.hooks == b.hooks == ["prepare", "commit", "clean", "free"]

    @pytest.mark.parametrize("how", ["cancel a", "cancel b", "fail"])
    async def test_one_takes_the_others_along(self, how):
        bench, (a, b) = await self.pair()
        if how == "fail":
            a.errors[0] = OSError(EIO, "injected")
        else:
            await bench.until(a, "waiting")
            bench.scheduler.cancel(a if how == "cancel a" else b, force=True)
        await bench.until(a, "null")
        await bench.until(b, "null")
        assert a.hooks == b.hooks == ["abort", "clean", "free"]
        assert bench.events.count("CANCELLED") == (1 if how == "fail" else 2)

    async def test_rolled_back_before_the_start(self):
        bench = Bench()
        bench.scheduler.create(Copy())
        await bench.scheduler.cancel_all()
        assert bench.events == ["created", "aborting", "concluded", "null"]


class TestTurns:
    async def test_only_so_many_work_at_a_time(self):
        bench = Bench(max_concurrent=1)
        a = await bench.start(Copy("a", speed=1))
        b = await bench.start(Copy("b", chunks=1))
        await bench.turn()
        assert b.status == "running" and b.offset == 0 and not b.busy
        bench.scheduler.pause(b)
        await bench.turn()
        assert b.status == "paused"
        bench.scheduler.resume(b)
        bench.scheduler.pause(a)  # one that stands still gives its turn away
        await bench.until(b, "null")
        await bench.scheduler.cancel_all()

    async def test_one_that_is_resumed_waits_again(self):
        bench = Bench(max_concurrent=1)
        a = await bench.start(Copy("a", chunks=2, speed=1))
        b = await bench.start(Copy("b", speed=1))
        await bench.turn()
        bench.scheduler.pause(a)
        await bench.turn()
        assert b.offset == CHUNK
        bench.scheduler.resume(a)
        bench.scheduler.set_speed(a, 0)
        await bench.turn()
        assert a.status == "running" and a.offset == CHUNK and not a.busy
        bench.scheduler.cancel(b, force=True)
        await bench.until(a, "null")
        assert a.offset == 2 * CHUNK

    async def test_first_come_first_served(self):
        bench = Bench(max_concurrent=1)
        jobs = [await bench.start(Copy(f"j{i}", chunks=2)) for i in range(5)]
        bench.scheduler.pause(jobs[2])  # it waits, and keeps its place
        await bench.turn(3)
        bench.scheduler.resume(jobs[2])
        for job in jobs:
            await bench.until(job, "null")
        ends = [e.device for e in bench.raw if e.name == "BLOCK_JOB_COMPLETED"]
        assert ends == ["j0", "j1", "j2", "j3", "j4"]

    async def test_one_that_waits_is_cancelled_at_once(self):
        bench = Bench(max_concurrent=1)
        a = await bench.start(Copy("a", speed=1))
        b = await bench.start(Copy("b"))
        await bench.turn()
        bench.scheduler.cancel(b)
        await bench.until(b, "null")
        assert b.cancelled and b.offset == 0 and a.status == "running"
        await bench.scheduler.cancel_all()

    async def test_the_limit_changes_meanwhile(self):
        bench = Bench()
        jobs = [await bench.start(Copy(f"j{i}", chunks=1000)) for i in range(4)]
        await bench.turn()
        assert all(job.offset for job in jobs)
        bench.scheduler.turns.limit = 2
        await bench.turn(5)
        before = [job.offset for job in jobs]
        await bench.turn()
        grown = [job.offset > was for job, was in zip(jobs, before, strict=True)]
        assert grown == [True, True, False, False]
        assert [job.id for job in bench.scheduler.turns.waiting()] == ["j2", "j3"]
        bench.scheduler.turns.limit = 3
        await bench.turn()
        assert jobs[2].offset > before[2] and jobs[3].offset == before[3]
        bench.scheduler.turns.limit = 0
        await bench.turn()
        assert jobs[3].offset > before[3]
        await bench.scheduler.cancel_all()

    async def test_one_that_is_ready_holds_up_nobody(self):
        bench = Bench(max_concurrent=1)
        a = await bench.start(Copy("a", ready=True))
        await bench.until(a, "ready")
        b = await bench.start(Copy("b"))
        await bench.until(b, "null")
        assert a.status == "ready"
        bench.scheduler.complete(a)
        await bench.until(a, "null")

    async def test_a_job_with_nothing_to_do_waits_for_nobody(self):
        bench = Bench(max_concurrent=1)
        await bench.start(Copy("a", speed=1))
        b = Copy("b", chunks=0)
        b.immediate = True
        async with asyncio.timeout(30):
            await bench.start(b)
        assert b.status == "null"
        await bench.scheduler.cancel_all()

    async def test_a_transaction_larger_than_the_limit_ends(self):
        bench = Bench(max_concurrent=1)
        transaction = Transaction()
        jobs = [Copy(f"j{i}") for i in range(3)]
        for job in jobs:
            bench.scheduler.create(job, transaction)
        for job in jobs:
            await bench.scheduler.start(job)
        for job in jobs:
            await bench.until(job, "null")
        assert all(job.error is None for job in jobs)

    async def test_everything_is_cancelled_in_the_end(self):
        bench = Bench(max_concurrent=1)
        jobs = [await bench.start(Copy(f"j{i}", speed=1)) for i in range(4)]
        await bench.turn()
        async with asyncio.timeout(30):
            await bench.scheduler.cancel_all()
        assert all(job.cancelled and job.status == "null" for job in jobs)


async def test_jobs_share_what_they_may_have_in_flight():
    bench = Bench()
    jobs = [await bench.start(Copy(f"j{i}", speed=1)) for i in range(3)]
    await bench.turn()
    assert bench.scheduler.share(jobs[0]) == 1
    bench.scheduler.pause(jobs[1])
    bench.scheduler.pause(jobs[2])
    assert bench.scheduler.share(jobs[0]) == 3
    await bench.scheduler.cancel_all()


LEFT = ["aborting", "CANCELLED", "concluded", "null"]


class TestLeft:
    """Jobs that were cancelled and whose requests hang: their end is told, the hooks follow."""

    async def hung(self, bench, job):
        job.gate.clear()
        await bench.start(job)
        await bench.turn()
        assert job.in_chunk
        return job

    async def test_the_end_is_told_after_a_while_and_the_hooks_follow(self):
        bench = Bench()
        job = await self.hung(bench, Copy())
        bench.scheduler.cancel(job)
        await bench.advance(hanging.LEFT - 0.01)
        assert job.status == "running"
        await bench.advance(0.02)
        await bench.turn()
        assert bench.events[2:] == LEFT
        assert job.error.message == "Operation canceled"
        assert job.hooks == ["stop mattering"]
        assert not bench.scheduler.jobs
        await bench.advance(1000)
        assert job.hooks == ["stop mattering"]
        job.gate.set()
        await bench.turn()
        assert job.hooks == ["stop mattering", "abort", "clean", "free"]
        assert bench.events[2:] == LEFT, "said once"
        await bench.scheduler.cancel_all()

    @pytest.mark.parametrize("ready", [False, True])
    async def test_one_that_was_paused_or_ready(self, ready):
        bench = Bench()
        job = await bench.start(Copy(ready=ready, speed=0 if ready else 1))
        if ready:
            await bench.until(job, "ready")
        bench.scheduler.pause(job)
        await bench.until(job, "standby" if ready else "paused")
        job.clean_gate = asyncio.Event()
        bench.scheduler.cancel(job, force=True)
        await bench.turn()
        assert job.status == "aborting"
        await bench.advance(hanging.LEFT)
        await bench.turn()
        assert bench.events[-4:] == LEFT
        assert job.hooks == ["abort", "stop mattering"]
        job.clean_gate.set()
        await bench.turn()
        assert job.hooks == ["abort", "stop mattering", "clean", "free"]

    async def test_one_that_failed_and_cannot_give_back_its_nodes(self):
        bench = Bench()
        job = Copy()
        job.errors[1] = OSError(EIO, "Input/output error")
        job.clean_gate = asyncio.Event()
        await bench.start(job)
        await bench.until(job, "aborting")
        await bench.advance(hanging.LEFT)
        await bench.turn()
        assert bench.events[-3:] == ["COMPLETED", "concluded", "null"]
        assert bench.raw[-3].data()["error"] == "Input/output error"
        job.clean_gate.set()
        await bench.turn()
        assert job.hooks[-2:] == ["clean", "free"]

    async def test_what_is_being_finalized_is_not_left(self):
        bench = Bench()
        job = Copy()
        job.prepare_gate = asyncio.Event()
        await bench.start(job)
        await bench.until(job, "pending")
        bench.scheduler.cancel(job, force=True)
        await bench.advance(100 * hanging.LEFT)
        assert job.status == "pending"
        job.prepare_gate.set()
        await bench.turn()
        assert bench.events[-3:] == ["COMPLETED", "concluded", "null"]
        assert job.error is None
        assert job.hooks == ["prepare", "commit", "clean", "free"]

    async def test_it_waits_for_its_client_and_its_hooks_for_nobody(self):
        bench = Bench()
        job = await self.hung(bench, Copy(auto_dismiss=False))
        bench.scheduler.cancel(job)
        bench.scheduler.cancel(job)
        await bench.advance(hanging.LEFT)
        await bench.turn()
        assert bench.events[-1] == "concluded"
        async with asyncio.timeout(10):
            await bench.scheduler.dismiss(job)
        assert bench.events[2:] == LEFT
        job.gate.set()
        await bench.turn()
        assert job.hooks == ["stop mattering", "abort", "clean", "free"]

    async def test_its_nodes_are_there_until_it_is_dismissed(self):
        bench = Bench()
        job = await self.hung(bench, Copy(auto_dismiss=False))
        bench.scheduler.cancel(job)
        await bench.advance(hanging.LEFT)
        job.gate.set()
        await bench.turn()
        assert job.hooks == ["stop mattering", "abort", "clean"]
        await bench.scheduler.dismiss(job)
        assert job.hooks[-1] == "free"

    async def test_its_id_and_its_turn_are_free(self):
        bench = Bench(max_concurrent=1)
        job = await self.hung(bench, Copy())
        bench.scheduler.cancel(job)
        await bench.advance(hanging.LEFT)
        await bench.turn()
        other = await bench.start(Copy())
        assert bench.scheduler.share(other) == other.parallel
        await bench.until(other, "null")
        assert other.error is None
        again = await bench.start(Copy(speed=1))
        job.gate.set()
        await bench.turn()
        assert bench.scheduler.jobs == {"s": again}, "its end is not that of another job"
        await bench.scheduler.cancel_all()

    @pytest.mark.parametrize("first", [0, 1])
    async def test_the_others_of_its_transaction_end(self, first):
        bench = Bench()
        transaction = Transaction()
        hung, other = Copy("a"), Copy("b", speed=1)
        hung.gate.clear()
        jobs = [hung, other] if first == 0 else [other, hung]
        for job in jobs:
            bench.scheduler.create(job, transaction)
        for job in jobs:
            await bench.scheduler.start(job)
        await bench.turn()
        bench.scheduler.cancel(other)
        await bench.turn()
        assert hung.status == "running"
        await bench.advance(hanging.LEFT)
        await bench.turn()
        assert hung.status == other.status == "null"
        assert hung.cancelled and other.cancelled
        assert other.hooks == ["abort", "clean", "free"]
        assert hung.hooks == ["stop mattering"]
        hung.gate.set()
        await bench.turn()
        assert hung.hooks == ["stop mattering", "abort", "clean", "free"]

    async def test_all_of_it_has_ended_when_the_daemon_ends(self):
        bench = Bench()
        job = await self.hung(bench, Copy())
        bench.scheduler.cancel(job)
        await bench.advance(hanging.LEFT)
        end = asyncio.create_task(bench.scheduler.cancel_all())
        await bench.turn()
        assert not end.done()
        job.gate.set()
        async with asyncio.timeout(10):
            await end
        assert job.hooks[-1] == "free"
