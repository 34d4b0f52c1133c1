"""Many pieces in flight: bounds, progress, pauses, errors and speeds, without any disk."""

import asyncio
import itertools
import random
from errno import EIO, ENOSPC

import pytest

from liveblockd.events import Publisher
from liveblockd.jobs.copying import (
    LIMITED_CHUNK,
    MIB,
    MOST_CHUNK,
    READ_CHUNK,
    SLOW_CHUNK,
    CopyJob,
    PieceFailedError,
)
from liveblockd.jobs.job import BlockdevOnError, JobType
from liveblockd.jobs.pieces import Run
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.runtime.halting import HaltedError
from liveblockd.storage.driver import ExtentKind
from tests.support.clock import ManualClock

DATA, READ, ZERO = ExtentKind.DATA, ExtentKind.COMPRESSED, ExtentKind.ZERO
CLUSTER = 64 * 1024


class Moves(CopyJob):
    """Pieces from a list of (length, kind or None); keeps account of what was moved when."""

    type = JobType.STREAM
    granularity = CLUSTER

    def __init__(self, layout, *, windows=1 << 40, **options):
        super().__init__("s", **options)
        self.layout = [(i, *part) for i, part in zip(offsets(layout), layout, strict=True)]
        self.length = sum(length for length, _ in layout)
        self.windows = windows
        self.moved: list[Run] = []
        self.now = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.errors: list = []  # of what to raise, by call
        self.plan_errors: list = []
        self.seconds = 0.0
        self.progress = []

    async def plan(self, offset):
        if self.plan_errors:
            raise self.plan_errors.pop()
        end = min(self.length, offset + self.windows)
        pieces = []
        for start, length, kind in self.layout:
            a, b = max(start, offset), min(start + length, end)
            if a < b and kind is not None:
                pieces.append(Run(a, b - a, kind, "layer" if kind is ExtentKind.DATA else None, a))
        await asyncio.sleep(0)
        return pieces, end

    async def move(self, piece):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            if self.seconds:
                await self.scheduler.clock.sleep(self.seconds)
            await self.gate.wait()
            if self.errors and (error := self.errors.pop(0)):
                raise error
            self.moved.append(piece)
            self.progress.append(self.offset)
        finally:
            self.now -= 1


def offsets(layout):
    position = 0
    for length, _ in layout:
        yield position
        position += length


class Bench:
    def __init__(self):
        self.events = []
        publisher = Publisher()
        publisher.subscribe(lambda e: self.events.append((e.name, e.data())))
        self.clock = ManualClock()
        self.scheduler = Scheduler(publisher, clock=self.clock)

    async def start(self, job):
        self.scheduler.create(job)
        await self.scheduler.start(job)
        return job

    async def turn(self, n=50):
        for _ in range(n):
            await asyncio.sleep(0)

    async def end(self, job):
        for _ in range(200_000):
            if job.status == "null":
                return
            await asyncio.sleep(0)
        raise AssertionError(job.status)

    def errors(self):
        return [data["action"] for name, data in self.events if name == "BLOCK_JOB_ERROR"]


def covered(job):
    """The moved pieces, joined and in order."""
    found = []
    for piece in sorted(job.moved, key=lambda p: p.offset):
        if found and found[-1][1] == piece.offset and found[-1][2] is piece.kind:
            found[-1][1] = piece.end
        else:
            assert not found or found[-1][1] <= piece.offset, "moved twice"
            found.append([piece.offset, piece.end, piece.kind])
    return found


@pytest.mark.parametrize("seed", range(20))
async def test_everything_once(seed):
    rng = random.Random(seed)
    layout = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.choice((DATA, READ, ZERO, None))
        if layout and layout[-1][1] is kind:
            continue
        layout.append((rng.randrange(1, 200) * CLUSTER, kind))
    layout[-1] = (layout[-1][0] - rng.choice((0, 512, 100)), layout[-1][1])
    bench = Bench()
    job = await bench.start(Moves(layout, windows=rng.choice((1 << 40, 10 * CLUSTER))))
    await bench.end(job)
    wanted = [[s, s + n, k] for s, (n, k) in zip(offsets(layout), layout, strict=True) if k]
    assert covered(job) == wanted, seed
    assert job.offset == job.length and job.error is None
    assert job.progress == sorted(job.progress), "progress never goes back"
    assert job.most <= job.parallel


async def test_a_few_in_flight_and_no_more():
    bench = Bench()
    job = Moves([(64 * MIB, READ)])
    job.gate.clear()
    await bench.start(job)
    await bench.turn()
    assert job.now == 3
    job.gate.set()
    await bench.end(job)
    assert job.most == 3
    assert max(piece.length for piece in job.moved) == READ_CHUNK


