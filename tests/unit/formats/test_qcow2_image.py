"""The qcow2 driver on disks in memory: one rule, one test."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import Awaitable, Callable
from errno import EIO, ENOSPC, ENOTSUP, EPERM

import pytest

from liveblockd.errors import BlockError
from liveblockd.events import BlockImageCorrupted, Event, Publisher
from liveblockd.storage.driver import ExtentKind
from tests.support.memory import Gate, MemoryDriver, fail_once
from tests.support.qcow2_images import new_qcow2, open_qcow2
from tests.support.qcow2_oracle import Oracle
from tests.unit.formats.test_qcow2_concurrency import LateDisk, cut

K = 1024
CLUSTER = 64 * K


def sound(disk: MemoryDriver, *, leaks: bool = False) -> Oracle:
    oracle = Oracle(disk.content())
    assert not oracle.errors, oracle.errors[:5]
    assert leaks or not oracle.leaks, oracle.leaks[:5]
    return oracle


def patch(disk: MemoryDriver, offset: int, data: bytes) -> None:
    disk._store(offset, data)


async def written(size: int = 1024 * K, **options: object) -> MemoryDriver:
    """An image whose first 256 KiB are b"a"."""
    disk = await new_qcow2(size=size, **options)
    image = await open_qcow2(disk)
    await image.write(0, b"a" * (256 * K))
    await image.close()
    return disk


async def turns(count: int = 50) -> None:
    """Let everybody else go on."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that must come."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it did not come")


# -- claims, populate and guest writes


async def test_guest_write_does_not_wait_for_a_populate() -> None:
    disk = await new_qcow2(size=1024 * K, backing_file="b")
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * (1024 * K)))
    gate = Gate("write")
    disk.nowait = False
    disk.hook = lambda op, at, n: gate(op, at, n) if n == 4 * CLUSTER else None
    copy = asyncio.create_task(image.populate(0, b"b" * (4 * CLUSTER)))
    await until(lambda: gate.waiting)
    await asyncio.wait_for(image.write(CLUSTER + 5, b"guest"), 30)
    assert not copy.done()
    gate.open()
    await copy
    expected = bytearray(b"b" * (4 * CLUSTER))
    expected[CLUSTER + 5 : CLUSTER + 10] = b"guest"
    assert await image.read(0, 4 * CLUSTER) == expected
    image.children.pop("backing")
    assert await image.read(0, 4 * CLUSTER) == expected
    await image.close()
    sound(disk)


async def test_populate_does_not_publish_under_a_claim() -> None:
    """Else a write in place to the populated cluster would be undone by the older claim."""
    disk = await new_qcow2(size=1024 * K, backing_file="b")
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * (1024 * K)))
    gates = [Gate("write"), Gate("write")]
    left = list(gates)
    disk.nowait = False

    def hook(operation: str, offset: int, length: int) -> Awaitable[None] | None:
        return left.pop(0)(operation, offset, length) if operation == "write" and left else None

    disk.hook = hook
    copy = asyncio.create_task(image.populate(0, b"b" * CLUSTER))
    await until(lambda: gates[0].waiting)
    first = asyncio.create_task(image.write(0, b"1" * 512))
    await until(lambda: gates[1].waiting)
    gates[0].open()
    await turns()
    second = asyncio.create_task(image.write(4096, b"2" * 512))
    await turns()
    gates[1].open()
    await asyncio.gather(first, copy, second)
    data = bytes(await image.read(0, CLUSTER))
    assert data[:512] == b"1" * 512
    assert data[4096 : 4096 + 512] == b"2" * 512
    assert data[8192:] == b"b" * (CLUSTER - 8192)
    await image.close()
    sound(disk)


