import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.storage.driver import Permission
from liveblockd.storage.filters.blklogwrites import Blklogwrites
from liveblockd.storage.filters.write_log import Entry, EntryFlag, Superblock
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers


async def logging(file, log, **members):
    given = {"driver": "blklogwrites", "file": "x", "log": "y", **members}
    options = parse(BlockdevOptions, {k.replace("_", "-"): v for k, v in given.items()})
    children = {"file": file, "log": log}
    return await Blklogwrites.open(options, children, Environment(InlineWorkers()))


def entries(log, size=512):
    """(entry, its data) of all that the superblock counts."""
    content = log.content()
    superblock = Superblock.unpack(content)
    assert superblock.sector_size == size
    position, found = 1, []
    for number in range(superblock.entries):
        entry = Entry.unpack(content[position * size :], number)
        data = content[(position + 1) * size : (position + entry.log_sectors) * size]
        found.append((entry, data))
        position += entry.log_sectors
    return found


def replay(found, length, size=512):
    disk = bytearray(length)
    for entry, data in found:
        if not entry.flags & EntryFlag.DISCARD:
            disk[entry.sector * size :][: len(data)] = data
            disk[entry.sector * size : entry.sector * size + len(data)] = data
    return bytes(disk[:length])


async def test_the_log_replays_the_disk():
    file, log = MemoryDriver.of(bytes(8192)), MemoryDriver(0)
    disk = await logging(file, log)
    assert not disk.write_nowait(0, b"x" * 512) and disk.host_file() is None
    await disk.write(1024, b"a" * 1024)
    await disk.write(1030, b"b" * 3)  # a part of a sector
    await disk.write_zeroes(1536, 512)
    await disk.write_zeroes(100, 1000)  # parts at both ends
    await disk.discard(4000, 1000)
    await disk.flush()
    found = entries(log)
    assert replay(found, 8192) == file.content()
    assert found[0][0] == Entry(2, 2) and found[1][0] == Entry(2, 1)
    assert found[-2][0] == Entry(8, 1, EntryFlag.DISCARD)
    assert found[-1] == (Entry(0, 0, EntryFlag.FLUSH), b"")
    assert log.flushes == 1 and file.flushes == 1


async def test_a_log_goes_on():
    file, log = MemoryDriver.of(bytes(8192)), MemoryDriver(0)
    disk = await logging(file, log, log_append=True)
    await disk.write(0, b"a" * 512)
    await disk.close()
    disk = await logging(file, log, log_append=True)
    await disk.write(512, b"b" * 512)
    await disk.discard(1024, 512)
    await disk.write(2048, b"c" * 512)
    await disk.close()
    found = entries(log)
    flush = (Entry(0, 0, EntryFlag.FLUSH), b"")
    assert found[1] == found[5] == flush, "each close is one, as in QEMU"
    assert [e.sector for e, _ in found if e != flush[0]] == [0, 1, 2, 4]
    assert replay(found, 8192) == file.content() == file.synced_content()


async def test_sector_size_and_interval():
    file, log = MemoryDriver.of(bytes(16384)), MemoryDriver(0)
    disk = await logging(file, log, log_sector_size=4096, log_super_update_interval=2)
    assert disk.limits()["request-alignment"] == 4096
    for n in range(3):
        await disk.write(n * 4096, b"a" * 100)
    assert len(entries(log, 4096)) == 2
    await disk.close()
    assert replay(entries(log, 4096), 16384, 4096) == file.content()


@pytest.mark.parametrize(
    ("content", "members", "message"),
    [
        (b"", {"log_sector_size": 100}, "Invalid log sector size 100"),
        (b"", {"log_super_update_interval": 0}, "update interval 0"),
        (b"", {"log_append": True, "log_sector_size": 512}, "mutually exclusive"),
        (bytes(512), {"log_append": True}, "Invalid log superblock magic"),
        (b"x", {"log_append": True}, "Could not read log superblock"),
        (Superblock(2, 512).pack(), {"log_append": True}, "Failed to read log entry 0"),
        (
            Superblock(1, 512).pack() + Entry(0, 0, EntryFlag(64)).pack(512),
            {"log_append": True},
            "Invalid flags 0x40 in log entry 0",
        ),
    ],
)
async def test_what_cannot_be(content, members, message):
    with pytest.raises(BlockError, match=message):
        await logging(MemoryDriver(512), MemoryDriver.of(content), **members)


async def test_the_last_sector_may_be_short():
    file, log = MemoryDriver.of(bytes(1000)), MemoryDriver(0)
    disk = await logging(file, log)
    await disk.write(900, b"z" * 100)
    await disk.flush()
    assert file.length == 1000 and replay(entries(log), 1000) == file.content()


def test_permissions_of_the_log():
    options = parse(BlockdevOptions, {"driver": "blklogwrites", "file": "x", "log": "y"})
    used, shared = Blklogwrites.child_permissions(options, "log", Permission.NONE, Permission.ALL)
    assert used == Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
    assert not shared & Permission.WRITE