async def test_holes_count_at_once():
    bench = Bench()
    job = Moves([(1 << 40, None), (MIB, READ)])
    job.gate.clear()
    await bench.start(job)
    await bench.turn()
    assert job.offset == 1 << 40
    job.gate.set()
    await bench.end(job)


async def test_paused_means_nothing_in_flight():
    bench = Bench()
    job = Moves([(64 * MIB, READ)])
    job.gate.clear()
    await bench.start(job)
    await bench.turn()
    bench.scheduler.pause(job)
    await bench.turn()
    assert job.status == "running"
    job.gate.set()
    await bench.turn()
    assert job.status == "paused" and job.now == 0
    done = len(job.moved)
    await bench.turn()
    assert len(job.moved) == done == 3
    bench.scheduler.resume(job)
    await bench.end(job)


async def test_cancelled_means_nothing_in_flight():
    bench = Bench()
    job = Moves([(64 * MIB, READ)])
    job.gate.clear()
    await bench.start(job)
    await bench.turn()
    bench.scheduler.cancel(job)
    await bench.turn()
    assert job.status == "running" and job.now == 3
    job.gate.set()
    await bench.end(job)
    assert len(job.moved) == 3


async def test_a_speed_means_one_chunk_and_a_wait():
    bench = Bench()
    job = await bench.start(Moves([(8 * MIB, DATA)], speed=1))
    await bench.turn()
    assert job.offset == SLOW_CHUNK
    await bench.clock.advance(1000)
    assert job.offset == SLOW_CHUNK
    bench.scheduler.set_speed(job, MIB)
    await bench.turn()
    await bench.clock.advance(2.05)
    assert job.offset == pytest.approx(2.05 * MIB, abs=0.2 * MIB)
    bench.scheduler.pause(job)
    await bench.turn()
    assert job.status == "paused"
    bench.scheduler.set_speed(job, 0)
    bench.scheduler.resume(job)
    await bench.end(job)
    assert bench.clock.now == pytest.approx(2002.05)


async def test_chunks_of_a_worker_fit_the_disk():
    bench = Bench()
    job = await bench.start(Moves([(4096 * MIB, DATA)]))
    await bench.end(job)
    assert max(piece.length for piece in job.moved) == MOST_CHUNK
    bench = Bench()
    job = Moves([(64 * MIB, DATA)])
    job.seconds = 0.05
    await bench.start(job)
    for _ in range(40):
        await bench.turn(10)
        await bench.clock.advance(0.05)
    await bench.end(job)
    assert job.moved[-1].length == MIB


async def test_chunks_stay_large_where_many_jobs_take_turns():
    """The time of a piece is mostly that of the others; a pause must not wait too long, though."""
    for others, seconds, length in ((0, 0.05, 1), (8, 0.05, 2), (8, 0.1, 1)):
        bench = Bench()
        for number in range(others):
            await bench.start(idle := Moves([(MIB, READ)]))
            idle.gate.clear()
            bench.scheduler.jobs[f"other{number}"] = bench.scheduler.jobs.pop(idle.id)
        job = Moves([(64 * MIB, DATA)])
        job.seconds = seconds
        await bench.start(job)
        for _ in range(80):
            await bench.turn(10)
            await bench.clock.advance(seconds)
        assert job.moved[-1].length == length * MIB, (others, seconds)


def eio(code=EIO):
    return PieceFailedError("write", OSError(code, "injected"))


async def test_report():
    bench = Bench()
    job = Moves([(64 * MIB, READ)])
    job.errors = [None, eio()]
    await bench.start(job)
    await bench.end(job)
    assert bench.errors() == ["report"]
    assert bench.events[-4][0] == "JOB_STATUS_CHANGE"
    assert bench.events[-3][1]["error"] == "injected"
    assert job.now == 0 and job.offset < job.length


async def test_ignore():
    bench = Bench()
    job = Moves([(16 * MIB, READ)], on_error=BlockdevOnError.IGNORE)
    job.errors = [None, eio(), None, eio()]
    await bench.start(job)
    await bench.end(job)
    assert bench.errors() == ["ignore", "ignore"]
    assert job.offset == job.length
    assert job.error.message == "injected", "or the header would lose what was not copied"


@pytest.mark.parametrize("code", [EIO, ENOSPC])
async def test_stop_and_try_again(code):
    bench = Bench()
    job = Moves([(16 * MIB, READ)], on_error=BlockdevOnError.STOP)
    job.errors = [eio(code)] * 3 + [None, eio(code)]
    await bench.start(job)
    for _ in range(2):
        await bench.turn()
        assert job.status == "paused" and job.now == 0
        assert job.io_status == ("nospace" if code == ENOSPC else "failed")
        bench.scheduler.resume(job)
    await bench.end(job)
    assert bench.errors() == ["stop", "stop"], "one event a stop, however many pieces failed"
    assert covered(job) == [[0, 16 * MIB, READ]]
    assert job.error is None


