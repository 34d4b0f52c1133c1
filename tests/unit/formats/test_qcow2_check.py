"""Checks without peers: bounds, crashes in the middle of a repair, dirty images, open images."""

from __future__ import annotations

import random
import time

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.check import MAX_MESSAGES, CheckResult, Fix, References
from liveblockd.formats.qcow2.checking import check_image
from liveblockd.formats.qcow2.layout import Geometry
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2
from tests.support.qcow2_oracle import Oracle

SIZE = 4096


async def written(**options: int) -> MemoryDriver:
    """An image with a few clusters of data."""
    disk = await new_qcow2(size=4 << 20, cluster_size=SIZE, **options)
    image = await open_qcow2(disk)
    for number in range(0, 40, 3):
        await image.write(number * 5000, bytes([number + 1]) * 9000)
    await image.close()
    await disk.flush()
    return disk


def number(disk: MemoryDriver, offset: int) -> int:
    return int.from_bytes(disk.content()[offset : offset + 8], "big")


def put(disk: MemoryDriver, offset: int, value: int, length: int = 8) -> None:
    disk._store(offset, value.to_bytes(length, "big"))


def refblock(disk: MemoryDriver) -> int:
    return number(disk, number(disk, 48))


async def test_sound_image() -> None:
    result = await check_image(await written())
    assert result.clean and result.allocated_clusters and not result.messages


async def test_check_writes_nothing() -> None:
    disk = await written()
    put(disk, refblock(disk) + 10, 7, 2)
    before = disk.content()
    disk.log.clear()
    result = await check_image(disk)
    assert not result.clean
    assert disk.content() == before
    assert {request.operation for request in disk.log} == {"read"}


@pytest.mark.parametrize("seed", range(12))
async def test_random_damage_is_judged_as_by_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    disk = await written()
    tables = [number(disk, 40), refblock(disk)]
    tables += [number(disk, tables[0]) & 0x00FF_FFFF_FFFF_FE00]
    for _ in range(rng.randrange(1, 4)):
        place = rng.choice(tables) + 8 * rng.randrange(20)
        put(disk, place, number(disk, place) ^ 1 << rng.choice((0, 9, 12, 13, 16, 63)))
    oracle = Oracle(disk.content())
    result = await check_image(disk)
    assert (result.corruptions > 0) == bool(oracle.errors), (seed, oracle.errors, result)
    if not oracle.errors:
        inside = [c for c in oracle.leaks if c * SIZE < disk.length]  # as qemu-img counts
        assert result.leaks == len(inside)


@pytest.mark.parametrize("what", ["rebuild", "in place"])
async def test_repair_may_be_cut_anywhere(what: str) -> None:
    """Whatever writes got to the disk, the guest reads the same and a repair completes."""
    disk = await written()
    content = Oracle(disk.content()).read()
    if what == "rebuild":
        put(disk, number(disk, 48), 0)
    else:
        block = refblock(disk)
        for cluster in range(6, 20):
            put(disk, block + 2 * cluster, 2 + cluster % 2, 2)
    damaged = disk.content()
    log: list[tuple[int, bytes]] = []

    class Recorder(MemoryDriver):
        def write_nowait(self, offset, data):  # type: ignore[no-untyped-def]
            return False

        async def write(self, offset, data):  # type: ignore[no-untyped-def]
            log.append((offset, bytes(data)))
            await super().write(offset, data)

    result = await check_image(Recorder.of(damaged), fix=Fix.ALL)
    assert result.corruptions_fixed or result.leaks_fixed
    assert log
    for cut in range(len(log) + 1):
        crashed = MemoryDriver.of(damaged)
        for offset, data in log[:cut]:
            crashed._store(offset, data)
        assert Oracle(crashed.content()).read() == content, cut
        await check_image(crashed, fix=Fix.ALL)
        assert (await check_image(crashed)).clean, cut
        assert Oracle(crashed.content()).read() == content, cut


async def test_new_refcounts_are_durable_before_the_header_names_them() -> None:
    disk = await written()
    put(disk, number(disk, 48), 0)
    seen: list[tuple[str, int]] = []
    disk.nowait = False
    disk.hook = lambda operation, offset, length: seen.append((operation, offset))
    await check_image(disk, fix=Fix.ALL)
    where = [(op, offset) for op, offset in seen if op in ("write", "flush")]
    header = where.index(("write", 0))
    assert header > 1 and where[header - 1][0] == "flush"
    assert where[header + 1][0] == "flush"


