"""Clusters that were freed: what goes back to the host, and when."""

from __future__ import annotations

import asyncio

import pytest

from liveblockd.formats.qcow2.quarantine import Freed
from liveblockd.formats.qcow2.release import BATCH_CLUSTERS, BATCH_RANGES, Releaser
from liveblockd.formats.qcow2.tables import DamageError

BITS = 16


class Counts:
    """Refcounts by cluster."""

    def __init__(self, counts):
        self.counts = dict(counts)
        self.removed = []

    def stop_packing(self, cluster, count):
        pass

    def single(self, cluster, count):
        return [self.counts.get(cluster + n, 0) == 1 for n in range(count)]

    def decrement(self, cluster, count):
        if any(not self.counts.get(cluster + n, 0) for n in range(count)):
            raise DamageError("too low", offset=cluster << BITS, size=count << BITS)
        for n in range(count):
            self.counts[cluster + n] -= 1

    def remove_metadata(self, host_offset, clusters):
        pass


class File:
    """What is given back, and how much of that at the same time."""

    def __init__(self, refcounts):
        self.refcounts = refcounts
        self.discarded = []
        self.busy = self.most = 0
        self.error = None

    async def discard(self, offset, length):
        first, count = offset >> BITS, length >> BITS
        assert all(self.refcounts.counts[first + n] for n in range(count)), "free already"
        self.busy += 1
        self.most = max(self.most, self.busy)
        await asyncio.sleep(0)
        self.busy -= 1
        self.discarded.append((first, count))
        if self.error is not None:
            raise self.error


class Metadata:
    class geometry:  # noqa: N801
        cluster_bits = BITS

    def __init__(self, counts):
        self.refcounts = Counts(counts)
        self.file = File(self.refcounts)

    def on_dirty(self):
        pass


def freed(cluster, count=1, *, unmap=True):
    return Freed(cluster << BITS, count, unmap)


async def release(metadata, items):
    releaser = Releaser(metadata)
    releaser.damage = []
    releaser.on_damage = releaser.damage.append
    releaser.add(items)
    batches = 0
    while releaser:
        await releaser.release()
        batches += 1
        assert batches < 10_000
    assert not list(releaser.pending())
    return releaser, batches


async def test_neighbours_go_back_together_and_others_at_the_same_time():
    metadata = Metadata(dict.fromkeys(range(200), 1))
    items = [freed(n) for n in (3, 1, 2)] + [freed(n) for n in range(10, 70, 2)]
    await release(metadata, items)
    assert (1, 3) in metadata.file.discarded and len(metadata.file.discarded) == 31
    assert 1 < metadata.file.most <= 16
    assert {n for n, count in metadata.refcounts.counts.items() if not count} == {
        item.host_offset >> BITS for item in items
    }


async def test_what_others_refer_to_stays():
    metadata = Metadata({1: 1, 2: 2, 3: 1, 4: 1})
    await release(metadata, [freed(1, 3), freed(4, unmap=False)])
    assert sorted(metadata.file.discarded) == [(1, 1), (3, 1)]
    assert metadata.refcounts.counts == {1: 0, 2: 1, 3: 0, 4: 0}


async def test_the_last_of_several_references_gives_the_space_back():
    metadata = Metadata({1: 2, 2: 2, 3: 1})
    await release(metadata, [freed(1, 2), freed(2, 2), freed(1)])
    assert sorted(metadata.file.discarded) == [(1, 3)]
    assert metadata.refcounts.counts == {1: 0, 2: 0, 3: 0}


async def test_a_flush_comes_between_batches():
    count = 3 * BATCH_CLUSTERS + 5
    metadata = Metadata(dict.fromkeys(range(count), 1))
    _, batches = await release(metadata, [freed(0, count)])
    assert batches == 4 and metadata.file.discarded[-1] == (3 * BATCH_CLUSTERS, 5)
    metadata = Metadata(dict.fromkeys(range(1000), 1))
    _, batches = await release(metadata, [freed(n) for n in range(0, 3 * BATCH_RANGES, 2)])
    assert batches == 2


async def test_pending_holds_a_range_until_its_refcounts_fall():
    metadata = Metadata(dict.fromkeys(range(10), 1))
    releaser = Releaser(metadata)
    releaser.add([freed(1), freed(5, 2)])
    discard, seen = metadata.file.discard, []

    async def watched(offset, length):
        seen.append(sorted(item.host_offset >> BITS for item in releaser.pending()))
        await discard(offset, length)

    metadata.file.discard = watched
    await releaser.release()
    assert seen == [[1, 5], [1, 5]] and not list(releaser.pending())


@pytest.mark.parametrize("error", [OSError(5, "x"), None])
async def test_errors_leave_the_rest_alone(error):
    metadata = Metadata({1: 1, 2: 0, 3: 1})
    metadata.file.error = error
    releaser, _ = await release(metadata, [freed(1), freed(2), freed(3)])
    assert metadata.refcounts.counts == {1: 0, 2: 0, 3: 0}
    assert [damage.offset >> BITS for damage in releaser.damage] == [2]
