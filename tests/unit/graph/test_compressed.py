"""Compressed writes pass a backend like any other write: bounds, quiesce, statistics, bitmaps."""

import asyncio
from errno import EINVAL, ENOSPC, ENOTSUP, EPERM

import pytest

import liveblockd.formats.qcow2.image  # noqa: F401 - registers the driver
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.graph.filter import CopyOnRead
from liveblockd.storage.driver import ExtentKind, Permission
from tests.support.memory import MemoryDriver, fail_once

CLUSTER = 65536
SIZE = 4 * CLUSTER
READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE


async def image(world, **members):
    file = await world.add(driver="memory", node_name="f", size=0)
    await create_qcow2(file.driver, size=SIZE)
    node = await world.add(driver="qcow2", node_name="q", file="f", **members)
    return node, await world.graph.attach(node, READ_WRITE, name="drive0", user="drive0")


async def test_written_compressed_and_counted(world):
    _, user = await image(world)
    await user.write_compressed(CLUSTER, b"ab" * CLUSTER)
    assert [e.kind for e in await user.map(CLUSTER, 2 * CLUSTER)] == [ExtentKind.COMPRESSED]
    assert bytes(await user.read(CLUSTER, 2 * CLUSTER)) == b"ab" * CLUSTER
    statistics = user.statistics
    assert (statistics.wr_operations, statistics.wr_bytes) == (1, 2 * CLUSTER)
    assert statistics.wr_highest_offset == 3 * CLUSTER
    await world.graph.close()


async def test_refused_as_other_writes(world):
    node, user = await image(world)
    reader = await world.graph.attach(node)
    plain = await world.add(driver="memory", node_name="m", size=SIZE)
    other = await world.graph.attach(plain, READ_WRITE)
    for backend, offset, length, errno in (
        (user, 4 * CLUSTER, CLUSTER, ENOSPC),
        (user, 512, CLUSTER, EINVAL),
        (reader, 0, CLUSTER, EPERM),
        (other, 0, CLUSTER, ENOTSUP),
    ):
        with pytest.raises(OSError) as info:
            await backend.write_compressed(offset, bytes(length))
        assert info.value.errno == errno
    assert user.statistics.wr_invalid == 1 and user.statistics.wr_failed == 1
    await world.graph.close()


async def test_dirties_bitmaps_even_when_it_fails(world):
    node, user = await image(world)
    bitmap = DirtyBitmap(SIZE, CLUSTER, name="b")
    node.add_bitmap(bitmap)
    await user.write_compressed(0, b"a" * CLUSTER)
    assert bitmap.count == 1
    file = node.file.driver
    assert isinstance(file, MemoryDriver)
    file.hook = fail_once("write", ENOSPC)
    with pytest.raises(OSError):
        await user.write_compressed(2 * CLUSTER, b"a" * CLUSTER)
    assert bitmap.count == 2
    await world.graph.close()


async def test_waits_while_quiesced(world):
    node, user = await image(world)
    async with world.graph.drained(node):
        task = asyncio.create_task(user.write_compressed(0, b"a" * CLUSTER))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not task.done() and user.in_flight == 0
        assert [e.kind for e in await node.map(0, SIZE)] == [ExtentKind.UNALLOCATED]
    await task
    assert bytes(await user.read(0, CLUSTER)) == b"a" * CLUSTER
    await world.graph.close()


async def test_through_a_filter(world):
    node, user = await image(world)
    await CopyOnRead(user, read_only=False).write_compressed(0, b"a" * CLUSTER)
    assert [e.kind for e in await node.map(0, CLUSTER)] == [ExtentKind.COMPRESSED]
    await world.graph.close()
