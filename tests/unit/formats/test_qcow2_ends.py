"""How an image lets go: nothing of it may touch the file after ``close``, nor keep a flush waiting.

And a resize that is cut off at any write: the old size or the new one, and zeros behind the old.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.bitmaps import parse_extension
from liveblockd.formats.qcow2.cow import MAX_COPIES
from liveblockd.formats.qcow2.header import parse
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.layout import Extension, Geometry
from liveblockd.storage.driver import BlockIO, StoredBitmap
from tests.support.memory import Gate, MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2
from tests.support.qcow2_oracle import Oracle

CLUSTER = 512
SIZE = 64 * CLUSTER
GEOMETRY = Geometry(3, 9, 4)


async def until(reached: Callable[[], bool]) -> None:
    for _ in range(1000):
        if reached():
            return
        await asyncio.sleep(0)
    raise AssertionError("never reached")


async def test_a_slow_read_does_not_wake_a_closed_image() -> None:
    """What the read kept from being freed is freed when it ends: but not by writing any more."""
    disk = await new_qcow2(size=SIZE, cluster_size=CLUSTER)
    image = await open_qcow2(disk, autosync=0.01)
    await image.write(0, b"x" * CLUSTER)
    await image.flush()
    disk.nowait = False
    gate = disk.hook = Gate("read")
    reader = asyncio.create_task(image.read(0, CLUSTER))
    await until(lambda: gate.waiting > 0)
    await image.discard(0, CLUSTER)
    await image.set_read_only(True)
    gate.open()
    assert await reader == b"x" * CLUSTER
    late: list[str] = []
    # A change of mode that says "read-only" is one, and so is the end.
    disk.hook = lambda operation, *_: late.append(operation) if operation == "write" else None
    await asyncio.sleep(0.05)
    await image.close()
    await asyncio.sleep(0.05)
    assert not late


@pytest.mark.parametrize("operation", ["flush", "write"])
async def test_a_commit_that_failed_is_not_tried_again_at_once(operation: str) -> None:
    """More tables are dirty than memory has room for, and the disk takes nothing any more."""
    span = CLUSTER * CLUSTER // 8
    disk = await new_qcow2(size=64 * span, cluster_size=CLUSTER)
    image = await open_qcow2(disk, l2_cache_size=4 * CLUSTER, autosync=0.02)
    committer, failed = image._committer, 0
    for number in range(16):
        await image.write(number * span, b"x" * CLUSTER)
    await image.flush()

    def fail(kind: str, *_: object) -> None:
        nonlocal failed
        if kind == operation:
            failed += 1
            if failed < 100:  # else nobody would see how it goes on
                raise OSError(ENOSPC, "no space")

    disk.hook = fail
    for number in range(4):
        await image.discard(number * span, CLUSTER)
    await until(lambda: committer.is_idle)
    assert 1 <= failed < 12
    assert len(image._metadata.dirty_tables) * 2 > image._metadata.max_tables
    with pytest.raises(OSError, match="no space"):
        await image.flush()
    for _ in range(1000):
        await asyncio.sleep(0)
    assert failed < 12
    await until(lambda: committer.is_idle)
    disk.hook = None
    for _ in range(500):  # the timer tries again
        if not image._metadata.dirty_tables:
            break
        await asyncio.sleep(0.01)
    assert not image._metadata.dirty_tables
    with contextlib.suppress(OSError):
        await image.flush()  # it may be told of a flush of the timer that failed
    await image.close()
    oracle = Oracle(disk.content())
    assert oracle.errors == []


@pytest.mark.parametrize("contiguous", [True, False])
async def test_a_flush_does_not_wait_for_all_that_was_discarded(contiguous: bool) -> None:
    clusters = 2000
    disk = await new_qcow2(size=clusters * CLUSTER, cluster_size=CLUSTER)
    image = await open_qcow2(disk, discard="unmap")
    order = range(clusters) if contiguous else [*range(0, clusters, 2), *range(1, clusters, 2)]
    for cluster in order:
        await image.write(cluster * CLUSTER, b"x" * CLUSTER)
    await image.flush()
    discards = 0

    async def slowly() -> None:
        nonlocal discards
        discards += 1
        for _ in range(3):
            await asyncio.sleep(0)

    disk.hook = lambda operation, *_: slowly() if operation == "discard" else None
    await image.discard(0, clusters * CLUSTER - CLUSTER)
    await image.flush()
    await until(lambda: discards > 0)
    before = discards
    await image.write(clusters * CLUSTER - CLUSTER, b"y" * CLUSTER)
    await image.flush()
    assert discards - before < 5
    await image.close()
    assert discards < (100 if contiguous else clusters + 100)
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.leaks


async def every_state(disk: MemoryDriver, image: Qcow2, size: int) -> list[bytes]:
    """What the disk holds before each request of a resize, and after it."""
    states: list[bytes] = []
    disk.hook = lambda *_: states.append(disk.content())
    await image.truncate(size)
    disk.hook = None
    return [*states, disk.content()]


def size_of(state: bytes) -> int:
    return int.from_bytes(state[24:32], "big")


async def test_growing_never_shows_what_is_below_behind_the_old_end() -> None:
    below = b"b" * SIZE
    old = SIZE // 2 + CLUSTER // 4
    disk = await new_qcow2(size=old // 512 * 512, cluster_size=CLUSTER, backing_file="below")
    image = await open_qcow2(disk, MemoryDriver.of(below))
    states = await every_state(disk, image, SIZE)
    sizes = {size_of(state) for state in states}
    assert sizes == {old // 512 * 512, SIZE}
    for state in states:
        oracle = Oracle(state)
        assert not oracle.errors
        if size_of(state) == SIZE:
            assert not any(oracle.read(below)[old // 512 * 512 :])
    await image.close()


@pytest.mark.parametrize("backing", [True, False])
async def test_growing_after_a_cut_off_shrink(backing: bool) -> None:
    """A shrink that was cut off after the size was stored leaves clusters behind the end."""
    below = b"b" * SIZE
    name = "below" if backing else None
    disk = await new_qcow2(size=SIZE, cluster_size=CLUSTER, backing_file=name)
    image = await open_qcow2(disk, MemoryDriver.of(below) if backing else None)
    await image.write(0, b"x" * SIZE)
    await image.flush()
    half = SIZE // 2
    states = await every_state(disk, image, half)
    await image.close()
    cut_off = [state for state in states if size_of(state) == half]
    assert len(cut_off) > 1
    for state in cut_off:
        again = MemoryDriver.of(state)
        children: BlockIO | None = MemoryDriver.of(below) if backing else None
        grown = await open_qcow2(again, children)
        await grown.truncate(SIZE)
        assert await grown.read(0, SIZE) == b"x" * half + bytes(half)
        await grown.close()
        oracle = Oracle(again.content())
        assert not oracle.errors
        assert oracle.read(below if backing else b"") == b"x" * half + bytes(half)


async def test_commits_of_the_timer_take_a_small_part_of_the_time() -> None:
    """Also while a guest makes entries dirty all the time, even during a commit."""
    disk = await new_qcow2(size=64 * CLUSTER, cluster_size=CLUSTER)
    image = await open_qcow2(disk, autosync=0.001)
    disk.hook = lambda operation, *_: asyncio.sleep(0.02) if operation == "flush" else None
    loop = asyncio.get_running_loop()
    begun = loop.time()
    cluster = 0
    while loop.time() < begun + 0.3:
        await image.write(cluster % 64 * CLUSTER, b"x" * CLUSTER)
        if not cluster % 8:
            await image.discard(cluster % 64 * CLUSTER, CLUSTER)
        cluster += 1
        await asyncio.sleep(0.001)
    # The first one takes two flushes, 40 ms; the next one is due 360 ms later.
    assert 1 <= disk.flushes <= 4
    await image.close()


@pytest.mark.parametrize("cached", [8, 6])
async def test_dirty_tables_are_committed_early_only_to_make_room(cached: int) -> None:
    """Eight L2 tables; where all of them fit into memory nobody needs their room."""
    disk = await new_qcow2(size=8 * 64 * CLUSTER, cluster_size=CLUSTER)
    image = await open_qcow2(disk)
    image._metadata.max_tables = cached
    disk.flushes = 0
    for table in range(8):
        await image.write(table * 64 * CLUSTER, b"x" * CLUSTER)
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert (disk.flushes == 0) == (cached == 8)
    await image.close()


@pytest.mark.parametrize("dirty_again", [False, True])
async def test_a_failed_flush_in_the_background_is_told_to_the_guest(dirty_again: bool) -> None:
    """A commit of the timer whose flush failed may have lost what the guest wrote before."""
    disk = await new_qcow2(size=SIZE, cluster_size=CLUSTER)
    image = await open_qcow2(disk, autosync=0.01)
    failed = asyncio.Event()

    def fail_once(operation: str, *_: int) -> None:
        if operation == "flush" and not failed.is_set():
            failed.set()
            raise OSError(EIO, "injected")

    disk.hook = fail_once
    await image.write(0, b"x" * CLUSTER)
    await asyncio.wait_for(failed.wait(), 30)
    # The timer tries again, with success.
    flushes = disk.flushes
    for _ in range(100):
        await asyncio.sleep(0.01)
        if disk.flushes >= flushes + 2:
            break
    if dirty_again:
        await image.write(CLUSTER, b"x" * CLUSTER)
    with pytest.raises(OSError, match="injected"):
        await image.flush()
    await image.flush()
    await image.close()


async def test_a_failed_write_in_the_background_is_made_good() -> None:
    """It loses nothing: the next commit writes it again, and nobody need hear of it."""
    disk = await new_qcow2(size=SIZE, cluster_size=CLUSTER)
    image = await open_qcow2(disk, autosync=0.01)
    failed = asyncio.Event()

    def fail_once(operation: str, *_: int) -> None:
        if operation == "write" and image._committer.is_idle is False and not failed.is_set():
            failed.set()
            raise OSError(ENOSPC, "injected")

    disk.hook = fail_once
    await image.write(0, b"x" * CLUSTER)
    await asyncio.wait_for(failed.wait(), 30)
    await image.flush()
    await image.close()
    assert Oracle(disk.synced_content()).read(b"")[:CLUSTER] == b"x" * CLUSTER


@pytest.mark.parametrize("lasting", [False, True])
async def test_a_directory_that_the_disk_may_name_is_not_used_again(lasting: bool) -> None:
    """The switch to new bitmaps failed: nobody knows which header the disk has."""
    disk = await new_qcow2(size=SIZE, cluster_size=CLUSTER)
    image = await open_qcow2(disk)
    bits = b"\xaa" * (SIZE // CLUSTER // 8)
    stored = StoredBitmap("bitmap", CLUSTER, True, False, ((0, bits),))
    image.bitmap_source = lambda: [stored]
    switched = failed = False

    def hook(operation: str, offset: int, _: int) -> None:
        nonlocal switched, failed
        if switched and not failed and operation == "flush":
            failed = True
            raise OSError(EIO, "injected")
        if failed and lasting:
            raise OSError(EIO, "injected")
        if operation == "write" and offset == 0:
            switched = True

    disk.hook = hook
    with pytest.raises(BlockError):
        await image.set_read_only(True)
    assert failed
    disk.hook = None
    state = disk.content()  # if this is what the disk has
    extension = parse(state[:CLUSTER]).extension(Extension.BITMAPS)
    assert (extension is not None) == lasting
    for number in range(3):
        await image.write(0, bytes([number + 1]) * SIZE)
        with contextlib.suppress(OSError):  # the failure is told once
            await image.flush()
        await image.flush()
        await image.discard(0, SIZE)
        await image.flush()
    await image.write(0, b"x" * SIZE)
    await image.flush()
    if extension is not None:
        place = parse_extension(extension, GEOMETRY)
        end = place.host_offset + place.length
        assert disk.content()[place.host_offset : end] == state[place.host_offset : end]
    await image.close()
    again = await open_qcow2(MemoryDriver.of(disk.content()))
    assert [b.name for b in again.stored_bitmaps()] == ["bitmap"]
    assert await again.read(0, SIZE) == b"x" * SIZE
    await again.close()


async def test_many_small_writes_to_large_clusters_take_bounded_memory() -> None:
    """Each copies a cluster, and a client may have 128 of them in flight."""
    size, count = 2 << 20, 48
    disk = await new_qcow2(size=count * size, cluster_size=size, backing_file="below")
    image = await open_qcow2(disk, MemoryDriver(count * size))
    held = most = 0

    async def slowly(length: int) -> None:
        nonlocal held, most
        held += length
        most = max(most, held)
        for _ in range(20):
            await asyncio.sleep(0)
        held -= length

    disk.hook = lambda op, _, length: slowly(length) if op == "write" else None
    writes = [image.write(n * size + 4096, b"x" * 4096) for n in range(count)]
    await asyncio.wait_for(asyncio.gather(*writes), 30)
    assert size < most <= MAX_COPIES
    disk.hook = None
    await image.close()
