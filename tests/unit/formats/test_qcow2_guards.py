"""Images that lie, one field at a time: a clear error, nothing written, little memory.

``python -m tests.fuzz.guards`` takes each check out of the engine and runs this: something here has
to fail. A new check of what an image says needs a line here.
"""

from __future__ import annotations

import hashlib
import random
import struct
import zlib

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats import luks
from liveblockd.formats.qcow2 import bitmap_store, opening
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED
from liveblockd.storage.driver import StoredBitmap
from tests.simulation import forms
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2

K, M = 1024, 1 << 20
CLUSTER = 4 * K
WRITES = ("write", "write_zeroes", "discard", "truncate")
FAR = 1 << 40


def number(disk: MemoryDriver, offset: int, length: int = 8) -> int:
    return int.from_bytes(disk._load(offset, length), "big")


def put(disk: MemoryDriver, offset: int, value: int, length: int = 8) -> None:
    disk._store(offset, value.to_bytes(length, "big"))


async def written(**options) -> MemoryDriver:
    """An image of 4 MiB with some data at its start, and 2 tables."""
    disk = await new_qcow2(size=4 * M, **{"cluster_size": CLUSTER, **options})
    image = await open_qcow2(disk)
    await image.write(0, b"a" * 4 * K * 4)
    await image.write(3 * M, b"b" * 4 * K)
    await image.close()
    return disk


async def refused(disk: MemoryDriver, message: str, **options) -> None:
    """It does not open, for that reason, and nobody writes to it."""
    disk.log.clear()
    for read_only in (True, False):
        with pytest.raises(BlockError, match=message):
            await open_qcow2(disk, read_only=read_only, **options)
    assert not [entry for entry in disk.log if entry.operation in WRITES]


async def damaged(disk: MemoryDriver, *, message: str, offset: int = 0) -> None:
    """It opens; a read and a write at the offset are errors, no byte of the file changes but the
    mark in the header, and no guest data is handed out."""
    before = disk.content()[512:]
    image = await open_qcow2(disk, read_only=True)
    assert image.read_nowait(offset, 512) is None
    with pytest.raises(OSError, match=message):
        await image.read(offset, 512)
    await image.close()
    image = await open_qcow2(disk)
    assert not image.write_nowait(offset, b"x" * 512)
    with pytest.raises(OSError, match=message):
        await image.write(offset, b"x" * 512)
    await image.close()
    assert disk.content()[512:] == before


# -- the header

FIELDS = [
    (0, 4, 0x514649FC, "not in qcow2 format"),
    (4, 4, 4, "Unsupported qcow2 version 4"),
    (20, 4, 8, "Unsupported cluster size"),
    (20, 4, 22, "Unsupported cluster size"),
    (100, 4, 96, "header too short"),
    (100, 4, CLUSTER + 8, "exceeds cluster size"),
    (8, 8, CLUSTER + 1, "Invalid backing file offset"),
    (72, 8, 1 << 40, "Unsupported qcow2 feature"),
    (72, 8, 1 << 4, "Unsupported subcluster size"),
    (72, 8, 1 << 3, "must not be set"),
    (104, 1, 2, "unknown compression type"),
    (104, 1, 1, "must be set"),
    (96, 4, 7, "Reference count entry width"),
    (32, 4, 3, "Unsupported encryption method"),
    (56, 4, 0, "does not contain a reference count table"),
    (56, 4, 1 << 20, "Reference count table too large"),
    (48, 8, CLUSTER + 512, "Reference count table offset invalid"),
    (48, 8, 0, "Reference count table offset invalid"),
    (48, 8, 1 << 56, "Reference count table offset invalid"),
    (60, 4, 65537, "Snapshot table too large"),
    (64, 8, 0x201, "Snapshot table offset invalid"),
    (64, 8, 1 << 63, "Snapshot table offset invalid"),
    (36, 4, (32 * M >> 3) + 1, "Active L1 table too large"),
    (36, 4, 0xFFFFFFFF, "Active L1 table too large"),
    (40, 8, CLUSTER + 8, "Active L1 table offset invalid"),
    (40, 8, 0, "Active L1 table offset invalid"),
    (40, 8, (1 << 56) - CLUSTER + 4096, "Active L1 table offset invalid"),
    (40, 8, 1 << 50, "beyond the end of the file"),
    (48, 8, 1 << 50, "beyond the end of the file"),
    (36, 4, 0, "L1 table is too small"),
    (88, 8, 2, "data-file-raw requires a data file"),
    (112, 8, 0xE2792ACA_00000010, "ext_backing_format"),
    (112, 8, 0x12345678_00100000, "Header extension too large"),
]


