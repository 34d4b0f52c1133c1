"""Bitmaps that are added while guests write: no write escapes them."""

import asyncio

from liveblockd.graph import dirty
from liveblockd.storage.driver import Permission
from tests.unit.graph.layer import CLUSTER

WRITER = Permission.CONSISTENT_READ | Permission.WRITE


async def begin(world):
    """A disk with a write of its third cluster in flight."""
    world.image("a", 16 * CLUSTER)
    node = await world.layer("disk", "a")
    user = await world.graph.attach(node, WRITER, Permission.ALL)
    node.driver.gate = asyncio.Event()
    write = asyncio.create_task(user.write(2 * CLUSTER, b"x" * CLUSTER))
    await asyncio.sleep(0.01)
    assert user.in_flight == 1
    return node, user, write


async def test_a_write_in_flight_is_older_than_the_bitmap(world):
    node, user, write = await begin(world)
    adding = asyncio.create_task(dirty.add_between_writes(world.graph, "disk", "b"))
    await asyncio.sleep(0.01)
    # Added now, the bitmap would be clean after a write that a copy made now does not have.
    assert node.find_bitmap("b") is None and not adding.done()
    node.driver.gate.set()
    await asyncio.wait_for(adding, 30)
    assert write.done() and node.find_bitmap("b").count == 0
    await user.write(5 * CLUSTER, b"y")
    assert list(node.find_bitmap("b").runs()) == [(5 * CLUSTER, CLUSTER)]
    await world.graph.detach(user)


async def test_a_cancelled_addition_adds_nothing(world):
    node, user, write = await begin(world)
    adding = asyncio.create_task(dirty.add_between_writes(world.graph, "disk", "b"))
    await asyncio.sleep(0.01)
    adding.cancel()
    await asyncio.wait((adding,), timeout=5)
    assert adding.cancelled() and not node.bitmaps
    node.driver.gate.set()
    await asyncio.wait_for(write, 30)
    await asyncio.wait_for(user.write(0, b"z"), 30)
    await world.graph.detach(user)
