"""The lock of the graph, taken when nothing hangs: guests go on while somebody waits for that."""

import asyncio

import pytest

from liveblockd.graph import rest
from liveblockd.graph.rest import lock_at_rest
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench

USED = Permission.CONSISTENT_READ | Permission.WRITE


@pytest.fixture
async def bench(monkeypatch):
    monkeypatch.setattr(rest, "TRY", (0.05, 0.1))
    monkeypatch.setattr(rest, "PAUSE", 2)
    monkeypatch.setattr(rest, "AGAIN", 0.01)
    bench = Bench()
    bench.node = await bench.open(driver="null-co", node_name="n", size=1 << 20)
    bench.user = await bench.graph.attach(bench.node, USED, Permission.ALL, name="d")
    bench.there = asyncio.Event()
    yield bench
    await bench.close()


async def hold(bench):
    """Take the lock, and tell."""
    async with lock_at_rest(bench.graph, bench.node):
        assert bench.graph.lock.held() and not bench.user.in_flight
        bench.there.set()
        await asyncio.sleep(0.02)


def hang(bench):
    """A request of the guest that is not answered before the event is set."""
    answered = asyncio.Event()
    return answered, asyncio.create_task(bench.user._counted(answered.wait()))


async def test_at_once_when_nothing_hangs(bench):
    async with asyncio.timeout(1):
        await hold(bench)
    assert not bench.graph.lock.locked()
    await bench.user.write(0, b"x")


async def test_a_request_that_hangs(bench):
    """Drains are tried; between them the guest goes on, and whoever needs the lock."""
    answered, request = hang(bench)
    holding = asyncio.create_task(hold(bench))
    waits = []
    for _ in range(20):
        began = asyncio.get_running_loop().time()
        await bench.user.write(0, b"x")
        waits.append(asyncio.get_running_loop().time() - began)
        async with bench.graph.lock:
            assert not bench.there.is_set()
        await asyncio.sleep(0.02)
    assert max(waits) < 1
    assert len([wait for wait in waits if wait > 0.02]) < 10, waits
    answered.set()
    async with asyncio.timeout(5):
        await holding
    await request


async def test_a_server_that_hangs_is_waited_for_without_a_drain(bench, monkeypatch):
    monkeypatch.setattr(bench.node.driver, "silence", lambda: 5.0)
    drains = []
    monkeypatch.setattr(bench.user, "quiesce", lambda: drains.append(1))
    holding = asyncio.create_task(hold(bench))
    await asyncio.sleep(0.1)
    assert not holding.done() and not drains and not bench.graph.lock.locked()
    monkeypatch.undo()
    async with asyncio.timeout(5):
        await holding


async def test_a_request_that_is_slow_is_waited_for_longer_each_time(bench):
    """Drains must not be given up for ever where each request takes a while."""
    stopping = False

    async def slow():
        while not stopping:
            await bench.user._enter("rd", 0, 1)
            await bench.user._counted(asyncio.sleep(0.09))

    guests = [asyncio.create_task(slow()) for _ in range(5)]
    for _ in guests:
        await asyncio.sleep(0.015)
    async with asyncio.timeout(10):
        await hold(bench)
    stopping = True
    await asyncio.gather(*guests)


async def test_who_waits_may_be_cancelled(bench):
    answered, request = hang(bench)
    holding = asyncio.create_task(hold(bench))
    await asyncio.sleep(0.03)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert not bench.graph.lock.locked()
    await asyncio.wait_for(bench.user.write(0, b"x"), 1)
    answered.set()
    await request
