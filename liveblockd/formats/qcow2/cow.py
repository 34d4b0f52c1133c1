"""Guest writes that cannot go to a cluster in place: allocation and copy on write.

Specification: docs/interop/qcow2, "Cluster mapping"; README.md, invariant 1.

Runs on: the event loop, in tasks of the engine (``image`` shields them: a request whose caller is
gone runs to its end, because a worker may still be writing).
Invariants:

* New clusters are invisible until their data, with the head and tail copied from what the guest saw
  there, has been written; then the L2 entries are published at once, without a wait.
* Between looking at an entry and the claim on its cluster, or the epoch of a write in place, there
  is no await.
* Nobody copies what a guest may write to in place at the same time: subclusters that a MIXED
  cluster has in its own host cluster are written by those who write to them, without a claim.
* After an error the entries are as they were and the new clusters are freed.

Errors: OSError from below, ENOSPC among them; ``DamageError``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, MIXED, OFFSET_MASK, ZERO
from liveblockd.formats.qcow2.mapping import contiguous_count, in_place, not_in_place_count
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.reader import Reader
from liveblockd.formats.qcow2.subclusters import (
    ALL_ALLOCATED,
    ALL_ZERO,
    SUBCLUSTERS,
    allocated_length,
    lowest,
    mask,
)
from liveblockd.storage.driver import BlockIO, Buffer

#: bytes that one claim covers at most: what must be in memory for a copy on write
MAX_ALLOCATION = 8 << 20
#: bytes that the copies on write of one image hold at once, beside the data of the requests: a
#: small write costs a cluster, and there may be hundreds in flight
MAX_COPIES = 64 << 20


async def write_bytes(file: BlockIO, offset: int, data: Buffer) -> None:
    """Write to the image file, without a wait where that can be."""
    if not file.write_nowait(offset, data):
        await file.write(offset, data)


class Writer:
    """Writes of one image."""

    def __init__(
        self, metadata: Metadata, committer: Committer, claims: Claims, reader: Reader
    ) -> None:
        self._metadata = metadata
        self._committer = committer
        self._claims = claims
        self._reader = reader
        # Who is inside waits for nobody else's claim, so that all who wait get in.
        self._copies = asyncio.Semaphore(max(4, MAX_COPIES // (2 * metadata.geometry.cluster_size)))
        #: called when the disk has another size
        self.on_resize: Callable[[], None] = lambda: None
        self._disk_size = metadata.header.size

    @property
    def disk_size(self) -> int:
        """Bytes; what lies behind it in the last cluster reads as zeros."""
        return self._disk_size

    @disk_size.setter
    def disk_size(self, size: int) -> None:
        self._disk_size = size
        self.on_resize()

    async def write(self, offset: int, data: memoryview) -> None:
        """Store ``data``; piece by piece, in the order of the disk."""
        position = 0
        while position < len(data):
            position += await self._write_piece(offset + position, data[position:])

    async def _write_piece(self, offset: int, data: memoryview) -> int:
        """Write as much from ``offset`` on as can be done in one go; bytes done, 0: look again."""
        metadata, claims = self._metadata, self._claims
        geometry = metadata.geometry
        bits, entries = geometry.cluster_bits, geometry.l2_entries
        cluster = offset >> bits
        index = cluster & (entries - 1)
        table = await metadata.writable(cluster // entries)
        # From here to the claim or the epoch: no await.
        count = min((offset + len(data) - 1 >> bits) - cluster + 1, entries - index)
        if table.bad:
            metadata.check_entries(table, index, count)
        entry = table.view[index]
        if in_place(entry):
            if count > 1:
                count = contiguous_count(table.entries, index, count, geometry.cluster_size)
            length = min(len(data), ((cluster + count) << bits) - offset)
            host_offset = (entry & OFFSET_MASK) + (offset & (geometry.cluster_size - 1))
            await self._write_in_place(host_offset, data[:length])
            return length
        if entry & MIXED and entry & COPIED:
            inside = offset & (geometry.cluster_size - 1)
            there = allocated_length(table.bitmap(index), inside, bits)
            if there:
                length = min(len(data), there)
                await self._write_in_place((entry & OFFSET_MASK) + inside, data[:length])
                return length
        count = claims.free_count(cluster, min(count, max(1, MAX_ALLOCATION >> bits)))
        if count == 0:
            await claims.wait(cluster)
            return 0
        if entry & COPIED:  # a zero (or MIXED) cluster that has a host cluster of its own
            assert entry & (ZERO | MIXED)
            count = contiguous_count(table.entries, index, count, geometry.cluster_size)
            metadata.check_in_place(entry & OFFSET_MASK, count << bits)
            return await self.write_new(table, cluster, count, offset, data, entry & OFFSET_MASK)
        if count > 1:
            count = not_in_place_count(table.entries, index, count)
        return await self.write_new(table, cluster, count, offset, data, None)

    async def put(self, host_offset: int, contents: Buffer) -> None:
        """Write to clusters that no entry refers to yet. A data file ends where the disk does."""
        metadata = self._metadata
        if metadata.has_data_file and host_offset + len(contents) > self.disk_size:
            contents = memoryview(contents)[: max(0, self.disk_size - host_offset)]
        await write_bytes(metadata.data, host_offset, contents)

    async def _write_in_place(self, host_offset: int, data: memoryview) -> None:
        metadata = self._metadata
        metadata.check_in_place(host_offset, len(data))
        if metadata.data.write_nowait(host_offset, data):
            return
        epoch = metadata.quarantine.enter()
        try:
            await metadata.data.write(host_offset, data)
        finally:
            if metadata.quarantine.leave(epoch):
                self._committer.kick()

    async def write_new(
        self,
        table: L2Table,
        cluster: int,
        count: int,
        offset: int,
        data: memoryview,
        own_host_offset: int | None,
    ) -> int:
        """Give up to ``count`` clusters from ``cluster`` on new contents; bytes of ``data`` done.

        They go to new host clusters or to those that zero clusters have (``own_host_offset``).
        No await between looking at the entries, which ask for this and are not claimed, and here.
        """
        metadata, claims = self._metadata, self._claims
        geometry = metadata.geometry
        bits = geometry.cluster_bits
        index = cluster & (geometry.l2_entries - 1)
        claim = claims.take(cluster, count)
        table.pins += 1
        allocated = False
        fresh = False
        host_offset = own_host_offset
        try:
            if host_offset is None:
                host_offset, found, fresh = await metadata.allocate_data(cluster, count)
                allocated = True
                if found < count:
                    count = found
                    claims.shrink(claim, count)
            length = min(len(data), ((cluster + count) << bits) - offset)
            begin, end = cluster << bits, (cluster + count) << bits
            if table.bitmaps is not None:
                own = not allocated
                begin, end = self._subcluster_frame(table, index, count, offset, length, own=own)
            async with self._copies:
                start, contents = await self._contents(
                    table, cluster, begin, end, offset, data[:length], fresh=fresh
                )
                if len(contents) > length:
                    await metadata.event("cow_write")
                at = host_offset + start - (cluster << bits)
                await self.put(at, contents)
            freed = metadata.freed
            if table.bitmaps is None:
                metadata.publish_run(table, index, host_offset, count)
            else:
                low, high = begin - (cluster << bits), end - (cluster << bits)
                self._publish_subclusters(table, index, count, host_offset, low, high)
            table_freed = metadata.freed != freed
        except OSError:
            # Anything else (a cancelled loop) may have left a write under way: then they leak.
            if allocated and host_offset is not None:
                metadata.free_data(host_offset, count)
            raise
        finally:
            table.pins -= 1
            claims.release(claim)
        if table_freed:
            await metadata.event("cluster_free", "refblock_alloc")
        return length

    def _subcluster_frame(
        self, table: L2Table, index: int, count: int, offset: int, length: int, *, own: bool
    ) -> tuple[int, int]:
        """From which guest offset to which one must be written, of extended clusters.

        At least whole subclusters; with a host cluster of its own none of those that it has
        already; into another host cluster with all that the old one has.
        """
        geometry = self._metadata.geometry
        size, bits = geometry.subcluster_size, geometry.cluster_bits
        stop = offset + length
        begin, end = offset // size * size, -(-stop // size) * size
        if own:
            # The first one is not there, or the write would have gone to it in place.
            inside = stop - 1 & (geometry.cluster_size - 1)
            if table.bitmap(index + count - 1) >> inside // size & 1:
                end = stop
            return begin, end
        cluster = offset >> bits
        low, _ = _must_move(table, index)
        _, high = _must_move(table, index + count - 1)
        return (
            min(begin, (cluster << bits) + low * size),
            max(end, (cluster + count - 1 << bits) + high * size),
        )

    def _publish_subclusters(
        self, table: L2Table, index: int, count: int, host_offset: int, low: int, high: int
    ) -> None:
        """Of adjacent clusters from ``host_offset`` on, the bytes ``low`` to ``high`` are there.

        Everything else stays: zero, not allocated, or (in a host cluster of its own) allocated.
        """
        geometry = self._metadata.geometry
        size = geometry.subcluster_size
        assert table.bitmaps is not None
        written = np.full(count, ALL_ALLOCATED, np.uint64)
        first = low // size
        last = -(-high // size) - (count - 1) * SUBCLUSTERS
        written[0] &= np.uint64(mask(first, SUBCLUSTERS))
        written[-1] &= np.uint64(mask(0, last))
        old = table.entries[index : index + count]
        bitmaps = table.bitmaps[index : index + count]
        hosts = np.uint64(host_offset) + (
            np.arange(count, dtype=np.uint64) << np.uint64(geometry.cluster_bits)
        )
        stays = ((old & np.uint64(OFFSET_MASK)) == hosts) & ((old & np.uint64(COMPRESSED)) == 0)
        there = np.where(stays, bitmaps & np.uint64(ALL_ALLOCATED), np.uint64(0)) | written
        bitmaps = there | bitmaps & ~(there << np.uint64(SUBCLUSTERS)) & np.uint64(ALL_ZERO)
        self._metadata.publish_words(table, index, hosts | np.uint64(COPIED), bitmaps)

    async def _contents(
        self,
        table: L2Table,
        cluster: int,
        begin: int,
        end: int,
        offset: int,
        data: memoryview,
        *,
        fresh: bool,
    ) -> tuple[int, Buffer]:
        """What to write from ``begin`` to ``end``, and from which guest offset on.

        ``fresh`` clusters read as zeros already: zeros around the data are not written there.
        """
        geometry = self._metadata.geometry
        head, tail = offset - begin, end - offset - len(data)
        if not head and not tail:
            return offset, data
        index = cluster & (geometry.l2_entries - 1)
        last = index + (end - 1 >> geometry.cluster_bits) - cluster
        old_head = await self._old(table, index, begin, head)
        old_tail = await self._old(table, last, end - tail, tail)
        if fresh and old_head is None and old_tail is None:
            return offset, data
        contents = bytearray(end - begin)
        if old_head is not None:
            contents[:head] = old_head
        contents[head : head + len(data)] = data
        if old_tail is not None:
            contents[head + len(data) : head + len(data) + len(old_tail)] = old_tail
        return begin, contents

    async def _old(self, table: L2Table, index: int, offset: int, length: int) -> Buffer | None:
        """What the guest sees in a part of a claimed cluster; None if that is zeros for sure."""
        length = min(length, self.disk_size - offset)
        if length <= 0:
            return None
        entry = table.view[index]
        if entry & ZERO and not entry >> 62 & 1:
            return None
        if not entry:
            backing = self._metadata.children.get("backing")
            if backing is None or offset >= backing.length:
                return None
        await self._metadata.event("cow_read")
        return await self._reader.read(offset, length)


def _must_move(table: L2Table, index: int) -> tuple[int, int]:
    """First and end of the subclusters that a new host cluster must hold as well."""
    if table.view[index] & COMPRESSED:
        return 0, SUBCLUSTERS
    there = table.bitmap(index) & ALL_ALLOCATED
    return (lowest(there), there.bit_length()) if there else (SUBCLUSTERS, 0)