@pytest.mark.parametrize("seed", range(5))
async def test_populate_copies_again_where_a_guest_write_failed(seed: int) -> None:
    disk = LateDisk(seed)
    disk.slow = False
    await new_qcow2(disk, size=1024 * K, backing_file="b", cluster_size=4 * K)
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * (1024 * K)))
    disk.slow = True
    failing = disk.write

    async def write(offset: int, data: bytes) -> None:
        if b"g" in bytes(data):
            await asyncio.sleep(0)
            raise OSError(EIO, "injected")
        await failing(offset, data)

    disk.write = write  # type: ignore[method-assign,assignment]
    disk.write_nowait = lambda offset, data: False  # type: ignore[method-assign]
    writes = [image.write(n * 4 * K + 17, b"g") for n in range(16)]
    results = await asyncio.gather(
        *writes, image.populate(0, b"b" * (64 * K)), return_exceptions=True
    )
    assert results[-1] is None
    image.children.pop("backing")
    assert await image.read(0, 64 * K) == b"b" * (64 * K)
    await image.close()
    sound(disk)


async def test_populate_zeroes_and_zero_data_take_no_clusters() -> None:
    disk = await new_qcow2(size=1024 * K + 512, backing_file="b")
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * (64 * K)))
    size = disk.length
    await image.populate(0, bytes(512 * K))
    await image.populate_zeroes(512 * K, 512 * K + 512)
    assert [e.kind for e in await image.map(0, image.length)] == [ExtentKind.ZERO]
    await image.close()
    assert sound(disk).read(b"b" * 64 * K) == bytes(1024 * K + 512)
    assert disk.length <= size + 2 * CLUSTER


async def test_populate_zeroes_in_version_2_writes_them() -> None:
    disk = await new_qcow2(size=256 * K, backing_file="b", version=2)
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * (256 * K)))
    await image.populate_zeroes(0, 128 * K)
    await image.populate(128 * K, bytes(128 * K))
    await image.close()
    assert sound(disk).read(b"b" * 256 * K) == bytes(256 * K)


async def test_two_writes_of_one_new_cluster_share_it() -> None:
    disk = await new_qcow2(size=1024 * K)
    image = await open_qcow2(disk)
    disk.nowait = False
    await asyncio.gather(*(image.write(n * 512, bytes([n + 1]) * 512) for n in range(32)))
    expected = b"".join(bytes([n + 1]) * 512 for n in range(32))
    assert await image.read(0, 32 * 512) == expected
    await image.close()
    assert len(sound(disk).table) and sum(1 for e in sound(disk).l1 if e) == 1
    assert (await image.map(0, CLUSTER))[0].kind is ExtentKind.DATA


# -- errors


@pytest.mark.parametrize("errno", [EIO, ENOSPC])
async def test_a_failed_write_changes_nothing_and_leaks_nothing(errno: int) -> None:
    disk = await written()
    image = await open_qcow2(disk)
    disk.hook = fail_once("write", errno)
    with pytest.raises(OSError) as caught:
        await image.write(300 * K, b"x" * 100)
    assert caught.value.errno == errno
    assert await image.read(300 * K, 100) == bytes(100)
    await image.write(300 * K, b"y" * 100)
    assert await image.read(300 * K, 100) == b"y" * 100
    await image.close()
    sound(disk)


@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("after", range(8))
async def test_a_failed_commit_fails_every_flush_and_is_repeated(
    operation: str, after: int
) -> None:
    disk = await new_qcow2(size=4096 * K, cluster_size=512, refcount_bits=64)
    image = await open_qcow2(disk)
    await image.write(0, b"x" * (200 * K))
    disk.hook = fail_once(operation, EIO, after=after)
    results = await asyncio.gather(*(image.flush() for _ in range(3)), return_exceptions=True)
    kinds = {type(r) for r in results}
    assert len(kinds) == 1
    disk.hook = None  # (a later fault than any request of this commit has not happened)
    await image.flush()
    oracle = Oracle(disk.synced_content())
    assert not oracle.errors
    assert oracle.read()[: 200 * K] == b"x" * (200 * K)
    await image.close()
    sound(disk)


async def test_flushes_share_commits() -> None:
    disk = await new_qcow2(size=1024 * K)
    image = await open_qcow2(disk)
    await image.write(0, b"x")
    before = disk.flushes
    await asyncio.gather(*(image.flush() for _ in range(50)))
    assert disk.flushes - before <= 4
    await image.flush()  # nothing is dirty: only the file is flushed
    assert disk.flushes - before <= 5
    await image.close()


