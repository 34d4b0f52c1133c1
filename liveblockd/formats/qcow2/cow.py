"""Guest writes that cannot go to a cluster in place: allocation and copy on write.

Specification: docs/interop/qcow2, "Cluster mapping"; DESIGN, section 4.

Runs on: the event loop, in tasks of the engine (``image`` shields them: a request whose caller is
gone runs to its end, because a worker may still be writing).
Invariants:

* New clusters are invisible until their data, with the head and tail copied from what the guest saw
  there, has been written; then the L2 entries are published at once, without a wait.
* Between looking at an entry and the claim on its cluster, or the epoch of a write in place, there
  is no await.
* After an error the entries are as they were and the new clusters are freed.

Errors: OSError from below, ENOSPC among them; ``DamageError``.
"""

from __future__ import annotations

import asyncio

from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.layout import COPIED, OFFSET_MASK, ZERO
from liveblockd.formats.qcow2.mapping import contiguous_count, in_place, not_in_place_count
from liveblockd.formats.qcow2.metadata import L2Table, Metadata
from liveblockd.formats.qcow2.reader import Reader
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
        #: bytes; what lies behind it in the last cluster reads as zeros
        self.disk_size = metadata.header.size

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
        count = claims.free_count(cluster, min(count, max(1, MAX_ALLOCATION >> bits)))
        if count == 0:
            await claims.wait(cluster)
            return 0
        if entry & COPIED:  # a zero cluster that has a host cluster of its own
            assert entry & ZERO
            count = contiguous_count(table.entries, index, count, geometry.cluster_size)
            metadata.check_in_place(entry & OFFSET_MASK, count << bits)
            return await self._write_new(table, cluster, count, offset, data, entry & OFFSET_MASK)
        if count > 1:
            count = not_in_place_count(table.entries, index, count)
        return await self._write_new(table, cluster, count, offset, data, None)

    async def _write_in_place(self, host_offset: int, data: memoryview) -> None:
        metadata = self._metadata
        metadata.check_in_place(host_offset, len(data))
        if metadata.file.write_nowait(host_offset, data):
            return
        epoch = metadata.quarantine.enter()
        try:
            await metadata.file.write(host_offset, data)
        finally:
            if metadata.quarantine.leave(epoch):
                self._committer.kick()

    async def _write_new(
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
                host_offset, found, fresh = await metadata.allocate(count)
                allocated = True
                if found < count:
                    count = found
                    claims.shrink(claim, count)
            length = min(len(data), ((cluster + count) << bits) - offset)
            async with self._copies:
                start, contents = await self._contents(
                    table, cluster, count, offset, data[:length], fresh=fresh
                )
                await write_bytes(metadata.file, host_offset + start, contents)
            metadata.publish_run(table, index, host_offset, count)
        except OSError:
            # Anything else (a cancelled loop) may have left a write under way: then they leak.
            if allocated and host_offset is not None:
                metadata.quarantine.free(host_offset, count, unmap=False)
            raise
        finally:
            table.pins -= 1
            claims.release(claim)
        return length

    async def _contents(
        self,
        table: L2Table,
        cluster: int,
        count: int,
        offset: int,
        data: memoryview,
        *,
        fresh: bool,
    ) -> tuple[int, Buffer]:
        """What to write to the new clusters, and from which byte of them on.

        ``fresh`` clusters read as zeros already: zeros around the data are not written there.
        """
        geometry = self._metadata.geometry
        bits = geometry.cluster_bits
        begin, end = cluster << bits, (cluster + count) << bits
        head, tail = offset - begin, end - offset - len(data)
        if not head and not tail:
            return 0, data
        index = cluster & (geometry.l2_entries - 1)
        old_head = await self._old(table, index, begin, head)
        old_tail = await self._old(table, index + count - 1, end - tail, tail)
        if fresh and old_head is None and old_tail is None:
            return head, data
        contents = bytearray(end - begin)
        if old_head is not None:
            contents[:head] = old_head
        contents[head : head + len(data)] = data
        if old_tail is not None:
            contents[head + len(data) : head + len(data) + len(old_tail)] = old_tail
        return 0, contents

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
        return await self._reader.read(offset, length)