@pytest.mark.parametrize(("offset", "length", "value", "message"), FIELDS)
async def test_a_field_of_the_header(offset: int, length: int, value: int, message: str) -> None:
    disk = await new_qcow2(size=M, cluster_size=CLUSTER)
    put(disk, offset, value, length)
    await refused(disk, message)


async def test_a_backing_name_that_is_too_long() -> None:
    disk = await new_qcow2(size=M, cluster_size=CLUSTER)
    put(disk, 8, 600)
    put(disk, 16, 1024, 4)
    await refused(disk, "Backing file name too long")
    put(disk, 8, CLUSTER - 8)
    put(disk, 16, 9, 4)
    await refused(disk, "Backing file name too long")


@pytest.mark.parametrize(
    ("length", "message"), [(0, "not in qcow2"), (60, "not in qcow2"), (100, "too short")]
)
async def test_a_header_that_is_cut_off(length: int, message: str) -> None:
    disk, whole = MemoryDriver(), await new_qcow2(size=M, cluster_size=CLUSTER)
    disk._store(0, whole.content()[:length])
    await refused(disk, message)


@pytest.mark.parametrize("cluster_size", [512, 64 * K, 2 * M])
@pytest.mark.parametrize(
    "size", [1 << 60, 1 << 62, (1 << 63) - 512, 1 << 63, (1 << 63) + 512, (1 << 64) - 512]
)
async def test_a_disk_of_absurd_size(size: int, cluster_size: int) -> None:
    disk = await new_qcow2(size=M, cluster_size=cluster_size)
    put(disk, 24, size)
    tables = -(-size // (cluster_size * cluster_size // 8))
    too_big = tables > 0x7FFFFFFF or size > 9223372035781033984
    await refused(disk, "Image is too big" if too_big else "L1 table is too small")


async def test_a_corrupt_image_is_read_only() -> None:
    disk = await written()
    put(disk, 72, 2)
    disk.log.clear()
    with pytest.raises(BlockError, match="Image is corrupt"):
        await open_qcow2(disk)
    assert not [entry for entry in disk.log if entry.operation in WRITES]
    image = await open_qcow2(disk, read_only=True)
    assert bytes(await image.read(0, 2)) == b"aa"
    await image.close()


async def test_what_can_only_be_read_or_not_even_that(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = await new_qcow2(size=M, cluster_size=CLUSTER)
    put(disk, 32, 1, 4)
    with pytest.raises(BlockError, match="legacy AES encryption can only be opened read-only"):
        await open_qcow2(disk)
    plain = await new_qcow2(size=M, cluster_size=CLUSTER)
    await refused(plain, "No encryption in image header", encrypt={"format": "luks"})
    packed = await new_qcow2(size=M, cluster_size=CLUSTER, compression="zstd")
    monkeypatch.setattr(opening, "HAS_ZSTD", False)
    await refused(packed, "zstd compression")


async def test_data_files_that_cannot_be() -> None:
    data = MemoryDriver()
    disk = await new_qcow2(size=M, cluster_size=CLUSTER, data_file=data)
    await refused(disk, "'data-file' is required")
    await refused(disk, "cannot be the image itself", data_file=disk)
    plain = await new_qcow2(size=M, cluster_size=CLUSTER)
    await refused(plain, "can only be set for images with an external", data_file=data)
    raw = await new_qcow2(size=M, cluster_size=CLUSTER, data_file=data, data_file_raw=True)
    name = 1024
    raw._store(name, b"base")
    put(raw, 8, name)
    put(raw, 16, 4, 4)
    await refused(raw, "data-file-raw cannot be used at the same time", data_file=data)


# -- L1 and L2 tables, refcounts


@pytest.mark.parametrize("what", ["reserved", "unaligned", "l1", "table", "block", "twice", "far"])
async def test_an_l1_entry(what: str) -> None:
    disk = await written()
    l1, table = number(disk, 40), number(disk, 48)
    entry = number(disk, l1)
    lies = {
        "reserved": entry | 2,
        "unaligned": entry + 512,
        "l1": l1 | COPIED,
        "table": table | COPIED,
        "block": number(disk, table) | COPIED,
        "twice": number(disk, l1 + 8),
        "far": FAR | COPIED,
    }
    put(disk, l1, lies[what])
    await damaged(disk, message="L2 table offset")


@pytest.mark.parametrize(
    "what",
    ["reserved", "unaligned", "l1", "table", "block", "l2", "other l2", "packed 0",
     "packed copied", "packed l1", "packed into l1"],
)  # fmt: skip
async def test_an_l2_entry(what: str) -> None:
    disk = await written()
    l1, table = number(disk, 40), number(disk, 48)
    l2 = number(disk, l1) & ~COPIED
    entry = number(disk, l2)
    lies = {
        "reserved": entry | 1 << 3,
        "unaligned": entry + 512,
        "l1": l1 | COPIED,
        "table": table | COPIED,
        "block": number(disk, table) | COPIED,
        "l2": l2 | COPIED,
        "other l2": number(disk, l1 + 8),
        "packed 0": COMPRESSED | 512,
        "packed copied": COMPRESSED | COPIED | (entry & ~COPIED),
        "packed l1": COMPRESSED | l1,
        "packed into l1": COMPRESSED | 15 << 58 | l1 - 512,
    }
    put(disk, l2, lies[what])
    await damaged(disk, message="overlaps with|Cluster allocation offset")


async def test_a_compressed_entry_beyond_all_offsets() -> None:
    disk = await new_qcow2(size=M, cluster_size=512)
    image = await open_qcow2(disk)
    await image.write(0, b"a" * 512)
    await image.close()
    l2 = number(disk, number(disk, 40)) & ~COPIED
    put(disk, l2, COMPRESSED | 1 << 57)
    await damaged(disk, message="Cluster allocation offset")


@pytest.mark.parametrize("what", ["reserved", "unaligned", "far", "l1", "table"])
async def test_a_refcount_table_entry(what: str) -> None:
    """What it names is never taken for refcounts; who has to change some gets an error."""
    disk = await written()
    l1, table = number(disk, 40), number(disk, 48)
    data = number(disk, number(disk, l1) & ~COPIED) & ~COPIED  # no metadata
    lies = {"reserved": data | 1, "unaligned": data + 512, "far": 1 << 63 | data}
    put(disk, table, (lies | {"l1": l1, "table": table})[what])
    before = disk.content()[512:]
    image = await open_qcow2(disk)
    with pytest.raises(OSError, match="Refblock offset"):
        await image.write(M, b"x" * 64 * K)
        await image.flush()
    await image.close()
    for place in (l1, table, number(disk, l1) & ~COPIED):
        start = place - 512
        assert disk.content()[512:][start : start + CLUSTER] == before[start : start + CLUSTER]


@pytest.mark.parametrize("how", ["written to", "given back"])
async def test_data_whose_refcounts_lie_and_that_became_a_table(how: str) -> None:
    """Free clusters that an entry refers to: a table comes to lie there, and is not destroyed."""
    disk = await new_qcow2(size=16 * M, cluster_size=CLUSTER)
    image = await open_qcow2(disk)
    await image.write(0, b"a" * 4 * CLUSTER)
    await image.close()
    l1, block = number(disk, 40), number(disk, number(disk, 48))
    l2 = number(disk, l1) & ~COPIED
    hosts = [number(disk, l2 + 8 * n) & ~COPIED for n in range(4)]
    for host in hosts:
        put(disk, block + host // CLUSTER * 2, 0, 2)
    image = await open_qcow2(disk)
    await image.read(0, 512)  # its table is sound as yet
    await image.write(8 * M, b"b" * 512)
    await image.flush()
    table = number(disk, l1 + 4 * 8) & ~COPIED
    assert table in hosts
    content = disk._load(table, CLUSTER)
    offset = hosts.index(table) * CLUSTER
    with pytest.raises(OSError, match="Preventing"):
        if how == "written to":
            await image.write(offset, b"c" * 512)
        else:
            await image.discard(offset, CLUSTER)
    assert disk._load(table, CLUSTER) == content
    assert number(disk, 72) == 2, "it is marked as corrupt"
    await image.close()


@pytest.mark.parametrize(
    ("word", "bitmap"), [(None, 1 << 32 | 1), (0, 1), (0, 0x80000000), (None, (1 << 64) - 1)]
)
async def test_bitmaps_of_subclusters(word: int | None, bitmap: int) -> None:
    disk = await written(cluster_size=16 * K, extended_l2=True)
    l2 = number(disk, number(disk, 40)) & ~COPIED
    if word is not None:
        put(disk, l2, word)
    put(disk, l2 + 8, bitmap)
    await damaged(disk, message="Cluster allocation offset")


@pytest.mark.parametrize("lie", ["another", "compressed", "not copied there", "copied nowhere"])
async def test_an_entry_of_a_data_file(lie: str) -> None:
    data = MemoryDriver()
    disk = await new_qcow2(size=M, cluster_size=CLUSTER, data_file=data)
    image = await open_qcow2(disk, data_file=data)
    await image.write(0, b"a" * 4 * CLUSTER)
    await image.close()
    l2 = number(disk, number(disk, 40)) & ~COPIED
    values = {
        "another": COPIED | 3 * CLUSTER,
        "compressed": COMPRESSED | CLUSTER,
        "not copied there": 7 * CLUSTER,
        "copied nowhere": COPIED,
    }
    put(disk, l2 + 8, values[lie])
    image = await open_qcow2(disk, data_file=data)
    assert image.read_nowait(CLUSTER, 512) is None
    with pytest.raises(OSError, match="Cluster allocation offset"):
        await image.read(CLUSTER, 512)
    await image.close()


async def test_compressed_data_that_is_too_short() -> None:
    disk = await new_qcow2(size=M, cluster_size=CLUSTER)
    image = await open_qcow2(disk)
    await image.write_compressed(0, b"a" * CLUSTER)
    await image.close()
    l2 = number(disk, number(disk, 40)) & ~COPIED
    place = number(disk, l2) & (1 << 58) - 1
    half = raw_deflate(b"a" * 100)
    disk._store(place, half.ljust(512, b"\0"))
    image = await open_qcow2(disk, read_only=True)
    with pytest.raises(OSError, match="cut off"):
        await image.read(0, 512)
    await image.close()


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-12)
    return compressor.compress(data) + compressor.flush()


# -- internal snapshots


async def with_snapshot() -> tuple[MemoryDriver, int]:
    """And where the snapshot table is."""
    disk = await written()
    image = await open_qcow2(disk)
    await image.create_snapshot("one", date_nsec=0)
    await image.write(0, b"c" * 512)
    await image.close()
    return disk, number(disk, 64)


@pytest.mark.parametrize(
    ("offset", "length", "value", "message"),
    [
        (36, 4, 1025, "Too much extra metadata"),
        (8, 4, (32 * M >> 3) + 1, "Snapshot L1 table too large"),
        (0, 8, CLUSTER + 512, "Snapshot L1 table offset invalid"),
        (0, 8, 0, "Snapshot L1 table offset invalid"),
        (0, 8, 1 << 56, "Snapshot L1 table offset invalid"),
    ],
)
async def test_a_snapshot_table(offset: int, length: int, value: int, message: str) -> None:
    disk, table = await with_snapshot()
    put(disk, table + offset, value, length)
    await refused(disk, message)


async def test_a_snapshot_table_beyond_the_file() -> None:
    disk, _ = await with_snapshot()
    put(disk, 64, FAR)
    await refused(disk, "beyond the end of the file")


async def test_large_snapshot_tables_are_read_whole() -> None:
    disk = await written()
    end = disk.length
    put(disk, 60, 2000, 4)
    put(disk, 64, end)
    disk._store(end, bytes(2000 * 40))
    image = await open_qcow2(disk, read_only=True)
    assert len(image.list_snapshots()) == 2000
    await image.close()
    put(disk, 60, 2, 4)
    for start in (end, end + 40 + 0xFFF8):
        put(disk, start + 14, 0xFFF8, 2)  # of the name
        disk._store(start + 40, b"n" * 0xFFF8)
    image = await open_qcow2(disk, read_only=True)
    assert [s.name for s in image.list_snapshots()] == ["n" * 0xFFF8] * 2
    await image.close()
    put(disk, 60, 1, 4)
    image = await open_qcow2(disk, read_only=True)
    assert [s.name for s in image.list_snapshots()] == ["n" * 0xFFF8]
    await image.close()


async def test_a_snapshot_table_of_four_gigabytes() -> None:
    disk = await written()
    put(disk, 60, 65536, 4)
    start = 1 << 20
    put(disk, 64, start)
    entry = 40 + 2 * 0xFFFF
    entry += -entry % 8
    for index in range((64 << 20) // entry + 8):
        put(disk, start + index * entry + 12, 0xFFFFFFFF, 4)
    disk._length = 9 << 30

    def bounded(operation: str, offset: int, length: int) -> None:
        assert length <= 128 << 20, f"{operation} of {length} bytes"

    disk.hook = bounded
    with pytest.raises(BlockError, match="Snapshot table is too large"):
        await open_qcow2(disk, read_only=True)


@pytest.mark.parametrize("size", [1001, 1 << 62, (1 << 64) - 512])
async def test_going_back_to_a_size_that_cannot_be(size: int) -> None:
    disk, table = await with_snapshot()
    put(disk, table + 48, size)
    image = await open_qcow2(disk)
    disk.log.clear()
    with pytest.raises(BlockError, match="size that the snapshot states"):
        await image.apply_snapshot("1")
    assert not [entry for entry in disk.log if entry.operation in WRITES]
    await image.close()


async def test_going_back_from_tables_that_cannot_be() -> None:
    disk, _ = await with_snapshot()
    l1 = number(disk, 40)
    put(disk, l1 + 8, number(disk, l1 + 8) | 2)
    before = disk.content()[512:]
    image = await open_qcow2(disk)
    with pytest.raises(BlockError, match="L1"):
        await image.apply_snapshot("1")
    await image.close()
    assert disk.content()[512:] == before


@pytest.mark.parametrize("what", ["snapshot table", "snapshot's L1 table"])
async def test_an_entry_that_leads_to_a_snapshot(what: str) -> None:
    disk, table = await with_snapshot()
    place = table if what == "snapshot table" else number(disk, table)
    put(disk, number(disk, number(disk, 40)) & ~COPIED, place | COPIED)
    await damaged(disk, message="Cluster allocation offset")


# -- bitmaps


async def with_bitmaps(
    names: tuple[str, ...] = ("one",), size: int = M, **options
) -> tuple[MemoryDriver, int, int]:
    """And where the extension's data and the directory are."""
    disk = await new_qcow2(size=size, **{"cluster_size": CLUSTER, **options})
    image = await open_qcow2(disk)
    bits = image.cluster_size
    stored = [StoredBitmap(n, 512, True, False, ((0, b"\x05" * bits),)) for n in names]
    image.bitmap_source = lambda: stored
    await image.close()
    place = disk.content().index(struct.pack(">II", 0x23852875, 24)) + 8
    return disk, place, number(disk, place + 16)


@pytest.mark.parametrize(
    ("offset", "length", "value", "message"),
    [
        (-4, 4, 32, "Invalid extension length"),
        (4, 4, 1, "Reserved field"),
        (0, 4, 0, "1 to 65535 can be"),
        (0, 4, 65536, "1 to 65535 can be"),
        (16, 8, CLUSTER + 512, "invalid bitmap directory offset"),
        (16, 8, 0, "invalid bitmap directory offset"),
        (16, 8, 1 << 56, "invalid bitmap directory offset"),
        (8, 8, 24, "invalid bitmap directory size"),
        (8, 8, (64 << 20) + 8, "invalid bitmap directory size"),
        (8, 8, 40, "Broken bitmap directory"),
        (0, 4, 2, "invalid bitmap directory size|Less bitmaps"),
        (16, 8, FAR, "beyond the end of the file"),
    ],
)
async def test_the_bitmaps_extension(offset: int, length: int, value: int, message: str) -> None:
    disk, place, _ = await with_bitmaps()
    put(disk, place + offset, value, length)
    await refused(disk, message)


async def test_bitmaps_that_are_not_there_or_twice() -> None:
    disk, place, directory = await with_bitmaps(("one", "two"))
    put(disk, place, 1, 4)
    await refused(disk, "Less bitmaps found")
    put(disk, place, 2, 4)
    disk._store(directory + 32 + 24, b"one")
    await refused(disk, "same name")


@pytest.mark.parametrize(
    ("offset", "length", "value"),
    [
        (16, 1, 2),  # type
        (12, 4, 8),  # flags
        (17, 1, 8),  # granularity
        (17, 1, 32),
        (0, 8, CLUSTER + 512),  # table offset
        (0, 8, 0),
        (0, 8, 1 << 56),
        (8, 4, 0),  # table entries
        (8, 4, (0x2000_0000 // CLUSTER) + 2),
        (8, 4, 0xFFFFFFFF),
    ],
)
async def test_an_entry_of_the_directory(offset: int, length: int, value: int) -> None:
    disk, _, directory = await with_bitmaps()
    put(disk, directory + offset, value, length)
    await refused(disk, "doesn't satisfy the constraints")


async def test_names_of_bitmaps() -> None:
    disk, place, directory = await with_bitmaps()
    put(disk, directory + 18, 0, 2)
    put(disk, directory + 20, 8, 4)  # the name became extra data
    await refused(disk, "doesn't satisfy the constraints")
    put(disk, directory + 18, 1024, 2)
    put(disk, directory + 20, 0, 4)
    disk._store(directory + 24, b"n" * 1024)
    put(disk, place + 8, 24 + 1024)
    await refused(disk, "doesn't satisfy the constraints")
    put(disk, directory + 18, 1040, 2)
    await refused(disk, "Broken bitmap directory")


async def test_a_bitmap_that_is_too_short_for_the_disk() -> None:
    disk, _, directory = await with_bitmaps(size=4 * M, cluster_size=512)
    assert number(disk, directory + 8, 4) == 2
    put(disk, directory + 8, 1, 4)
    await refused(disk, "too short for the disk")


async def test_a_bitmap_table_beyond_the_file() -> None:
    disk, _, directory = await with_bitmaps()
    put(disk, directory, FAR)
    await refused(disk, "beyond the end of the file")


async def test_bitmaps_over_other_metadata() -> None:
    disk, place, directory = await with_bitmaps()
    table, l1 = number(disk, directory), number(disk, 40)
    put(disk, directory, l1)
    await refused(disk, "overlaps with other metadata")
    put(disk, directory, directory)
    await refused(disk, "overlaps with other metadata")
    put(disk, directory, table)
    disk._store(l1, disk._load(directory, 64))
    put(disk, place + 16, l1)
    await refused(disk, "overlaps with other metadata")


@pytest.mark.parametrize("lie", ["reserved", "unaligned", "both", "l1"])
async def test_an_entry_of_a_bitmap_table(lie: str) -> None:
    disk, _, directory = await with_bitmaps()
    table = number(disk, directory)
    entry = number(disk, table)
    lies = {
        "reserved": entry | 4,
        "unaligned": entry + 512,
        "both": entry | 1,
        "l1": number(disk, 40),
    }
    put(disk, table, lies[lie])
    await refused(disk, "has a damaged table")


@pytest.mark.parametrize(("count", "limit"), [(1, CLUSTER - 1), (3, 2 * CLUSTER)])
async def test_bitmaps_that_take_too_much_memory(
    count: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, _, _ = await with_bitmaps(("one", "two", "three")[:count])
    monkeypatch.setattr(bitmap_store, "MAX_LOADED_BYTES", limit)
    await refused(disk, "bitmaps of the image are too large")


@pytest.mark.parametrize("what", ["directory", "table"])
async def test_an_entry_that_leads_to_bitmaps(what: str) -> None:
    disk, _, directory = await with_bitmaps()
    image = await open_qcow2(disk)
    image.bitmap_source = image.stored_bitmaps
    await image.write(0, b"a" * 512)
    await image.close()
    place = disk.content().index(struct.pack(">II", 0x23852875, 24)) + 8
    directory = number(disk, place + 16)
    host = directory if what == "directory" else number(disk, directory)
    put(disk, number(disk, number(disk, 40)) & ~COPIED, host | COPIED)
    image = await open_qcow2(disk, read_only=True)
    with pytest.raises(OSError, match="Cluster allocation offset"):
        await image.read(0, 512)
    await image.close()


# -- encryption


async def encrypted() -> MemoryDriver:
    pytest.importorskip("cryptography")
    header = forms.crypto_header(random.Random(1))
    return await new_qcow2(size=M, cluster_size=CLUSTER, crypto_header=header)


UNLOCKED = {"secret": forms.secret, **forms.unlocking(encrypted=True)}


@pytest.mark.parametrize(
    ("offset", "length", "value", "message"),
    [
        (-4, 4, 16 + 8 + 384, "CRYPTO header extension size"),
        (-8, 4, 0x11223344, "CRYPTO header extension size"),
        (0, 8, CLUSTER + 512, "not a multiple of cluster size"),
        (0, 8, 0, "not a multiple of cluster size"),
        (8, 8, 0, "lies outside the image or is too large"),
        (8, 8, (16 << 20) + 1, "lies outside the image or is too large"),
        (0, 8, FAR, "lies outside the image or is too large"),
    ],
)
async def test_the_place_of_the_luks_header(
    offset: int, length: int, value: int, message: str
) -> None:
    disk = await encrypted()
    disk._length = max(disk.length, 64 << 20)
    place = disk.content().index(struct.pack(">II", 0x0537BE77, 16)) + 8
    put(disk, place + offset, value, length)
    await refused(disk, message, **UNLOCKED)


async def test_an_entry_that_leads_to_the_luks_header() -> None:
    disk = await encrypted()
    image = await open_qcow2(disk, **UNLOCKED)
    await image.write(0, b"a" * 512)
    await image.close()
    place = disk.content().index(struct.pack(">II", 0x0537BE77, 16)) + 8
    put(disk, number(disk, number(disk, 40)) & ~COPIED, number(disk, place) | COPIED)
    image = await open_qcow2(disk, read_only=True, **UNLOCKED)
    with pytest.raises(OSError, match="Cluster allocation offset"):
        await image.read(0, 512)
    await image.close()


def luks_header(**changes: tuple[int, bytes]) -> bytes:
    pytest.importorskip("cryptography")
    data = bytearray(forms.crypto_header(random.Random(1)))
    for offset, value in changes.values():
        data[offset : offset + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"LUKZ", "not in LUKS format"),
        (6, b"\0\2", "LUKS version 2 is not supported"),
        (72, b"md5\0\0\0\0", "Hash algorithm 'md5'"),
        (108, b"\0\0\0\x11", "Cipher key length 17"),
        (108, b"\xff\xff\xff\xff", "Cipher key length"),
        (164, b"\0\0\0\0", "LUKS key iteration count"),
        (164, b"\xff\xff\xff\xff", "LUKS key iteration count"),
        (252, b"\0\0\0\1", "Keyslot 0 is corrupted"),
        (252, b"\xff\xff\xff\xff", "Keyslot 0 is corrupted"),
        (212, b"\0\0\0\0", "Keyslot 0 iteration count"),
        (212, b"\xff\xff\xff\xff", "Keyslot 0 iteration count"),
        (248, b"\0\0\0\0", "Keyslot 0 is overlapping"),
        (248, b"\0\0\0\x0f", "Keyslot 0 is overlapping"),
        (248, b"\xff\xff\xff\xff", "Keyslot 0 is overlapping"),
    ],
)
def test_a_field_of_the_luks_header(offset: int, value: bytes, message: str) -> None:
    with pytest.raises(BlockError, match=message):
        luks.parse_luks(luks_header(change=(offset, value)))
    luks.parse_luks(luks_header())


def test_a_luks_header_that_is_cut_off_and_a_hash_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BlockError, match="not in LUKS format"):
        luks.parse_luks(luks_header()[:300])
    monkeypatch.setattr(hashlib, "algorithms_available", set())
    with pytest.raises(BlockError, match="Hash algorithm 'sha256'"):
        luks.parse_luks(luks_header())