async def test_close_reports_what_could_not_be_written() -> None:
    disk = await new_qcow2(size=1024 * K)
    image = await open_qcow2(disk)
    await image.write(0, b"x")
    disk.hook = fail_once("flush", EIO)
    with pytest.raises(OSError, match="injected"):
        await image.close()


async def test_metadata_is_written_back_by_itself() -> None:
    disk = await new_qcow2(size=1024 * K)
    image = await open_qcow2(disk, autosync=0.01)
    await image.write(0, b"x" * 512)
    assert Oracle(disk.content()).read()[:512] == bytes(512)
    for _ in range(200):
        await asyncio.sleep(0.01)
        if Oracle(disk.synced_content()).read()[:512] == b"x" * 512:
            break
    else:
        pytest.fail("no commit came")
    await image.close()


async def test_a_cancelled_write_is_finished() -> None:
    disk = await new_qcow2(size=1024 * K)
    image = await open_qcow2(disk)
    gate = Gate("write")
    disk.hook = gate
    task = asyncio.create_task(image.write(0, b"x" * CLUSTER))
    await until(lambda: gate.waiting)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    await image.close()
    assert sound(disk).read()[:CLUSTER] == b"x" * CLUSTER


# -- zeros and discards


async def test_discard_reads_zeros_never_what_is_below() -> None:
    disk = await new_qcow2(size=512 * K, backing_file="b")
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * (512 * K)))
    await image.write(0, b"x" * CLUSTER)
    await image.discard(0, 2 * CLUSTER + 100)
    assert await image.read(0, 2 * CLUSTER) == bytes(2 * CLUSTER)
    assert await image.read(2 * CLUSTER, 100) == b"b" * 100
    await image.close()
    sound(disk)


async def test_discard_in_version_2_keeps_data_above_a_backing_file() -> None:
    disk = await new_qcow2(size=512 * K, backing_file="b", version=2)
    image = await open_qcow2(disk)  # the header names one, even if none is attached
    await image.write(0, b"x" * CLUSTER)
    await image.discard(0, CLUSTER)
    assert await image.read(0, CLUSTER) == b"x" * CLUSTER
    await image.close()
    sound(disk)


async def test_discard_in_version_2_without_backing_frees() -> None:
    disk = await written(version=2)
    image = await open_qcow2(disk)
    await image.discard(0, 128 * K)
    assert await image.read(0, 128 * K) == bytes(128 * K)
    await image.close()
    assert not sound(disk).entry(0)


async def test_discarded_clusters_are_given_back_and_used_again() -> None:
    disk = await written()
    image = await open_qcow2(disk, discard="unmap")
    discards: list[tuple[int, int]] = []
    disk.hook = lambda op, at, n: discards.append((at, n)) if op == "discard" else None
    old = sound(disk).entry(0) & 0x00FFFFFFFFFFFE00
    await image.discard(0, CLUSTER)
    await image.flush()
    await image.flush()
    assert discards == [(old, CLUSTER)]
    await image.write(512 * K, b"n" * CLUSTER)
    assert (await image.map(512 * K, CLUSTER))[0].host_offset == old
    await image.close()
    sound(disk)


async def test_a_freed_cluster_is_not_reused_before_the_disk_forgets_it() -> None:
    disk = await written()
    image = await open_qcow2(disk)
    old = sound(disk).entry(0) & 0x00FFFFFFFFFFFE00
    await image.discard(0, CLUSTER)
    await image.write(512 * K, b"n" * CLUSTER)
    assert (await image.map(512 * K, CLUSTER))[0].host_offset != old
    await image.close()
    sound(disk)


