"""Subclusters: one rule, one test. Random operations are in ``test_qcow2_concurrency``."""

from __future__ import annotations

import asyncio

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.storage.driver import Extent, ExtentKind
from tests.support.memory import Gate, MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2
from tests.support.qcow2_oracle import Oracle

CLUSTER = 65536
SUB = 2048


async def extended(below: bytes | None = None) -> tuple[MemoryDriver, Qcow2]:
    disk = await new_qcow2(
        size=8 * CLUSTER, extended_l2=True, backing_file=None if below is None else "below"
    )
    return disk, await open_qcow2(disk, None if below is None else MemoryDriver.of(below))


async def closed(disk: MemoryDriver, image: Qcow2) -> Oracle:
    await image.close()
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.leaks
    return oracle


async def waiting(gate: Gate) -> None:
    async with asyncio.timeout(30):
        while not gate.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_small_write_copies_its_subcluster_only() -> None:
    disk, image = await extended(b"b" * 8 * CLUSTER)
    await image.write(CLUSTER + 3 * SUB + 7, b"guest")
    kinds = [(e.length, e.kind) for e in await image.map(0, 2 * CLUSTER)]
    assert kinds == [
        (CLUSTER + 3 * SUB, ExtentKind.UNALLOCATED),
        (SUB, ExtentKind.DATA),
        (28 * SUB, ExtentKind.UNALLOCATED),
    ]
    expected = bytearray(b"b" * 8 * CLUSTER)
    expected[CLUSTER + 3 * SUB + 7 : CLUSTER + 3 * SUB + 12] = b"guest"
    assert (await closed(disk, image)).read(b"b" * 8 * CLUSTER) == bytes(expected)


async def test_copy_on_write_leaves_alone_what_is_written_in_place() -> None:
    disk, image = await extended(b"b" * 8 * CLUSTER)
    await image.write(5 * SUB, b"x" * SUB)
    gate = Gate("write")
    disk.nowait = False
    disk.hook = lambda op, at, n: gate(op, at, n) if n > SUB else None
    # The end of subcluster 4, which is missing, and the start of 5, which is there
    over = asyncio.create_task(image.write(5 * SUB - 100, b"o" * 200))
    await waiting(gate)
    await asyncio.wait_for(image.write(6 * SUB - 50, b"p" * 50), 30)
    gate.open()
    await over
    oracle = await closed(disk, image)
    wanted = b"b" * (SUB - 100) + b"o" * 200 + b"x" * (SUB - 150) + b"p" * 50
    assert oracle.read(b"b" * 8 * CLUSTER)[4 * SUB : 6 * SUB] == wanted


async def test_a_copy_completes_a_cluster_below_guest_writes() -> None:
    disk, image = await extended(b"b" * 8 * CLUSTER)
    await image.write(3 * SUB, b"x" * SUB)
    gate = Gate("write")
    disk.nowait = False
    disk.hook = lambda op, at, n: gate(op, at, n) if n > SUB else None
    copy = asyncio.create_task(image.populate(0, b"b" * CLUSTER))
    await waiting(gate)
    missing = asyncio.create_task(image.write(SUB + 1, b"m"))  # waits for the one write
    await asyncio.wait_for(image.write(3 * SUB + 1, b"in place"), 30)
    gate.open()
    await asyncio.gather(copy, missing)
    assert [e.kind for e in await image.map(0, CLUSTER)] == [ExtentKind.DATA]
    wanted = bytearray(b"b" * CLUSTER)
    wanted[3 * SUB : 4 * SUB] = b"xin place" + b"x" * (SUB - 9)
    wanted[SUB + 1 : SUB + 2] = b"m"
    assert (await closed(disk, image)).read()[:CLUSTER] == bytes(wanted)


async def test_the_last_subcluster_to_go_gives_the_cluster_back() -> None:
    disk, image = await extended(b"b" * 8 * CLUSTER)
    await image.write(0, b"x" * CLUSTER)
    await image.discard(0, CLUSTER - SUB)
    found = await image.map(0, CLUSTER)
    assert [(e.length, e.kind) for e in found] == [
        (CLUSTER - SUB, ExtentKind.ZERO),
        (SUB, ExtentKind.DATA),
    ]
    await image.discard(CLUSTER - SUB, SUB)
    assert await image.map(0, CLUSTER) == [Extent(CLUSTER, ExtentKind.ZERO)]
    oracle = await closed(disk, image)
    assert oracle.entry(0) == 0 and oracle.entry(0, word=1) == 0xFFFFFFFF << 32


async def test_a_damaged_bitmap_is_an_error() -> None:
    disk, image = await extended()
    await image.write(0, b"x" * SUB)
    await image.close()
    oracle = Oracle(disk.content())
    place = (oracle.l1[0] & 0x00FFFFFFFFFFFE00) + 8
    disk._store(place, (1 << 32 | 1).to_bytes(8, "big"))  # allocated and zero
    image = await open_qcow2(disk)
    with pytest.raises(OSError):
        await image.read(0, SUB)
    assert bytes(await image.read(CLUSTER, SUB)) == bytes(SUB)
    await image.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster_size": 8192}, "only supported with cluster sizes of at least 16384 bytes"),
        ({"version": 2}, "only supported with compatibility level 1.1 and above"),
    ],
)
async def test_where_there_are_none(options: dict[str, int], words: str) -> None:
    with pytest.raises(BlockError, match=words):
        await new_qcow2(size=CLUSTER, extended_l2=True, **options)
