from errno import EIO, ENOSPC

import pytest

from liveblockd.storage.driver import Permission
from liveblockd.storage.filters.blkverify import Blkverify
from tests.support.memory import MemoryDriver


def pair():
    test, raw = MemoryDriver.of(b"a" * 2048), MemoryDriver.of(b"a" * 2048)
    return test, raw, Blkverify({"raw": raw, "test": test}, read_only=False)


async def fails(coroutine):
    with pytest.raises(OSError) as caught:
        await coroutine
    return caught.value.errno


async def test_both_are_written_and_compared():
    test, raw, disk = pair()
    await disk.write(100, b"new")
    await disk.write_zeroes(512, 512)
    await disk.discard(0, 512)
    await disk.flush()
    assert test.content() == raw.content() and raw.content()[99:104] == b"anewa"
    assert bytes(disk.read_nowait(0, 2048)) == raw.content() == bytes(await disk.read(0, 2048))
    assert disk.child is raw and disk.is_filter and disk.host_file() is None
    assert not disk.write_nowait(0, b"x")


async def test_a_difference(caplog):
    test, _, disk = pair()
    test.write_nowait(700, b"x")
    assert disk.read_nowait(512, 512) is None
    assert await fails(disk.read(512, 512)) == EIO
    assert "blkverify: read offset=512 bytes=512 contents mismatch at offset 700" in caplog.text


async def test_errors(caplog):
    test, raw, disk = pair()

    def hook(what, offset, length):
        del what, offset, length
        raise OSError(ENOSPC, "full")

    test.hook = hook
    assert await fails(disk.write(0, b"x")) == EIO
    assert "return value mismatch -28 != 0" in caplog.text
    raw.hook = hook
    assert await fails(disk.write(0, b"x")) == ENOSPC


def test_permissions():
    needs = Permission.CONSISTENT_READ | Permission.WRITE
    of = Blkverify.child_permissions
    assert of(None, "raw", needs, Permission.ALL) == (needs, Permission.ALL)
    assert of(None, "test", needs, Permission.ALL) == (
        needs | Permission.RESIZE, Permission.ALL & ~Permission.RESIZE
    )  # fmt: skip