async def test_a_slow_read_keeps_its_cluster() -> None:
    disk = await written()
    image = await open_qcow2(disk)
    old = sound(disk).entry(0) & 0x00FFFFFFFFFFFE00
    gate = Gate("read")
    disk.nowait = False
    disk.hook = lambda op, at, n: gate(op, at, n) if at == old else None
    read = asyncio.create_task(image.read(0, CLUSTER))
    await until(lambda: gate.waiting)
    await image.discard(0, CLUSTER)
    for _ in range(3):
        await image.flush()
    await image.write(512 * K, b"n" * (4 * CLUSTER))
    gate.open()
    assert await read == b"a" * CLUSTER
    await image.close()
    sound(disk)


async def test_write_zeroes_edges_and_middle() -> None:
    disk = await written(size=1024 * K - 512)
    image = await open_qcow2(disk)
    await image.write_zeroes(100, 200 * K)
    expected = bytearray(b"a" * (256 * K))
    expected[100 : 100 + 200 * K] = bytes(200 * K)
    assert await image.read(0, 256 * K) == expected
    await image.write_zeroes(1024 * K - 1024, 512)
    await image.close()
    assert sound(disk).read()[: 256 * K] == expected


async def test_write_zeroes_without_unmap_keeps_the_cluster() -> None:
    disk = await written()
    image = await open_qcow2(disk)
    old = sound(disk).entry(0)
    await image.write_zeroes(0, CLUSTER)
    await image.write_zeroes(CLUSTER, CLUSTER, may_unmap=True)
    await image.flush()
    oracle = Oracle(disk.content())
    assert oracle.entry(0) == old | 1
    assert oracle.entry(CLUSTER) == 1
    await image.write(10, b"z")  # into the cluster that was kept
    assert await image.read(0, 512) == bytes(10) + b"z" + bytes(501)
    await image.close()
    assert sound(disk).entry(0) == old


async def test_fast_zeroes_or_none() -> None:
    disk = await written()
    image = await open_qcow2(disk)
    await image.write_zeroes(0, 2 * CLUSTER, fast_only=True)
    assert await image.read(0, 2 * CLUSTER) == bytes(2 * CLUSTER)
    with pytest.raises(OSError) as caught:
        await image.write_zeroes(2 * CLUSTER + 1, CLUSTER, fast_only=True)
    assert caught.value.errno == ENOTSUP
    assert await image.read(2 * CLUSTER, CLUSTER) == b"a" * CLUSTER
    await image.write_zeroes(0, 100, fast_only=True)  # zeros already
    await image.close()


# -- sizes


@pytest.mark.parametrize("old", [64 * K, 64 * K + 512, 100 * K])
@pytest.mark.parametrize("version", [2, 3])
async def test_growth_reads_zeros_whatever_is_below(old: int, version: int) -> None:
    disk = await new_qcow2(size=old, backing_file="b", version=version, cluster_size=4 * K)
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * (150 * K)))
    await image.write(old - 100, b"x" * 100)
    await image.truncate(300 * K)
    assert image.length == 300 * K
    expected = b"b" * (old - 100) + b"x" * 100 + bytes(300 * K - old)
    assert await image.read(0, 300 * K) == expected
    await image.close()
    oracle = sound(disk)
    assert oracle.size == 300 * K
    assert oracle.read(b"b" * (150 * K)) == expected


async def test_shrinking_frees_and_growing_again_reads_zeros() -> None:
    disk = await written()
    image = await open_qcow2(disk)
    await image.truncate(70 * K)
    assert image.length == 70 * K
    await image.truncate(200 * K)
    assert await image.read(0, 200 * K) == b"a" * (70 * K) + bytes(130 * K)
    await image.close()
    assert sound(disk).read() == b"a" * (70 * K) + bytes(130 * K)


async def test_sizes_that_are_refused() -> None:
    image = await open_qcow2(await new_qcow2(size=1024 * K))
    with pytest.raises(BlockError, match="The new size must be a multiple of 512"):
        await image.truncate(1000)
    with pytest.raises(BlockError) as caught:
        await image.truncate(2**63 - 1)
    assert caught.value.message == (
        "offset(9223372036854775807) exceeds maximum(9223372035781033984)"
    )
    with pytest.raises(BlockError, match="Failed to grow the L1 table: File too large"):
        await image.truncate(1 << 62)
    assert image.length == 1024 * K
    await image.close()