async def test_a_plan_that_fails():
    for policy, errors in (("stop", ["stop"]), ("ignore", ["ignore"]), ("report", ["report"])):
        bench = Bench()
        job = Moves([(16 * MIB, READ)], on_error=BlockdevOnError(policy))
        job.plan_errors = [OSError(EIO, "no map")]
        await bench.start(job)
        await bench.turn()
        if policy == "stop":
            assert job.status == "paused"
            bench.scheduler.resume(job)
        await bench.end(job)
        assert bench.errors() == errors
        assert (job.error is None) == (policy == "stop")


class Ahead(Moves):
    """Looks for pieces while others are moved; ``errors_ahead`` are of looks further on."""

    plans_ahead = True
    errors_ahead = ()

    async def plan(self, offset):
        if offset and self.errors_ahead:
            raise self.errors_ahead.pop()
        return await super().plan(offset)


async def test_a_plan_that_failed_while_a_piece_did_stops_the_job_only_once():
    """The error is of the time before the stop: after the resume it is looked at again."""
    bench = Bench()
    job = Ahead([(16 * MIB, READ)], windows=4 * MIB, on_error=BlockdevOnError.STOP)
    job.gate.clear()
    job.errors = [eio(EIO)]
    job.errors_ahead = [OSError(EIO, "no map")]
    await bench.start(job)
    await bench.turn()
    assert job.now and not job.errors_ahead, "both are under way, and the plan has failed"
    job.gate.set()
    await bench.turn()
    assert job.status == "paused" and bench.errors() == ["stop"]
    bench.scheduler.resume(job)
    await bench.end(job)
    assert bench.errors() == ["stop"]
    assert covered(job) == [[0, 16 * MIB, READ]]
    assert job.error is None


async def test_a_defect_of_a_plan_beside_a_piece_that_failed_is_not_forgotten():
    bench = Bench()
    job = Ahead([(16 * MIB, READ)], windows=4 * MIB, on_error=BlockdevOnError.STOP)
    job.gate.clear()
    job.errors = [eio(EIO)]
    job.errors_ahead = [ZeroDivisionError("a defect")]
    await bench.start(job)
    await bench.turn()
    job.gate.set()
    await bench.turn()
    assert job.status == "paused"
    bench.scheduler.resume(job)
    await bench.end(job)
    assert "a defect" in job.error.message


async def test_a_defect_in_a_piece_fails_the_job():
    bench = Bench()
    job = Moves([(16 * MIB, READ)])
    job.errors = [ZeroDivisionError()]
    await bench.start(job)
    await bench.end(job)
    assert "ZeroDivisionError" in job.error.message


async def test_pieces_that_are_halted_are_moved_later():
    """A pause ends them at once; nothing is moved twice, left out or counted as an error."""
    bench = Bench()
    job = Moves([(MIB, DATA), (5 * MIB, READ), (20 * MIB, DATA)], speed=0)
    move, halted = job.move, []

    async def moves(piece):
        halt = job.halt
        for _ in range(4):
            await asyncio.sleep(0)
            if halt.asked:
                halted.append(piece)
                raise HaltedError
        await move(piece)

    job.move = moves
    await bench.start(job)
    for turns in itertools.count():
        await bench.turn(turns % 9)
        if job.status != "running":
            break
        bench.scheduler.pause(job)
        await bench.turn()
        assert job.status == "paused" and job.now == 0
        assert job.offset == sum(piece.length for piece in job.moved)
        bench.scheduler.resume(job)
    await bench.end(job)
    assert len(halted) > 5 and not bench.errors()
    assert covered(job) == [[0, MIB, DATA], [MIB, 6 * MIB, READ], [6 * MIB, 26 * MIB, DATA]]


async def test_a_halted_piece_owes_nothing():
    bench = Bench()
    job = Moves([(4 * LIMITED_CHUNK, DATA)], speed=1024)
    job.gate.clear()
    errors = [HaltedError()]
    job.errors = errors
    await bench.start(job)
    await bench.turn()
    bench.scheduler.pause(job)
    job.gate.set()
    await bench.turn()
    assert (job.status, job.offset, errors) == ("paused", 0, [])
    bench.scheduler.resume(job)
    await bench.turn()
    assert job.offset == SLOW_CHUNK, "one chunk moves at once, however slow it is to be"
    bench.scheduler.cancel(job)
    await bench.end(job)
