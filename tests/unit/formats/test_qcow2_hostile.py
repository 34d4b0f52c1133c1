"""Entries that lie: nothing a guest does with them reaches metadata; huge tables, little memory."""

import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from liveblockd.errors import BlockError
from liveblockd.events import BlockImageCorrupted, Publisher
from liveblockd.formats.qcow2.guarded import GuardedClusters
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED
from tests.support.qcow2_images import new_qcow2, open_qcow2

SIZE = 512  # of a cluster
ROOT = Path(__file__).resolve().parents[3]


async def image_with(entries):
    """An image of 64 clusters whose first L2 entries are what ``entries(l1, table)`` says."""
    disk = await new_qcow2(size=64 * SIZE, cluster_size=SIZE)
    image = await open_qcow2(disk)
    await image.write(0, b"a" * SIZE * 4)
    await image.close()
    l1_offset, table_offset = struct.unpack_from(">QQ", disk.content(), 40)
    l2_offset = struct.unpack_from(">Q", disk.content(), l1_offset)[0] & ~COPIED
    old = struct.unpack_from(">4Q", disk.content(), l2_offset)
    new = entries(l1_offset, table_offset, old)
    disk._store(l2_offset, struct.pack(f">{len(new)}Q", *new))
    return disk


async def open_and_listen(disk):
    publisher = Publisher()
    events = []
    publisher.subscribe(events.append)
    return await open_qcow2(disk, publisher=publisher), events


async def test_a_compressed_cluster_in_the_refcount_table_is_damage():
    disk = await image_with(lambda l1, table, old: [COMPRESSED | table])
    before = disk.content()
    image, events = await open_and_listen(disk)
    with pytest.raises(OSError, match="overlaps with refcount table"):
        await image.write(0, b"b" * SIZE)
    await image.close()
    assert isinstance(events[0], BlockImageCorrupted)
    assert events[0].fatal
    table = struct.unpack_from(">Q", before, 48)[0]
    assert disk.content()[table : table + SIZE] == before[table : table + SIZE]


async def test_a_cluster_that_became_a_table_is_not_written_through_another_entry():
    """Two entries own one cluster: freed by the one, taken for a table, written by the other."""
    disk = await image_with(lambda l1, table, old: [old[0], old[0]])
    image, events = await open_and_listen(disk)
    assert (await image.read(SIZE, 1)) == b"a"
    shared = image._metadata.tables[0].view[1] & ~COPIED
    await image.discard(0, SIZE)
    await image.flush()
    await image.flush()
    taken = await image._metadata.allocate_exactly(1)
    while taken < shared:
        taken = await image._metadata.allocate_exactly(1)
    assert taken == shared, "the allocator goes elsewhere: the test needs another way"
    image._metadata.refcounts.add_metadata(taken, 1)
    assert not image.write_nowait(SIZE, b"evil")
    with pytest.raises(OSError, match="invalid write on metadata"):
        await image.write(SIZE, b"evil")
    assert len(events) == 1
    assert b"evil" not in disk.content()


async def test_metadata_is_not_freed_through_an_entry():
    disk = await image_with(lambda l1, table, old: [old[0], old[1]])
    image, events = await open_and_listen(disk)
    await image.read(0, 1)
    image._metadata.refcounts.add_metadata(image._metadata.tables[0].view[1] & ~COPIED, 1)
    with pytest.raises(OSError, match="release of metadata"):
        await image.discard(0, 4 * SIZE)
    assert len(events) == 1
    assert (await image.read(0, 4)) == b"aaaa", "the entries stay as they were"


async def test_an_l2_table_that_was_cut_off_does_not_read_as_zeros():
    disk = await new_qcow2(size=1 << 20, cluster_size=SIZE)
    l1_offset = struct.unpack_from(">Q", disk.content(), 40)[0]
    disk._store(l1_offset, struct.pack(">Q", COPIED | 1 << 30))
    image, events = await open_and_listen(disk)
    with pytest.raises(OSError, match="L2 table offset"):
        await image.read(0, 512)
    assert len(events) == 1


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (64, b"\0\0\0\0\0\0\2\1", "Snapshot table offset invalid"),  # though there is no snapshot
        (112, struct.pack(">II", 0, 1 << 20), "Header extension too large"),  # of the end mark
    ],
)
async def test_what_qemu_refuses_is_refused(offset, value, message):
    disk = await new_qcow2(size=1 << 20, cluster_size=SIZE)
    disk._store(offset, value)
    with pytest.raises(BlockError, match=message):
        await open_qcow2(disk)


def test_guarded_clusters_against_a_set():
    chance = np.random.default_rng(20260)
    guarded, model = GuardedClusters(), set()
    bulk = chance.integers(0, 300, 80).astype(np.uint64)
    guarded.add_many(bulk)
    model.update(bulk.tolist())
    for _ in range(300):
        first, count = int(chance.integers(0, 300)), int(chance.integers(1, 6))
        if chance.random() < 0.5:
            guarded.add(first, count)
            model.update(range(first, first + count))
        else:
            guarded.remove(first, count)
            model.difference_update(range(first, first + count))
        assert sorted(set(guarded.array().tolist())) == sorted(model)
        start = np.arange(300, dtype=np.uint64)
        expected = [not model.isdisjoint(range(i, i + count)) for i in range(300)]
        assert guarded.overlaps(start, start + np.uint64(count - 1)).tolist() == expected
        assert [not guarded.isdisjoint(range(i, i + count)) for i in range(300)] == expected
        assert [i for i in range(310) if i in guarded] == sorted(model)


LARGE = """
import asyncio, resource, struct, sys
import numpy as np
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import open_qcow2

async def main():
    entries = (32 << 20) // 8
    table = np.arange(entries, dtype=np.uint64) + np.uint64(1 << 20)
    if sys.argv[1] == "same":
        table[:] = 1 << 20
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\\xfb", 3, 0, 0, 16, 1 << 50, 0, entries, 65536,
                         65536 + (32 << 20), 1, 0, 0)
    disk = MemoryDriver()
    disk._store(0, header + struct.pack(">QQQII", 0, 0, 0, 4, 104))
    if sys.argv[1] != "empty":
        disk._store(65536, (table << np.uint64(16)).astype(">u8").tobytes())
    disk._length = 1 << 40  # sparse: all of the tables lie within the file
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image = await open_qcow2(disk)
    try:
        await image.read(1 << 30, 4096)
        await image.map(0, image.length)
        await image.write(0, b"x")
    except OSError:
        pass
    await image.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["empty", "distinct", "same"])
def test_the_largest_l1_table_takes_bounded_memory(kind):
    """32 MiB of L1 table; a set of its clusters alone would be 300 MiB."""

    def limit():
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    done = subprocess.run(
        [sys.executable, "-c", LARGE, kind], cwd=ROOT, capture_output=True, text=True,
        timeout=60, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250 * 1024, f"{int(done.stdout) // 1024} MiB"


async def test_a_compressed_cluster_that_expands_without_end_is_cut_off():
    """1 MiB of zeros in 1 KiB of deflate: what comes out is a cluster, no more is ever made."""
    import zlib

    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = compressor.compress(bytes(1 << 20)) + compressor.flush()
    disk = await image_with(lambda l1, table, old: [COMPRESSED | 1 << 61 | 1 << 16])
    disk._store(1 << 16, bomb)
    image = await open_qcow2(disk)
    assert await image.read(0, SIZE) == bytes(SIZE)
    await image.close()