async def late_image(seed: int, **options: object) -> tuple[LateDisk, bytes]:
    disk = LateDisk(seed)
    disk.slow = False
    await new_qcow2(disk, **options)
    disk.events.clear()
    return disk, disk.content()


@pytest.mark.parametrize("seed", range(4))
async def test_power_cuts_while_refcount_blocks_and_table_grow(seed: int) -> None:
    size = 4 * 1024 * K
    disk, _ = await late_image(seed, size=size, cluster_size=512, refcount_bits=64)
    image = await open_qcow2(disk)
    data = random.Random(seed).randbytes(1900 * K)
    await image.write(0, data)
    await image.close()
    initial = disk.content()
    disk.events.clear()
    image = await open_qcow2(disk)
    await image.write(len(data), b"n" * (100 * K))  # the table ends within this
    await image.flush()
    await image.write(len(data) + 100 * K, b"m" * 5000)
    await image.close()
    oracle = sound(disk)
    assert len(oracle.table) > 64, "the refcount table has not grown"
    rng = random.Random(seed)
    for at in range(len(disk.events) + 1):
        if rng.random() < 12 / len(disk.events) or disk.events[at - 1][0] == "flush":
            oracle = Oracle(cut(initial, disk.events[:at], rng))
            assert not oracle.errors, (at, oracle.errors[:3])
            assert oracle.read()[: len(data)] == data


@pytest.mark.parametrize("seed", range(3))
async def test_power_cuts_around_new_refcount_blocks(seed: int) -> None:
    disk, initial = await late_image(seed, size=128 * K, cluster_size=512, refcount_bits=64)
    image = await open_qcow2(disk)
    await image.write(0, b"x" * (64 * K))
    await image.flush()
    rng = random.Random(seed)
    for at in range(len(disk.events) + 1):
        for _ in range(8):
            oracle = Oracle(cut(initial, disk.events[:at], rng))
            assert not oracle.errors, (at, oracle.errors[:3])
    await image.close()


@pytest.mark.parametrize("seed", range(2))
async def test_power_cuts_while_the_l1_table_moves(seed: int) -> None:
    disk = LateDisk(seed)
    disk.slow = False
    await new_qcow2(disk, size=128 * K, cluster_size=512)
    image = await open_qcow2(disk)
    await image.write(0, b"x" * (128 * K))
    await image.close()
    disk.events.clear()
    initial = disk.content()
    image = await open_qcow2(disk)
    await image.truncate(4096 * K)
    await image.write(4000 * K, b"y" * 512)
    await image.flush()
    rng = random.Random(seed)
    for at in range(len(disk.events) + 1):
        for _ in range(5):
            oracle = Oracle(cut(initial, disk.events[:at], rng))
            assert not oracle.errors, (at, oracle.errors[:3])
            assert oracle.size in (128 * K, 4096 * K)
            assert oracle.read()[: 128 * K] == b"x" * (128 * K)
    await image.close()
    assert len(sound(disk).l1) == 128


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("name", ["n", "n" * 300, "n" * 1000])
async def test_power_cuts_while_the_backing_link_changes(cluster_size: int, name: str) -> None:
    if cluster_size == 512 and len(name) > 200:
        pytest.skip("does not fit into the header cluster")
    old = "old" * (20 if cluster_size == 512 else 100)
    disk, initial = await late_image(
        0, size=64 * K, cluster_size=cluster_size, backing_file=old, backing_format="qcow2"
    )
    image = await open_qcow2(disk)
    await image.change_backing_file(name, "raw")
    await image.change_backing_file(None, None)
    await image.change_backing_file(old, "qcow2")
    links = {(old, b"qcow2"), (name, b"raw"), (None, None)}
    rng = random.Random(7)
    for at in range(len(disk.events) + 1):
        for _ in range(20):
            oracle = Oracle(cut(initial, disk.events[:at], rng))
            assert not oracle.errors
            formats = dict(oracle.extensions)
            assert (oracle.backing, formats.get(0xE2792ACA)) in links
    assert (image.backing_file, image.backing_format) == (old, "qcow2")
    await image.close()


