import asyncio
import struct
from errno import EIO, ENOENT, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.storage import blkdebug_events
from liveblockd.storage.blkdebug import Blkdebug
from liveblockd.storage.blkdebug_rules import parse_config
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers


async def debug(image, **members):
    options = parse(BlockdevOptions, {"driver": "blkdebug", "image": "x", **members})
    return await Blkdebug.open(options, {"image": image}, Environment(InlineWorkers()))


def rule(event, **members):
    return {"event": event, **members}


async def fails(coroutine):
    try:
        await coroutine
    except OSError as error:
        return error.errno
    return 0


async def test_without_rules_it_is_not_there():
    image = MemoryDriver.of(b"a" * 8192)
    disk = await debug(image)
    assert disk.read_nowait(0, 4) == b"aaaa"
    assert disk.write_nowait(0, b"b")
    await disk.write(1, b"c")
    assert bytes(await disk.read(0, 4)) == b"bcaa"
    assert disk.length == 8192 and disk.is_filter


async def test_once_and_errno_and_nowait():
    disk = await debug(
        MemoryDriver.of(b"a" * 8192), **{"inject-error": [rule("read_aio", errno=28, once=True)]}
    )
    assert disk.read_nowait(0, 4) is None and disk.host_file() is None
    assert await fails(disk.write(0, b"x")) == 0
    assert await fails(disk.read(0, 4)) == ENOSPC
    assert await fails(disk.read(0, 4)) == 0
    assert disk.read_nowait(0, 4) is not None


async def test_jobs_cannot_pass_the_rules_by():
    image = MemoryDriver.of(bytes(512))
    image.host_file = lambda: "descriptor"
    assert (await debug(image)).host_file() == "descriptor"
    disk = await debug(image, **{"inject-error": [rule("read_aio", once=True)]})
    assert disk.host_file() is None
    assert await fails(disk.read(0, 1)) == EIO
    assert disk.host_file() == "descriptor"


async def test_sector_and_iotype():
    disk = await debug(
        MemoryDriver.of(bytes(1 << 16)),
        **{"inject-error": [rule("none", sector=9, iotype="write")]},
    )
    assert await fails(disk.read(4608, 512)) == 0
    assert await fails(disk.write(4096, bytes(512))) == 0
    assert await fails(disk.write(5120, bytes(512))) == 0
    assert await fails(disk.write(4096, bytes(513))) == EIO
    assert await fails(disk.write(4608, bytes(1))) == EIO  # stays: not once


async def test_flush_and_zeroes():
    image = MemoryDriver.of(b"a" * 8192)
    disk = await debug(
        image,
        **{
            "inject-error": [
                rule("flush_to_disk", once=True, iotype="flush"),
                rule("pwritev_zero", once=True, iotype="write-zeroes"),
            ]
        },
    )
    assert await fails(disk.flush()) == 0  # nothing was written
    assert await fails(disk.write_zeroes(0, 512)) == EIO
    assert await fails(disk.flush()) == EIO
    assert image.content() == b"a" * 8192 and image.flushes == 1
    assert await fails(disk.flush()) == 0
    assert image.flushes == 2


async def test_states():
    disk = await debug(
        MemoryDriver.of(bytes(8192)),
        **{
            "set-state": [rule("write_aio", state=1, new_state=2)],
            "inject-error": [rule("read_aio", state=2, once=True)],
        },
    )
    assert await fails(disk.read(0, 1)) == 0
    assert await fails(disk.write(0, b"x")) == 0
    assert await fails(disk.read(0, 1)) == EIO


def qcow2_image():
    """Header, refcount table at 64k, refcount block 128k, L1 192k, L2 256k, data 320k."""
    cluster = 1 << 16
    image = bytearray(6 * cluster)
    struct.pack_into(
        ">4sIQIIQIIQQIIQ", image, 0, b"QFI\xfb", 3, 0, 0, 16, 1 << 20, 0, 1,
        3 * cluster, cluster, 1, 0, 0,
    )  # fmt: skip
    struct.pack_into(">Q", image, cluster, 2 * cluster)
    struct.pack_into(">Q", image, 3 * cluster, (4 * cluster) | 1 << 63)
    return bytes(image)


@pytest.mark.parametrize(
    ("offset", "write", "event"),
    [
        (0, False, None),
        (1 << 16, False, "reftable_load"),
        (2 << 16, False, "refblock_load"),
        (2 << 16, True, "refblock_update_part"),
        (3 << 16, True, "l1_update"),
        (4 << 16, False, "l2_load"),
        (4 << 16, True, "l2_update"),
        (5 << 16, False, "read_aio"),
        (5 << 16, True, "write_aio"),
    ],
)
def test_tables_are_told_from_data(offset, write, event):
    image = qcow2_image()
    found = blkdebug_events.regions(lambda at, n: image[at : at + n])
    events = blkdebug_events.events_of(found, offset, 8, write)
    assert event in events if event else events == ()


@pytest.mark.parametrize("cut", [0, 3, 40, 72, 103, 1 << 16, 200000])
def test_a_damaged_image_is_no_error(cut):
    image = qcow2_image()[:cut] + b"\xff" * 100
    blkdebug_events.regions(lambda at, n: image[at : at + n])


