"""What lets a write go on: no wait where nothing is to keep, no way past a copy or a reader."""

import asyncio

from liveblockd.graph.before_write import BeforeWrite
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.graph.copy_before_write import CopyBeforeWrite

CLUSTER = 65536


class Disk:
    """Answers at once, or when ``gate`` opens."""

    length = 4 * CLUSTER

    def __init__(self):
        self.gate = None
        self.written = []

    def read_nowait(self, offset, length):
        return None if self.gate else b"o" * length

    async def read(self, offset, length):
        await self.gate.wait()
        return b"o" * length

    def write_nowait(self, offset, data):
        self.written.append((offset, len(data)))
        return True

    def begin_write(self, offset, data, done):
        self.written.append((offset, len(data)))
        done(None)
        return True

    async def write(self, offset, data):
        self.written.append((offset, len(data)))


def made():
    todo = DirtyBitmap(Disk.length, CLUSTER)
    todo.set(0, Disk.length)
    source, target = Disk(), Disk()
    return CopyBeforeWrite({"file": source, "target": target}, BeforeWrite(todo)), source, target


async def test_what_does_not_wait_goes_only_where_nothing_is_to_keep():
    cbw, source, target = made()
    assert not cbw.write_nowait(CLUSTER - 1, b"xy")
    assert not cbw.begin_write(CLUSTER - 1, b"xy", lambda error: None)
    assert not source.written
    await cbw.write(CLUSTER - 1, b"xy")
    assert target.written == [(0, 2 * CLUSTER)]
    assert cbw.write_nowait(0, b"x")
    assert cbw.begin_write(CLUSTER, b"x", lambda error: None)
    assert not cbw.begin_write(2 * CLUSTER, b"x", lambda error: None)
    assert len(target.written) == 1
    assert cbw.host_file() is None


async def test_nobody_writes_where_the_past_is_being_read():
    cbw, source, target = made()
    source.gate = asyncio.Event()
    reader = asyncio.create_task(cbw.read_snapshot(0, 512))
    await asyncio.sleep(0)
    cbw.core.done(0, CLUSTER)  # somebody has copied it meanwhile
    assert not cbw.write_nowait(0, b"x")
    assert not cbw.begin_write(0, b"x", lambda error: None)
    writer = asyncio.create_task(cbw.write(0, b"x"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not writer.done()
    assert not source.written
    source.gate.set()
    assert await reader == b"o" * 512
    await writer
    assert source.written == [(0, 1)]
    assert not target.written


async def test_nobody_writes_where_a_job_copies_and_it_leaves_out_nothing_of_others():
    cbw, source, _ = made()
    core = cbw.core
    async with core.claim(0, 2 * CLUSTER) as runs:
        assert runs == [(0, 2 * CLUSTER)]
        core.done(0, CLUSTER)
        assert not cbw.write_nowait(0, b"x")
        assert core.skip(CLUSTER, 4 * CLUSTER) == 2 * CLUSTER
        assert list(core.todo.runs()) == [(CLUSTER, CLUSTER)]
    assert cbw.write_nowait(0, b"x")
    assert not cbw.write_nowait(CLUSTER, b"x")
    assert len(source.written) == 1