async def test_backing_links_that_do_not_fit_are_refused_before_anything_changes() -> None:
    disk = await new_qcow2(size=64 * K, cluster_size=512)
    image = await open_qcow2(disk)
    before = disk.content()
    with pytest.raises(BlockError, match="No space left on device"):
        await image.change_backing_file("x" * 600, "raw")
    with pytest.raises(BlockError, match="Backing file name too long"):
        await image.change_backing_file("x" * 2000, "raw")
    assert disk.content() == before
    assert image.backing_file is None
    await image.close()


# -- damage and strangers' images


async def test_an_entry_that_cannot_be_stops_writes_and_is_told() -> None:
    disk = await written()
    oracle = Oracle(disk.content())
    l2_offset = oracle.l1[0] & 0x00FFFFFFFFFFFE00
    patch(disk, l2_offset + 8, struct.pack(">Q", 1 << 63 | 0x50200))
    publisher = Publisher()
    events: list[Event] = []
    publisher.subscribe(events.append)
    image = await open_qcow2(disk, publisher=publisher)
    assert await image.read(0, 100) == b"a" * 100
    assert image.read_nowait(CLUSTER, 100) is None
    with pytest.raises(OSError) as caught:
        await image.read(CLUSTER, 100)
    assert caught.value.errno == EIO
    (event,) = events
    assert isinstance(event, BlockImageCorrupted)
    assert event.fatal
    assert event.node_name == "node"
    for request in (image.write(0, b"x"), image.discard(0, CLUSTER), image.flush()):
        with pytest.raises(OSError) as caught:
            await request
        assert caught.value.errno == EIO
    assert not image.write_nowait(0, b"x")
    assert await image.read(0, 100) == b"a" * 100
    await image.close()
    assert Oracle(disk.content()).incompatible == 2
    with pytest.raises(BlockError) as refused:
        await open_qcow2(disk)
    assert refused.value.message == "qcow2: Image is corrupt; cannot be opened read/write"
    again = await open_qcow2(disk, read_only=True)
    assert again.format_specific()["data"]["corrupt"] is True
    await again.close()


