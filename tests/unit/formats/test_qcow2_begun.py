"""Guest writes without a coroutine: that they are taken, and leave what the coroutine leaves."""

import asyncio
import random
from errno import EIO

import pytest

from tests.support.begun import begin, write_as_export
from tests.support.memory import Gate, MemoryDriver, fail_once
from tests.support.qcow2_images import check, needs, new_qcow2, open_qcow2

K = 1024
CLUSTER = 64 * K
SIZE = 40 * CLUSTER - 512  # the last cluster reaches past the end


async def turns():
    for _ in range(20):
        await asyncio.sleep(0)


class Counted:
    """``waited`` counts the writes of an image that take a coroutine."""

    def __init__(self, image):
        self.image = image
        self.waited = 0
        self._write = image._writer.write
        image._writer.write = self._waits

    async def _waits(self, offset, data):
        self.waited += 1
        await self._write(offset, data)


async def image_over(backing_bytes=None, *, begins=True, nowait=True, **options):
    disk = MemoryDriver()
    await new_qcow2(disk, size=SIZE, **options)
    disk.begins = begins
    backing = None if backing_bytes is None else MemoryDriver.of(backing_bytes)
    image = await open_qcow2(disk, backing)
    await image.write(0, b"\1" * CLUSTER)  # the L2 table is there
    disk.nowait = nowait
    return image, disk


@pytest.mark.parametrize("nowait", [True, False])
async def test_a_write_in_place_is_begun(nowait):
    image, _ = await image_over(nowait=nowait)
    counted = Counted(image)
    assert await write_as_export(image, 100, b"x" * 1000) == ("now" if nowait else "begun")
    assert counted.waited == 0
    assert bytes(await image.read(99, 1002)) == b"\1" + b"x" * 1000 + b"\1"
    await image.close()


@pytest.mark.parametrize("nowait", [True, False])
@pytest.mark.parametrize("length", [None, 7 * CLUSTER + 1000, SIZE])
async def test_the_first_write_to_a_cluster_needs_no_coroutine(nowait, length):
    old = None if length is None else random.Random(1).randbytes(length)
    image, disk = await image_over(old, nowait=nowait)
    counted = Counted(image)
    model = bytearray((old or b"").ljust(SIZE, b"\0"))
    model[:CLUSTER] = b"\1" * CLUSTER
    assert not image.write_nowait(5 * CLUSTER + 10, b"no cluster")
    places = [(5 * CLUSTER + 10, 3000), (9 * CLUSTER, CLUSTER), (39 * CLUSTER, 512), (CLUSTER, 1)]
    for number, (offset, size) in enumerate(places, 2):
        data = bytes([number]) * size
        assert await write_as_export(image, offset, data) == "begun"
        model[offset : offset + size] = data
    assert counted.waited == 0
    assert disk.begun == (0 if nowait else len(places))
    assert bytes(await image.read(0, SIZE)) == model
    await image.close()
    again = await open_qcow2(disk, None if old is None else MemoryDriver.of(old))
    assert bytes(await again.read(0, SIZE)) == model
    await again.close()


@pytest.mark.parametrize("nowait", [True, False])
async def test_the_first_write_needs_none_of_the_tables_of_a_backing_image(nowait):
    below = MemoryDriver()
    await new_qcow2(below, size=SIZE)
    base = await open_qcow2(below)
    await base.write(2 * CLUSTER, b"\7" * 3 * CLUSTER)
    await base.close()
    base = await open_qcow2(below, read_only=True)
    disk = MemoryDriver()
    await new_qcow2(disk, size=SIZE)
    disk.begins = True
    image = await open_qcow2(disk, base)
    await image.write(0, b"\1")  # the L2 table is there, and the flat map has the span
    disk.nowait = nowait
    assert not base._metadata.tables
    counted = Counted(image)
    disk.log.clear()
    assert await write_as_export(image, 3 * CLUSTER + 512, b"x" * 512) == "begun"
    assert await write_as_export(image, 8 * CLUSTER + 512, b"y" * 512) == "begun"  # zeros below
    assert counted.waited == 0
    assert not base._metadata.tables
    assert [r.length for r in disk.log if r.operation == "write"] == [CLUSTER, 512]
    model = bytearray(SIZE)
    model[2 * CLUSTER : 5 * CLUSTER] = b"\7" * 3 * CLUSTER
    model[0] = 1
    model[3 * CLUSTER + 512 : 3 * CLUSTER + 1024] = b"x" * 512
    model[8 * CLUSTER + 512 : 8 * CLUSTER + 1024] = b"y" * 512
    assert bytes(await image.read(0, SIZE)) == model
    await image.close()
    await base.close()


async def test_nothing_is_written_around_the_first_data_of_a_fresh_cluster():
    image, disk = await image_over(nowait=False)
    disk.log.clear()
    assert await begin(image, 3 * CLUSTER + 4096, b"x" * 512)
    assert [r.length for r in disk.log if r.operation == "write"] == [512]
    await image.close()


async def test_what_cannot_be_begun_is_refused_and_changes_nothing():
    image, _ = await image_over(bytes(7 * CLUSTER + 1000))
    refused = [
        (2 * CLUSTER - 10, 20),  # two clusters
        (7 * CLUSTER, 10),  # the backing file ends within the cluster
        (0, 0),
    ]
    for offset, length in refused:
        assert not await begin(image, offset, b"x" * length)
    image.children["backing"].nowait = False
    assert not await begin(image, 2 * CLUSTER, b"x"), "what is below is not at hand"
    await image.close()


