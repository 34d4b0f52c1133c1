import asyncio
import time
from errno import EIO, EPERM

import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.storage.driver import Extent, ExtentKind
from liveblockd.storage.null import NullAio, NullCo, NullOptions
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.memory import Gate, MemoryDriver, fail_once
from tests.support.workers import InlineWorkers


async def open_null(cls=NullCo, **members):
    options = parse(BlockdevOptions, {"driver": cls.driver_name, **members})
    return await cls.open(options, {}, Environment(InlineWorkers()))


async def test_null_forgets():
    disk = await open_null(size=8192)
    await disk.write(0, b"x" * 512)
    assert disk.write_nowait(0, b"x")
    assert await disk.read(0, 512) == bytes(512) == disk.read_nowait(0, 512)
    assert disk.length == 8192 and disk.actual_size() == 0
    assert await disk.map(0, 512) == [Extent(512, ExtentKind.DATA, 0)]
    zeroes = await open_null(NullAio, **{"read-zeroes": True})
    assert await zeroes.map(0, 512) == [Extent(512, ExtentKind.ZERO)]
    assert zeroes.length == 1 << 30


async def test_null_latency_and_read_only():
    disk = await open_null(**{"latency-ns": 20_000_000, "read-only": True})
    assert disk.read_nowait(0, 1) is None
    before = time.monotonic()
    await disk.read(0, 1)
    assert time.monotonic() - before >= 0.019
    assert not disk.write_nowait(0, b"x")
    with pytest.raises(OSError) as caught:
        await disk.write(0, b"x")
    assert caught.value.errno == EPERM


async def test_null_refuses_a_negative_size():
    with pytest.raises(BlockError):
        await NullCo.open(NullOptions(driver="null-co", size=-1), {}, Environment(InlineWorkers()))


async def test_memory_keeps_and_syncs():
    disk = MemoryDriver(10000)
    await disk.write(4000, b"abc" * 100)
    assert bytes(await disk.read(3999, 5)) == b"\0abca"
    assert disk.synced_content() == bytes(10000)
    await disk.flush()
    assert disk.synced_content() == disk.content()
    await disk.write(11000, b"z")
    assert disk.length == 11001
    await disk.write_zeroes(4000, 300)
    assert disk.content() == bytes(11000) + b"z"
    await disk.truncate(5)
    await disk.truncate(10)
    assert disk.content() == bytes(10)


async def test_memory_faults():
    disk = MemoryDriver.of(b"data" * 2048)
    disk.hook = fail_once("read", EIO, offset=5000)
    assert bytes(await disk.read(0, 4)) == b"data"
    with pytest.raises(OSError) as caught:
        disk.read_nowait(4096, 4096)
    assert caught.value.errno == EIO
    assert disk.read_nowait(4096, 4) == b"data"
    gate = disk.hook = Gate("write")
    assert not disk.write_nowait(0, b"x")
    task = asyncio.create_task(disk.write(0, b"x"))
    await asyncio.sleep(0)
    assert gate.waiting == 1 and not task.done()
    gate.open()
    await task
    assert disk.content()[:2] == b"xa"