@pytest.mark.parametrize("where", [0, 1, 2, 3, 4])
async def test_guests_do_not_reach_metadata(where: int) -> None:
    """An L2 entry that names the header, a refcount table or block, the L1 or an L2 table."""
    disk = await written()
    oracle = Oracle(disk.content())
    l2_offset = oracle.l1[0] & 0x00FFFFFFFFFFFE00
    target = [CLUSTER // 2, CLUSTER, 2 * CLUSTER, 3 * CLUSTER, l2_offset][where]
    patch(disk, l2_offset, struct.pack(">Q", 1 << 63 | target))
    before = disk.content()
    image = await open_qcow2(disk)
    with pytest.raises(OSError):
        await image.write(0, b"x" * 512)
    await image.close()
    changed = [n for n, (a, b) in enumerate(zip(before, disk.content(), strict=True)) if a != b]
    assert set(changed) <= {79}, "something but the corrupt bit was written"


@pytest.mark.parametrize("entry", [0x200, 1 << 63 | CLUSTER, 1 << 60, 3 * CLUSTER | 1 << 63])
async def test_l1_entries_that_cannot_be(entry: int) -> None:
    disk = await written()
    patch(disk, 3 * CLUSTER, struct.pack(">Q", entry))
    image = await open_qcow2(disk)
    with pytest.raises(OSError):
        await image.read(0, 512)
    with pytest.raises(OSError):
        await image.write(0, b"x")
    await image.close()


async def test_too_low_refcounts_are_found_before_a_cluster_is_used_twice() -> None:
    """Refcounts that say 0 for the tables themselves."""
    disk = await written()
    patch(disk, 2 * CLUSTER, bytes(32))
    image = await open_qcow2(disk)
    with pytest.raises(OSError):
        await image.write(512 * K, b"x")
    await image.close()
    assert Oracle(disk.content()).read()[: 256 * K] == b"a" * (256 * K)


async def test_dirty_images_open_read_only() -> None:
    disk = await written()
    patch(disk, 79, b"\x01")
    image = await open_qcow2(disk, read_only=True)
    assert image.dirty_flag()  # a writer would repair it: test_qcow2_check
    with pytest.raises(OSError) as caught:
        await image.write(0, b"x")
    assert caught.value.errno == EPERM
    await image.close()


async def test_autoclear_bits_are_cleared_by_a_writer_only() -> None:
    disk = await written()
    patch(disk, 95, b"\x01")
    image = await open_qcow2(disk, read_only=True)
    assert Oracle(disk.content()).autoclear == 1
    await image.set_read_only(False)
    assert Oracle(disk.content()).autoclear == 0
    await image.write(0, b"n")
    await image.set_read_only(True)
    assert Oracle(disk.synced_content()).read()[:2] == b"na"
    with pytest.raises(OSError):
        await image.write(0, b"x")
    await image.close()


@pytest.mark.parametrize("seed", range(400))
async def test_damaged_images_harm_nobody(seed: int) -> None:
    """Some bytes of the metadata are wrong: errors, never an exception of another kind."""
    rng = random.Random(seed)
    disk = await written(size=256 * K, cluster_size=512, backing_file="b")
    metadata = [0, 512, 1024, 0x600, *(e & 0x00FFFFFFFFFFFE00 for e in Oracle(disk.content()).l1)]
    for _ in range(rng.choice((1, 3))):
        patch(disk, rng.choice(metadata) + rng.randrange(112), rng.randbytes(rng.choice((1, 8))))
    try:
        image = await open_qcow2(disk, MemoryDriver.of(b"b" * 1000))
    except BlockError:
        return
    size = min(image.length, 1 << 40)
    for _ in range(10):
        offset = rng.randrange(0, max(size, 512), 512) if size >= 512 else 0
        length = min(rng.choice((512, 4096)), size - offset)
        if length <= 0:
            continue
        with contextlib.suppress(OSError):
            await rng.choice(
                (
                    lambda o=offset, n=length: image.read(o, n),
                    lambda o=offset, n=length: image.write(o, b"w" * n),
                    lambda o=offset, n=length: image.discard(o, n),
                    lambda o=offset, n=length: image.map(o, n),
                    lambda o=offset, n=length: image.write_zeroes(o, n),
                    image.flush,
                )
            )()
    with contextlib.suppress(OSError):
        await image.close()


# -- the fast path


async def test_what_needs_no_wait_gets_none() -> None:
    disk = await written()
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * 100))
    assert image.read_nowait(0, 512) is None, "the L2 table is not loaded yet"
    await image.read(0, 512)
    assert image.read_nowait(10, 5) == b"a" * 5
    assert image.read_nowait(CLUSTER - 10, 20) == b"a" * 20
    assert image.read_nowait(255 * K, 2 * K) == b"a" * K + bytes(K)
    assert image.read_nowait(0, 0) == b""
    assert image.write_nowait(5, b"12345")
    assert image.write_nowait(CLUSTER - 2, b"6789")
    assert not image.write_nowait(300 * K, b"x"), "needs a new cluster"
    assert not image.write_nowait(255 * K, b"x" * 2 * K)
    assert image.read_nowait(4, 7) == b"a12345a"
    assert image.read_nowait(CLUSTER - 3, 6) == b"a6789a"
    disk.nowait = False
    assert image.read_nowait(0, 5) is None
    assert not image.write_nowait(0, b"x")
    await image.close()
    sound(disk)


async def test_reads_across_the_end_of_a_short_backing_file() -> None:
    disk = await new_qcow2(size=256 * K, backing_file="b")
    image = await open_qcow2(disk, MemoryDriver.of(b"b" * 1000))
    assert await image.read(0, 2000) == b"b" * 1000 + bytes(1000)
    assert image.read_nowait(1000, 500) == bytes(500)
    await image.write(999, b"x")
    assert await image.read(0, 2000) == b"b" * 999 + b"x" + bytes(1000)
    await image.close()
    sound(disk)


