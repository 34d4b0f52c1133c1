"""Copies that nobody wants any more: queued ones are withdrawn, others end between two steps."""

import asyncio
import contextlib
import threading

import pytest

from liveblockd.runtime import halting
from liveblockd.runtime.halting import Halt, HaltedError
from liveblockd.runtime.workers import COPY_THREADS, SYNC_THREADS, WorkerPool


@pytest.fixture
async def pool():
    pool = WorkerPool()
    yield pool
    await pool.idle()
    pool.close()


class Copy:
    """Work of many steps; ``let_go`` counts how often it ended, whichever way."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.steps = self.let_go = 0

    def __call__(self, result):
        try:
            halting.check()
            self.begun.set()
            for _ in range(1000):
                halting.check()
                self.steps += 1
                assert self.go_on.wait(20)
            return result
        finally:
            self.let_go += 1


async def begin(pool, halt, copy):
    async def under():
        with halt.over():
            return await halting.run(pool, copy, "done")

    task = asyncio.create_task(under())
    await asyncio.sleep(0)
    return task


async def test_without_a_halt_it_is_a_job_like_others(pool):
    copy = Copy()
    copy.go_on.set()
    assert await halting.run(pool.copies, copy, "done") == "done"
    assert copy.steps == 1000


async def test_one_that_nobody_ends_ends_well(pool):
    copy = Copy()
    copy.go_on.set()
    task = await begin(pool.copies, Halt(), copy)
    assert await asyncio.wait_for(task, 20) == "done"
    assert copy.let_go == 1


async def test_queued_work_is_withdrawn_at_once(pool):
    """The threads are busy with the work of others, and stay so."""
    gate = threading.Event()
    busy = [pool.copies.submit(gate.wait, 20) for _ in range(COPY_THREADS)]
    halt, other = Halt(), Halt()
    copies = [Copy() for _ in range(5)]
    tasks = [await begin(pool.copies, halt, copy) for copy in copies]
    kept = Copy()
    kept.go_on.set()
    stays = await begin(pool.copies, other, kept)
    try:
        halt.ask()
        for task in tasks:
            with pytest.raises(HaltedError):
                await asyncio.wait_for(task, 20)
        assert not any(job.done() for job in busy)
        assert [copy.let_go for copy in copies] == [1] * 5, "descriptors would be left open"
    finally:
        gate.set()
    await asyncio.gather(*busy)
    assert await asyncio.wait_for(stays, 20) == "done", "another job's"
    await pool.idle()
    assert [(copy.let_go, copy.steps) for copy in copies] == [(1, 0)] * 5, "a worker did it again"


async def test_work_under_way_ends_between_two_steps(pool):
    halt, copy = Halt(), Copy()
    task = await begin(pool.copies, halt, copy)
    assert await pool.run(copy.begun.wait, 20)
    halt.ask()
    copy.go_on.set()
    with pytest.raises(HaltedError):
        await asyncio.wait_for(task, 20)
    assert copy.steps < 1000 and copy.let_go == 1


async def test_work_under_a_halt_that_was_asked_for_does_not_begin(pool):
    halt, copy = Halt(), Copy()
    halt.ask()
    task = await begin(pool.copies, halt, copy)
    with pytest.raises(HaltedError):
        await asyncio.wait_for(task, 20)
    assert (copy.let_go, copy.steps) == (1, 0)


async def test_an_error_is_an_error(pool):
    def fail():
        halting.check()
        raise OSError(5, "no")

    with Halt().over(), pytest.raises(OSError, match="no"):
        await halting.run(pool.copies, fail)


async def test_who_is_cancelled_learns_of_it_at_the_end(pool):
    """Buffers and descriptors outlive what uses them."""
    copy = Copy()
    task = await begin(pool.copies, Halt(), copy)
    assert await pool.run(copy.begun.wait, 20)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    copy.go_on.set()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert task.cancelled() and copy.let_go == 1


async def test_a_request_does_not_queue_behind_syncs(pool):
    gate = threading.Event()
    group = pool.group()
    syncs = [group.submit_sync(gate.wait, 20) for _ in range(2 * SYNC_THREADS)]
    try:
        assert await asyncio.wait_for(pool.run(lambda: "answer"), 20) == "answer"
        assert pool.outstanding == group.count == len(syncs)
    finally:
        gate.set()
    await asyncio.wait_for(group.idle(), 20)
    assert all(job.result() for job in syncs)
