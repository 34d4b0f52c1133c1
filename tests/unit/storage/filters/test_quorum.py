import asyncio
from errno import EIO, ENOSPC, ENOTSUP

import pytest

from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.qapi import parse
from liveblockd.storage.driver import ExtentKind, Permission
from liveblockd.storage.filters.quorum import Quorum
from liveblockd.storage.filters.replicas import first_difference
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers


class World:
    def __init__(self):
        self.events = []
        self.publisher = Publisher()
        self.publisher.subscribe(lambda e: self.events.append((e.name, e.data())))

    async def open(self, *images, threshold=2, **members):
        options = parse(
            BlockdevOptions,
            {
                "driver": "quorum",
                "children": ["x"] * len(images),
                "vote-threshold": threshold,
                **{k.replace("_", "-"): v for k, v in members.items()},
            },
        )
        children = dict(
            zip([role for role, _ in Quorum.child_references(options)], images, strict=True)
        )
        environment = Environment(InlineWorkers(), publisher=self.publisher, node_name="q")
        return await Quorum.open(options, children, environment)


@pytest.fixture
def world():
    return World()


def image(byte=b"a", length=2048):
    return MemoryDriver.of(byte * length)


def failing(operation, errno=EIO):
    def hook(what, offset, length):
        del offset, length
        if what == operation:
            raise OSError(errno, "broken")

    disk = image()
    disk.hook = hook
    return disk


def bad(number, kind="read", error=None, count=1, first=0):
    data = {"type": kind, "node-name": f"children.{number}", "sector-num": first}
    data |= {"sectors-count": count} | ({"error": error} if error else {})
    return "QUORUM_REPORT_BAD", data


FAILURE = ("QUORUM_FAILURE", {"reference": "q", "sector-num": 0, "sectors-count": 1})


async def fails(coroutine):
    with pytest.raises(OSError) as caught:
        await coroutine
    return caught.value.errno


async def test_all_agree(world):
    images = [image() for _ in range(3)]
    disk = await world.open(*images)
    await disk.write(512, b"new")
    assert all(i.content()[511:516] == b"anewa" for i in images)
    assert bytes(disk.read_nowait(512, 3)) == b"new" == bytes(await disk.read(512, 3))
    await disk.write_zeroes(0, 512)
    await disk.flush()
    assert [i.flushes for i in images] == [1, 1, 1] and not world.events
    assert not disk.is_filter and disk.length == 2048 and disk.host_file() is None


async def test_most_are_right(world):
    images = [image(), image(b"x"), image()]
    disk = await world.open(*images)
    assert disk.read_nowait(0, 100) is None
    assert bytes(await disk.read(0, 100)) == b"a" * 100
    assert world.events == [bad(1)] and images[1].content()[:1] == b"x"


async def test_the_others_are_put_right(world):
    images = [image(), image(b"x"), image()]
    disk = await world.open(*images, rewrite_corrupted=True)
    await disk.read(0, 512)
    assert images[1].content() == b"a" * 512 + b"x" * 1536
    assert world.events == [bad(1)]
    assert bytes(disk.read_nowait(0, 512)) == b"a" * 512


async def test_no_majority(world):
    disk = await world.open(image(b"1"), image(b"2"), image(b"3"))
    assert await fails(disk.read(0, 512)) == EIO
    assert world.events == [FAILURE]


async def test_of_equal_numbers_the_last(world):
    disk = await world.open(image(b"1"), image(b"2"), threshold=1)
    assert bytes(await disk.read(0, 1)) == b"2"


async def test_errors_below_the_threshold(world):
    disk = await world.open(image(), failing("read"), image())
    assert bytes(await disk.read(0, 512)) == b"a" * 512
    assert world.events == [bad(1, error="broken")]
    disk = await world.open(image(), failing("read", ENOSPC), failing("read", ENOSPC))
    world.events.clear()
    assert await fails(disk.read(0, 512)) == ENOSPC
    assert world.events == [bad(1, error="broken"), bad(2, error="broken"), FAILURE]