async def test_map_skips_what_has_no_tables() -> None:
    disk = await new_qcow2(size=1 << 40)
    image = await open_qcow2(disk)
    await image.write(700 << 30, b"x")
    extents = await image.map(0, 1 << 40)
    assert [(e.length, e.kind) for e in extents[:1]] == [(700 << 30, ExtentKind.UNALLOCATED)]
    total = 0
    while total < 1 << 40:
        extents = await image.map(total, (1 << 40) - total)
        total += sum(e.length for e in extents)
    assert total == 1 << 40
    await image.close()


async def test_description() -> None:
    disk = await new_qcow2(size=1024 * K, cluster_size=32 * K, lazy_refcounts=True)
    image = await open_qcow2(disk, read_only=True)
    assert image.format_specific() == {
        "type": "qcow2",
        "data": {
            "compat": "1.1",
            "compression-type": "zlib",
            "lazy-refcounts": True,
            "refcount-bits": 16,
            "corrupt": False,
            "extended-l2": False,
        },
    }
    limits = image.limits()
    assert limits["write-zeroes-alignment"] == limits["discard-alignment"] == 32 * K
    assert image.actual_size() == disk.actual_size()
    await image.close()
    old = await open_qcow2(await new_qcow2(size=512, version=2), read_only=True)
    assert old.format_specific()["data"] == {
        "compat": "0.10",
        "compression-type": "zlib",
        "refcount-bits": 16,
    }


async def test_options_that_are_refused() -> None:
    disk = await written()
    for options, words in (
        (
            {"cache_size": 1, "l2_cache_size": 1, "refcount_cache_size": 1},
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        ({"cache_size": 1, "l2_cache_size": 2}, "l2-cache-size may not exceed cache-size"),
        ({"encrypt": {"format": "luks"}}, "specified format 'luks'"),
        ({"data_file": "x"}, "'data-file' can only be set for images with"),
        ({"l2_cache_entry_size": 1000}, "L2 cache entry size must be a power of two"),
    ):
        with pytest.raises(BlockError, match=words):
            await open_qcow2(disk, **options)


async def test_small_caches_are_enough() -> None:
    disk = await new_qcow2(size=2048 * K, cluster_size=512)
    image = await open_qcow2(disk, l2_cache_size=512, refcount_cache_size=512)
    rng = random.Random(3)
    model = bytearray(2048 * K)
    for _ in range(400):
        offset = rng.randrange(0, len(model) - 1000)
        data = rng.randbytes(rng.randrange(1, 1000))
        await image.write(offset, data)
        model[offset : offset + len(data)] = data
        if rng.random() < 0.1:
            await image.flush()
    assert await image.read(0, len(model)) == model
    await image.flush()
    assert len(image._metadata.tables) < 64
    await image.close()
    assert sound(disk).read() == model


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "Could not write refcount table"),
        (1, "Could not write refcount table"),
        (2, "Could not resize image: Failed to grow the L1 table"),
        (3, "Could not write encryption header"),
        (4, "Could not write qcow2 header"),
        (5, "Could not resize image: Allocating clusters failed"),
    ],
)
async def test_an_image_that_cannot_be_made_says_of_what_and_is_none(number, said):
    disk = MemoryDriver()
    disk.hook = fail_once("write", ENOSPC, after=number)
    options = {"crypto_header": b"h" * 4096} if number in (3, 4) else {}
    if number == 5:
        number, options = 4, {"preallocation": "metadata"}
        disk.hook = fail_once("write", ENOSPC, after=number)
    with pytest.raises(BlockError, match=f"^{said}: ") as refused:
        await new_qcow2(disk, size=1024 * K, **options)
    assert refused.value.errno == ENOSPC
    if "preallocation" not in options:
        assert not disk.content()[:4].strip(b"\0")
