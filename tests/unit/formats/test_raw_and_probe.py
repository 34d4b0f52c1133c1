"""The raw format and the guessing of formats."""

from __future__ import annotations

from errno import ENOSPC, EPERM

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.probe import probe_format
from liveblockd.formats.raw import Raw, RawOptions
from liveblockd.qapi import parse
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers


async def open_raw(disk: MemoryDriver, **options: object) -> Raw:
    members = {"driver": "raw", "file": "f", **{k.replace("_", "-"): v for k, v in options.items()}}
    return await Raw.open(parse(RawOptions, members), {"file": disk}, Environment(InlineWorkers()))


async def test_raw_is_its_file() -> None:
    disk = MemoryDriver.of(b"0123456789" * 100)
    raw = await open_raw(disk)
    assert raw.length == 1000
    assert raw.read_nowait(5, 5) == b"56789"
    assert raw.write_nowait(0, b"ab")
    await raw.write(2, b"cd")
    assert await raw.read(0, 5) == b"abcd4"
    await raw.write_zeroes(0, 2)
    await raw.discard(2, 1)
    assert await raw.read(0, 5) == b"\0\0\0d4"
    await raw.truncate(2000)
    assert raw.length == disk.length == 2000
    await raw.flush()
    assert disk.synced_content() == disk.content()
    assert (await raw.map(0, 100))[0].host_offset == 0
    assert raw.cluster_size is None


async def test_what_was_written_is_durable_once_it_is_closed() -> None:
    disk = MemoryDriver.of(bytes(1000))
    raw = await open_raw(disk)
    await raw.write(2, b"cd")
    assert disk.synced_content() != disk.content()
    await raw.close()
    assert disk.synced_content() == disk.content()
    await (await open_raw(disk, read_only=True)).close()
    assert disk.flushes == 1, "nobody writes to this one"


async def test_a_window_keeps_within_its_bounds() -> None:
    disk = MemoryDriver.of(bytes(4096))
    raw = await open_raw(disk, offset=1024, size=1024)
    assert raw.length == 1024
    await raw.write(1023, b"x")
    assert disk.content()[2047:2049] == b"x\0"
    assert not raw.write_nowait(1023, b"xy")
    for request in (raw.write(1023, b"xy"), raw.write_zeroes(0, 2000), raw.discard(1024, 1)):
        with pytest.raises(OSError) as caught:
            await request
        assert caught.value.errno == ENOSPC
    assert disk.content()[2048:] == bytes(2048)
    assert (await raw.map(0, 10))[0].length == 10
    with pytest.raises(BlockError, match="Cannot resize fixed-size raw disks"):
        await raw.truncate(4096)
    tail = await open_raw(disk, offset=4000)
    assert tail.length == 96


async def test_windows_that_are_refused() -> None:
    disk = MemoryDriver.of(bytes(4096))
    with pytest.raises(BlockError, match="cannot be greater than size"):
        await open_raw(disk, offset=5000)
    with pytest.raises(BlockError, match="has to be smaller or equal"):
        await open_raw(disk, offset=1024, size=4096)


async def test_a_read_only_raw_image() -> None:
    raw = await open_raw(MemoryDriver.of(bytes(512)), read_only=True)
    assert not raw.write_nowait(0, b"x")
    with pytest.raises(OSError) as caught:
        await raw.write(0, b"x")
    assert caught.value.errno == EPERM


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"QFI\xfb\0\0\0\x03", "qcow2"),
        (b"QFI\xfb\0\0\0\x02", "qcow2"),
        (b"QFI\xfb\0\0\0\x01", "qcow"),
        (b"QED\0", "qed"),
        (b"LUKS\xba\xbe\0\x01", "luks"),
        (b"KDMV", "vmdk"),
        (b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
        (b"WithoutFreeSpace", "parallels"),
        (b"", "raw"),
        (bytes(2048), "raw"),
        (b"# just text\nand more", "raw"),
    ],
)
def test_probing(head: bytes, name: str) -> None:
    assert probe_format(head) == name
    assert probe_format(head.ljust(2048, b"\0")) == name