async def test_two_writes_to_one_new_cluster_keep_both():
    image, disk = await image_over(b"\7" * SIZE, nowait=False)
    gate = disk.hook = Gate("write")
    first = asyncio.create_task(begin(image, 2 * CLUSTER, b"a" * 512))
    await turns()
    assert gate.waiting == 1
    assert not await begin(image, 2 * CLUSTER + 512, b"b" * 512), "claimed"
    second = asyncio.create_task(image.write(2 * CLUSTER + 512, b"b" * 512))
    erased = asyncio.create_task(image.discard(2 * CLUSTER, CLUSTER))
    assert bytes(await image.read(2 * CLUSTER, 4)) == b"\7" * 4, "not published"
    gate.open()
    assert await first
    await second
    await erased
    data = bytes(await image.read(2 * CLUSTER, CLUSTER))
    assert data in (
        bytes(CLUSTER), bytes(512) + b"b" * 512 + bytes(CLUSTER - 1024)
    )  # fmt: skip
    await image.close()


@pytest.mark.parametrize("offset", [100, 3 * CLUSTER])
async def test_an_error_is_told_and_leaves_the_entries(offset):
    image, disk = await image_over(b"\7" * SIZE, nowait=False)
    old = bytes(await image.read(0, SIZE))
    disk.hook = fail_once("write", EIO)
    with pytest.raises(OSError, match="injected"):
        await begin(image, offset, b"x" * 10)
    assert bytes(await image.read(0, SIZE)) == old
    assert await begin(image, offset, b"x" * 10)
    await image.close()
    assert disk.closed is False and not image._begun and not len(image._claims)


async def test_close_waits_for_what_was_begun():
    image, disk = await image_over(nowait=False)
    gate = disk.hook = Gate("write")
    ended = []
    assert image.begin_write(100, b"x" * 10, ended.append)
    assert image.begin_write(5 * CLUSTER, b"y" * 10, ended.append)
    closing = asyncio.create_task(image.close())
    await turns()
    assert not closing.done() and not ended
    gate.open()
    await closing
    assert ended == [None, None]
    again = await open_qcow2(disk)
    assert bytes(await again.read(100, 10)) == b"x" * 10
    assert bytes(await again.read(5 * CLUSTER, 10)) == b"y" * 10
    await again.close()


async def test_a_cluster_freed_while_a_write_to_it_is_under_way_is_not_used_again():
    image, disk = await image_over(nowait=False, version=3)
    host = (await image.map(0, 1))[0].host_offset
    gate = Gate("write")
    disk.hook = lambda op, at, n: gate(op, at, n) if at == host + 100 else None
    ended = []
    assert image.begin_write(100, b"x" * 10, ended.append)
    await image.discard(0, CLUSTER)
    await image.flush()
    await image.flush()
    for number in range(1, 20):
        await image.write(number * CLUSTER, b"n" * CLUSTER)
        assert (await image.map(number * CLUSTER, 1))[0].host_offset != host
    gate.open()
    await turns()
    assert ended == [None]
    assert bytes(await image.read(CLUSTER, 19 * CLUSTER)) == b"n" * (19 * CLUSTER)
    await image.close()


@needs("qemu-img")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("begins", [True, False])
async def test_all_ways_leave_the_same_bytes(seed, begins, tmp_path):
    rng = random.Random(seed)
    cluster = rng.choice((512, 4096, 65536))
    old = rng.randbytes(rng.randrange(SIZE))
    disk = MemoryDriver()
    await new_qcow2(disk, size=SIZE, cluster_size=cluster)
    disk.begins = begins
    disk.hook = lambda *_: asyncio.sleep(0) if rng.random() < 0.5 else None
    image = await open_qcow2(disk, MemoryDriver.of(old))
    model = bytearray(old.ljust(SIZE, b"\0"))
    ways = set()

    async def one(offset, data):
        ways.add(await write_as_export(image, offset, data))

    for _ in range(60):
        tasks, taken = [], set()
        for _ in range(12):
            length = rng.randrange(1, 2 * cluster)
            offset = rng.randrange(SIZE - length)
            blocks = set(range(offset // 512, (offset + length) // 512 + 1))
            if blocks & taken:
                continue
            taken |= blocks
            data = rng.randbytes(length)
            model[offset : offset + length] = data
            tasks.append(asyncio.create_task(one(offset, data)))
        if rng.random() < 0.3:
            tasks.append(asyncio.create_task(image.flush()))
        await asyncio.gather(*tasks)
    assert bytes(await image.read(0, SIZE)) == model
    assert begins == ("begun" in ways) or not begins
    assert "waited" in ways
    await image.close()
    path = tmp_path / "image"
    path.write_bytes(disk.content())
    assert check(path) == {}


async def test_entries_for_nothing_are_published_without_looking_at_what_is_freed(monkeypatch):
    image, _ = await image_over()
    metadata, told = image._metadata, []
    metadata.on_remap = lambda offset, length: told.append((offset, length))
    looked = []
    publish = metadata.publish
    monkeypatch.setattr(metadata, "publish", lambda *args: looked.append(args) or publish(*args))
    table = await metadata.writable(0)
    table.dirty.clear()
    host_offset, count, _ = await metadata.allocate(5)
    metadata.publish_run(table, 3, host_offset, count)
    quick = table.entries[3:8].tolist()
    assert not looked
    assert told == [(3 * CLUSTER, 5 * CLUSTER)]
    assert (table.dirty.low, table.dirty.high) == (3, 8)
    assert metadata.dirty_tables[0] is table
    table.entries[3:8] = 0
    table.entries[7] = 1  # a zero cluster: somebody's
    metadata.publish_run(table, 3, host_offset, count)
    assert len(looked) == 1
    assert table.entries[3:8].tolist() == quick
    await image.close()