async def test_the_header_is_no_guest_data():
    disk = await debug(
        MemoryDriver.of(qcow2_image()), **{"inject-error": [rule("read_aio", once=True)]}
    )
    assert await fails(disk.read(0, 104)) == 0
    assert await fails(disk.read(4 << 16, 512)) == 0
    assert await fails(disk.read(5 << 16, 512)) == EIO


async def test_config_file(tmp_path):
    path = tmp_path / "rules"
    path.write_text(
        '# two rules\n[inject-error]\nevent = "write_aio"\nerrno = "28"\nonce = "on"\n'
        '[inject-error]\nevent = "read_aio"\nstate = "2"\n'
        '[set-state]\nevent = "write_aio"\nnew_state = "2"\n'
    )
    disk = await debug(MemoryDriver.of(bytes(512)), config=str(path))
    assert await fails(disk.read(0, 1)) == 0
    assert await fails(disk.write(0, b"x")) == ENOSPC
    assert await fails(disk.read(0, 1)) == EIO


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("event = x", "line 1"),
        ("[inject-error]\nnonsense", "line 2"),
        ("[inject-error]\nerrno = 5", "Parameter 'event' is missing"),
        ("[inject-error]\nevent = nope", "Parameter 'event' does not accept value 'nope'"),
        ("[eat]\na = b", "There is no option group 'eat'"),
    ],
)
def test_bad_config(text, message):
    with pytest.raises(BlockError, match=message):
        parse_config(text)


async def test_bad_options(tmp_path):
    with pytest.raises(BlockError, match="Cannot meet constraints with align 1000"):
        await debug(MemoryDriver(0), align=1000)
    with pytest.raises(BlockError, match="Could not read blkdebug config file: No such file"):
        await debug(MemoryDriver(0), config=str(tmp_path / "none"))


# -- breakpoints


async def stands(disk, tag):
    for _ in range(100):
        if disk.is_suspended(tag):
            return True
        await asyncio.sleep(0)
    return False


async def test_a_breakpoint_stops_one_request():
    image = MemoryDriver.of(b"a" * 8192)
    disk = await debug(image)
    disk.suspend("write_aio", "A")
    assert not disk.write_nowait(0, b"b") and disk.host_file() is None
    first = asyncio.ensure_future(disk.write(0, b"b"))
    assert await stands(disk, "A")
    await disk.write(1, b"c")  # the breakpoint is used up
    assert image.content()[:2] == b"ac" and not first.done()
    disk.resume("A")
    await asyncio.wait_for(first, 30)
    assert image.content()[:2] == b"bc" and not disk.is_suspended("A")
    for call in (lambda: disk.resume("A"), lambda: disk.suspend("nothing", "B")):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == ENOENT


async def test_a_breakpoint_is_removed():
    disk = await debug(MemoryDriver.of(bytes(512)))
    disk.suspend("flush_to_disk", "A")
    disk.suspend("flush_to_os", "A")
    waiting = asyncio.ensure_future(disk.flush())
    assert await stands(disk, "A")
    disk.remove_break("A")
    await asyncio.wait_for(waiting, 30)
    with pytest.raises(OSError):
        disk.remove_break("A")
    assert disk.read_nowait(0, 1) is not None


async def test_nobody_waits_for_a_suspended_request():
    disk = await debug(MemoryDriver.of(bytes(512)))
    disk.suspend("read_aio", "A")
    waiting = asyncio.ensure_future(disk.read(0, 1))
    assert await stands(disk, "A")
    disk.drain_begin()
    await asyncio.wait_for(waiting, 30)
    disk.suspend("read_aio", "B")
    waiting = asyncio.ensure_future(disk.read(0, 1))
    assert await stands(disk, "B")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not disk.is_suspended("B")


# -- limits and permissions


async def test_requests_are_cut():
    seen = []
    image = MemoryDriver.of(bytes(range(256)) * 8)
    disk = await debug(
        image, **{"max-transfer": 512, "inject-error": [rule("read_aio", sector=2, iotype="read")]}
    )
    assert bytes(await disk.read(0, 1024)) == image.content()[:1024]
    assert await fails(disk.read(0, 1536)) == EIO
    write = image.write
    image.write = lambda offset, data: (seen.append((offset, len(data))), write(offset, data))[1]
    await disk.write(256, bytes(1100))
    assert seen == [(256, 512), (768, 512), (1280, 76)]
    assert image.content()[256:1356] == bytes(1100)
    assert disk.limits()["max-transfer"] == 512


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"align": 512, "max-transfer": 1000}, "max-transfer 1000"),
        ({"opt-discard": -1}, "opt-discard -1"),
        ({"opt-write-zero": 512, "max-write-zero": 1000}, "max-write-zero 1000"),
    ],
)
async def test_constraints(members, message):
    with pytest.raises(BlockError, match=f"Cannot meet constraints with {message}"):
        await debug(MemoryDriver(0), **members)


def test_permissions_of_the_image():
    members = {"take-child-perms": ["write", "resize"], "unshare-child-perms": ["write-unchanged"]}
    options = parse(BlockdevOptions, {"driver": "blkdebug", "image": "x", **members})
    used, shared = Blkdebug.child_permissions(
        options, "image", Permission.CONSISTENT_READ, Permission.ALL
    )
    assert used == Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
    assert shared == Permission.ALL & ~Permission.WRITE_UNCHANGED