async def test_failed_writes_and_flushes(world):
    disk = await world.open(image(), failing("write"), image())
    await disk.write(0, bytes(512))
    assert world.events == [bad(1, "write", "broken")]
    disk = await world.open(image(), failing("write"), failing("write"))
    assert await fails(disk.write(0, bytes(512))) == EIO
    world.events.clear()
    disk = await world.open(image(), failing("flush"), failing("flush"))
    assert await fails(disk.flush()) == EIO
    assert world.events == [bad(n, "flush", "broken", 0) for n in (1, 2)]
    disk = await world.open(image(), failing("write_zeroes", ENOTSUP))
    world.events.clear()
    assert await fails(disk.write_zeroes(0, 512, fast_only=True)) == ENOTSUP and not world.events


async def test_first_in_first_out(world):
    images = [failing("read"), image(b"2"), image(b"3")]
    disk = await world.open(*images, read_pattern="fifo", rewrite_corrupted=True)
    images[0].nowait = False
    assert bytes(await disk.read(0, 1)) == b"2"
    assert world.events == [bad(0, error="broken")]


async def test_verify(world, caplog):
    disk = await world.open(image(), image(), blkverify=True)
    disk.children["children.1"].write_nowait(700, b"x")
    assert bytes(await disk.read(0, 512)) == b"a" * 512
    assert await fails(disk.read(512, 512)) == EIO
    assert "offset=512 bytes=512 contents mismatch at offset 700" in caplog.text


async def test_a_write_under_way_is_no_difference(world):
    images = [image() for _ in range(3)]
    disk = await world.open(*images, rewrite_corrupted=True)
    gate = asyncio.Event()
    write = images[1].write

    async def late(offset, data):
        await gate.wait()
        await write(offset, data)

    images[1].write = images[2].write = late
    writing = asyncio.ensure_future(disk.write(0, b"b" * 512))
    await asyncio.sleep(0)
    images[2].write = write
    reading = asyncio.ensure_future(disk.read(0, 512))
    await asyncio.sleep(0.01)
    assert not reading.done()
    gate.set()
    await writing
    assert bytes(await reading) == (await images[0].read(0, 512))
    assert images[0].content()[:512] == images[1].content()[:512] == b"b" * 512


async def test_map(world):
    zeros, data = MemoryDriver(8192), MemoryDriver(8192)
    await data.write(4096, b"x")
    disk = await world.open(zeros, data)
    found = await disk.map(0, 8192)
    assert found[0].length >= 1 and sum(e.length for e in found) <= 8192
    assert all(e.kind in (ExtentKind.ZERO, ExtentKind.COMPRESSED) for e in found)


@pytest.mark.parametrize(
    ("count", "members", "message"),
    [
        (0, {}, "Number of provided children must be 1 or more"),
        (2, {"threshold": 0}, "Parameter 'vote-threshold' expects a value >= 1"),
        (2, {"threshold": 3}, "threshold may not exceed children count"),
        (3, {"blkverify": True}, "exactly two files"),
        (2, {"blkverify": True, "rewrite_corrupted": True}, "cannot be used with blkverify=on"),
    ],
)
async def test_options(world, count, members, message):
    with pytest.raises(BlockError, match=message):
        await world.open(*(image() for _ in range(count)), **members)


async def test_lengths(world):
    with pytest.raises(BlockError, match="Could not refresh total sector count"):
        await world.open(image(), image(length=512))


async def test_children_come_and_go(world):
    disk = await world.open(image(), image(), threshold=2)
    with pytest.raises(BlockError, match="cannot be lower than the vote threshold 2"):
        disk.check_remove_child("children.0")
    assert disk.new_child_role(image()) == "children.2"
    with pytest.raises(BlockError, match="cannot be added"):
        disk.new_child_role(image(length=512))
    verify = await world.open(image(), image(), blkverify=True)
    with pytest.raises(BlockError, match="blkverify mode"):
        verify.new_child_role(image())


def test_permissions():
    def of(**members):
        given = {"driver": "quorum", "children": ["x"], "vote-threshold": 1, **members}
        options = parse(BlockdevOptions, given)
        return Quorum.child_permissions(options, "children.0", Permission.NONE, Permission.ALL)

    readers = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
    assert of() == (Permission.NONE, readers)
    assert of(**{"rewrite-corrupted": True}) == (Permission.WRITE, readers)
    assert of(**{"rewrite-corrupted": True, "read-pattern": "fifo"}) == (Permission.NONE, readers)


def test_first_difference():
    for at in (0, 1, 7, 99):
        other = bytearray(100)
        other[at] = 1
        other[99] = 1
        assert first_difference(bytes(100), bytes(other)) == at
