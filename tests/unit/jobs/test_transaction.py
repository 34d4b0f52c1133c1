"""Jobs of a transaction: started together, or ended before they began, under the graph's lock."""

import asyncio

import pytest

from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.graph.actions import Abort
from liveblockd.graph.graph import Graph
from liveblockd.graph.transaction import perform
from liveblockd.jobs.scheduler import Transaction
from liveblockd.jobs.transaction import JobAction
from liveblockd.storage.registry import Environment
from tests.support.workers import InlineWorkers
from tests.unit.jobs.test_scheduler import Bench, Copy


class Locking(Copy):
    """A job whose hooks change the graph."""

    graph: Graph

    async def hook(self):
        async with self.graph.lock:
            await asyncio.sleep(0)

    async def commit(self):
        await super().commit()
        await self.hook()

    async def abort(self):
        await super().abort()
        await self.hook()

    async def free(self):
        await super().free()
        await self.hook()


@pytest.fixture
def bench():
    bench = Bench()
    bench.graph = Graph(Environment(workers=InlineWorkers(), publisher=Publisher()))
    bench.jobs = []
    return bench


def action(bench, job_id, transaction=None, *, immediate=False, **options):
    async def create(given):
        assert bench.graph.lock.held()
        job = Locking(job_id, **options)
        job.graph = bench.graph
        job.immediate = immediate
        bench.scheduler.create(job, given)
        bench.jobs.append(job)
        return job

    return JobAction(bench.scheduler, (), create, transaction)


async def ended(bench):
    async with asyncio.timeout(30):
        for job in bench.jobs:
            await bench.until(job, "null")


async def test_they_start_together(bench):
    await perform(bench.graph, [action(bench, "a"), action(bench, "b")])
    assert bench.events == ["created", "created", "running", "running"]
    await ended(bench)
    assert all(job.hooks == ["prepare", "commit", "clean", "free"] for job in bench.jobs)


@pytest.mark.parametrize("grouped", [False, True])
async def test_an_action_after_them_fails(bench, grouped):
    transaction = Transaction() if grouped else None
    async with asyncio.timeout(30):
        with pytest.raises(BlockError, match="Abort action"):
            await perform(
                bench.graph,
                [action(bench, "a", transaction), action(bench, "b", transaction), Abort()],
            )
    lives = {
        job.id: [e.data()["status"] for e in bench.raw if e.data()["id"] == job.id]
        for job in bench.jobs
    }
    assert lives == {name: ["created", "aborting", "concluded", "null"] for name in "ab"}
    assert all(job.hooks == ["abort", "clean", "free"] for job in bench.jobs)
    assert not bench.scheduler.jobs and not bench.graph.lock.locked()


async def test_a_job_that_cannot_be_made_ends_those_before(bench):
    with pytest.raises(BlockError, match="already in use"):
        await perform(bench.graph, [action(bench, "a"), action(bench, "a")])
    assert not bench.scheduler.jobs


@pytest.mark.parametrize("grouped", [False, True])
async def test_jobs_with_nothing_to_do_are_over_at_the_return(bench, grouped):
    transaction = Transaction() if grouped else None
    async with asyncio.timeout(30):
        await perform(
            bench.graph,
            [action(bench, name, transaction, immediate=True, chunks=0) for name in "ab"],
        )
    assert not bench.scheduler.jobs
    assert bench.events.count("COMPLETED") == 2


async def test_one_that_is_over_waits_for_the_others_of_its_group(bench):
    transaction = Transaction()
    async with asyncio.timeout(30):
        await perform(
            bench.graph,
            [
                action(bench, "a", transaction, immediate=True, chunks=0),
                action(bench, "b", transaction),
            ],
        )
        assert bench.scheduler.jobs
        await ended(bench)
    assert bench.events.count("COMPLETED") == 2


async def test_one_of_a_group_fails_and_none_takes_effect(bench):
    transaction = Transaction()
    steps = [action(bench, name, transaction, chunks=100) for name in "ab"]
    await perform(bench.graph, steps)
    bench.jobs[1].errors[99] = OSError(5, "Input/output error")
    await ended(bench)
    assert bench.events.count("CANCELLED") == 1 and bench.events.count("COMPLETED") == 1
    assert all("commit" not in job.hooks for job in bench.jobs)


async def test_the_daemon_ends_while_they_are_made(bench):
    """Whoever ends the jobs first, nothing waits for the other for ever."""
    stop = None

    class Quit(Abort):
        async def prepare(self):
            nonlocal stop
            stop = asyncio.create_task(bench.scheduler.cancel_all())
            await bench.turn()

    async with asyncio.timeout(30):
        await perform(bench.graph, [action(bench, "a"), Quit()])
        assert stop is not None
        await stop
    assert not bench.scheduler.jobs
    assert bench.jobs[0].hooks == ["abort", "clean", "free"]
