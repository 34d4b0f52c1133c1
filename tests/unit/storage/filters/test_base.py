from errno import ENOTSUP

import pytest

from liveblockd.storage.driver import BlockDriver
from liveblockd.storage.filters.base import FilterDriver
from tests.support.memory import MemoryDriver


def over(image):
    return FilterDriver({"file": image}, read_only=False)


async def test_everything_is_handed_on():
    image = MemoryDriver.of(b"a" * 8192)
    disk = over(image)
    assert disk.write_nowait(0, b"b") == image.write_nowait(0, b"b")
    await disk.write(1, b"c")
    await disk.write_zeroes(2, 2)
    await disk.discard(4096, 4096)
    await disk.flush()
    assert bytes(await disk.read(0, 4)) == image.content()[:4] == b"bc\0\0"
    assert image.flushes == 1 and disk.length == 8192
    assert await disk.map(0, 8192) == await image.map(0, 8192)
    await disk.truncate(512)
    assert image.length == disk.length == 512
    assert disk.limits() == image.limits() and disk.driver_below is image


async def test_the_child_is_looked_up_for_every_request():
    disk = over(MemoryDriver.of(b"a" * 512))
    disk.children["file"] = MemoryDriver.of(b"b" * 1024)
    assert bytes(await disk.read(0, 1)) == b"b" and disk.length == 1024


async def test_compressed_writes_where_the_child_has_none():
    disk = over(MemoryDriver.of(bytes(512)))
    with pytest.raises(OSError) as caught:
        await disk.write_compressed(0, bytes(512))
    assert caught.value.errno == ENOTSUP


def test_a_map_has_to_ask_it():
    disk = over(MemoryDriver.of(bytes(512)))
    assert isinstance(disk, BlockDriver) and disk.cell_unit is None and disk.layer()[1] is disk