async def test_dirty_image_is_repaired_when_it_is_opened_for_writing() -> None:
    disk = await written()
    content = Oracle(disk.content()).read()
    block = refblock(disk)
    for cluster in range(5, 12):
        put(disk, block + 2 * cluster, 0, 2)
    put(disk, 72, 1)
    image = await open_qcow2(disk, read_only=True)
    assert image.dirty_flag()
    disk_before = disk.content()
    await image.close()
    assert disk.content() == disk_before
    image = await open_qcow2(disk)
    assert not image.dirty_flag()
    await image.write(3 << 20, b"x" * 70000)
    await image.close()
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.leaks and not oracle.incompatible
    assert oracle.read()[: 3 << 20] == content[: 3 << 20]


async def test_dirty_image_is_repaired_when_it_becomes_writable() -> None:
    disk = await written()
    put(disk, refblock(disk) + 2 * 6, 0, 2)
    put(disk, 72, 1)
    image = await open_qcow2(disk, read_only=True)
    data = bytes(await image.read(0, 9000))
    await image.set_read_only(False)
    assert not image.dirty_flag()
    assert bytes(await image.read(0, 9000)) == data
    await image.write(100, b"new")
    await image.close()
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.incompatible


async def test_dirty_image_that_cannot_be_repaired_is_refused() -> None:
    disk = await written()
    put(disk, 72, 1)
    disk.hook = refuse_writes
    with pytest.raises(BlockError, match=r"^Could not repair dirty image"):
        await open_qcow2(disk)


def refuse_writes(operation: str, offset: int, length: int) -> None:
    if operation == "write":
        raise OSError(28, "No space left on device")


async def test_open_image_is_checked_with_what_was_written_just_now() -> None:
    disk = await written()
    image = await open_qcow2(disk)
    before = await image.check()
    await image.write(2 << 20, b"y" * 100_000)
    result = await image.check()
    assert result.clean and result.allocated_clusters == before.allocated_clusters + 25
    await image.discard(0, 64 << 10)
    result = await image.check()
    assert result.clean and result.allocated_clusters < before.allocated_clusters + 25
    await image.write(0, b"z")  # it goes on
    await image.close()
    assert (await check_image(disk)).clean


async def test_one_table_named_a_hundred_thousand_times_is_read_once() -> None:
    disk = await new_qcow2(size=1 << 40, cluster_size=65536)
    image = await open_qcow2(disk)
    await image.write(0, b"x" * 65536)
    await image.close()
    l1, size = number(disk, 40), int.from_bytes(disk.content()[36:40], "big")
    entry = number(disk, l1)
    for index in range(size):
        put(disk, l1 + 8 * index, entry)
    disk.log.clear()
    start = time.process_time()
    result = await check_image(disk)
    assert time.process_time() - start < 5
    assert result.corruptions >= 2
    assert len(disk.log) < 50


async def test_messages_are_bounded() -> None:
    result = CheckResult()
    for index in range(3 * MAX_MESSAGES):
        result.corrupt(f"{index}")
    assert len(result.messages) == MAX_MESSAGES and result.suppressed == 2 * MAX_MESSAGES
    assert result.corruptions == 3 * MAX_MESSAGES


def test_references_stop_at_the_largest_refcount() -> None:
    result = CheckResult()
    references = References(Geometry(3, 12, 1), 10 * SIZE, result)  # two bits
    for _ in range(5):
        references.add_range(SIZE, SIZE)
    assert references.of(SIZE) == 3 and result.corruptions == 2


async def test_a_table_is_not_repaired_where_the_header_is() -> None:
    disk = await written()
    put(disk, number(disk, 40) + 8, 1 << 9 | 1 << 63)  # an L2 table within the header cluster
    before = disk.content()[8:72]
    result = await check_image(disk, fix=Fix.ALL)
    assert result.check_errors
    # only the refcount structures may have moved
    assert disk.content()[8:48] == before[:40]
