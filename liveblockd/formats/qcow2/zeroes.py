"""write_zeroes and discard: clusters that read as zeros without being written.

Specification: docs/interop/qcow2, "Standard Cluster Descriptor", bit 0.

Runs on: the event loop, in tasks of the engine. Entries are changed without a wait, after every
claim on the clusters has ended (the copy on write that holds it would bring back old data).
Invariants: a discarded cluster never becomes unallocated where something below could show
through, in this image as it is or as its header says it is opened the next time.
Errors: OSError, ENOTSUP where ``fast_only`` cannot be had; ``DamageError``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from errno import ENOTSUP

import numpy as np

from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.cow import Writer
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from liveblockd.formats.qcow2.mapping import kinds
from liveblockd.formats.qcow2.metadata import L2Table, Metadata
from liveblockd.formats.qcow2.tables import Entries
from liveblockd.storage import hostcalls
from liveblockd.storage.driver import ExtentKind

#: zeros that are written at a time where there are no zero clusters (version 2)
PIECE = 1 << 20
#: new entries for old ones
_Change = Callable[[Entries], Entries]


class Eraser:
    """See the module. ``unmap_requests``: the host gets back what a discard frees."""

    def __init__(
        self,
        metadata: Metadata,
        claims: Claims,
        writer: Writer,
        *,
        unmap_requests: bool,
        keep_on_discard: bool,
    ) -> None:
        self._metadata = metadata
        self._claims = claims
        self._writer = writer
        self._unmap_requests = unmap_requests
        self._keep_on_discard = keep_on_discard

    @property
    def has_below(self) -> bool:
        """Whether unallocated clusters may read as something else than zeros, now or later."""
        metadata = self._metadata
        return metadata.children.get("backing") is not None or bool(metadata.header.backing_file)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fast_only: bool
    ) -> None:
        """Make a range of the disk read as zeros."""
        size = self._metadata.geometry.cluster_size
        end = offset + length
        first = -(-offset // size)
        # The end of the disk is the end of a cluster: nobody reads what is behind.
        last = -(-end // size) if end == self._writer.disk_size else end // size
        edges = [(offset, min(end, first * size))]
        if last >= first:
            edges.append((max(offset, last * size), end))
        edges = [(start, stop) for start, stop in edges if start < stop]
        if fast_only:
            await self._check_fast(edges, first, last, may_unmap=may_unmap)
        for start, stop in edges:
            if not await self._reads_zeroes(start // size, 1):
                await self._write(start, stop)
        if first < last:
            await self._zero_clusters(first, last - first, may_unmap=may_unmap)

    async def _check_fast(
        self, edges: list[tuple[int, int]], first: int, last: int, *, may_unmap: bool
    ) -> None:
        """Raise ENOTSUP if zeros would have to be written."""
        geometry = self._metadata.geometry
        slow = [start >> geometry.cluster_bits for start, _ in edges]
        fast = all([await self._reads_zeroes(cluster, 1) for cluster in slow])
        unallocates = may_unmap and not self.has_below
        if fast and first < last and not geometry.has_zero_clusters and not unallocates:
            fast = await self._reads_zeroes(first, last - first)
        if not fast:
            raise OSError(ENOTSUP, os.strerror(ENOTSUP))

    async def _reads_zeroes(self, cluster: int, count: int) -> bool:
        """Whether the tables alone say that these clusters read as zeros."""
        metadata = self._metadata
        entries = metadata.geometry.l2_entries
        while count:
            index = cluster & (entries - 1)
            part = min(count, entries - index)
            table = await metadata.load(cluster // entries)
            if self._claims.first_held(cluster, part) is not None:
                return False
            if table is None:
                if self.has_below:
                    return False
            else:
                if table.bad:
                    metadata.check_entries(table, index, part)
                found = kinds(table.entries[index : index + part])
                zero = found == ExtentKind.ZERO
                if not self.has_below:
                    zero |= found == ExtentKind.UNALLOCATED
                if not zero.all():
                    return False
            cluster += part
            count -= part
        return True

    async def _write(self, start: int, stop: int) -> None:
        while start < stop:
            part = min(PIECE, stop - start)
            await self._writer.write(start, hostcalls.zeroes(part))
            start += part

    async def _zero_clusters(self, cluster: int, count: int, *, may_unmap: bool) -> None:
        size = self._metadata.geometry.cluster_size
        if self._metadata.geometry.has_zero_clusters:
            change = self._zero_unmap if may_unmap else self._zero_keep
            await self._change(cluster, count, change, unmap=may_unmap)
        elif may_unmap and not self.has_below:
            await self._change(cluster, count, _unallocate, unmap=True)
        elif not await self._reads_zeroes(cluster, count):
            end = min((cluster + count) * size, self._writer.disk_size)
            await self._write(cluster * size, end)

    async def discard(self, offset: int, length: int) -> None:
        """Give back whole clusters; the rest of the range stays."""
        geometry = self._metadata.geometry
        size = geometry.cluster_size
        end = offset + length
        first = -(-offset // size)
        last = -(-end // size) if end == self._writer.disk_size else end // size
        if first >= last:
            return
        if geometry.has_zero_clusters:
            change = self._zero_keep if self._keep_on_discard else self._zero_unmap
            unmap = not self._keep_on_discard
            await self._change(first, last - first, change, unmap=unmap)
        elif not self.has_below:
            await self._change(first, last - first, _unallocate, unmap=True)
        # Version 2 with a backing file: a discarded cluster would read as what is below.

    async def drop(self, cluster: int, count: int) -> None:
        """Forget clusters beyond the end of the disk."""
        await self._change(cluster, count, _unallocate, unmap=True)

    async def _change(self, cluster: int, count: int, change: _Change, *, unmap: bool) -> None:
        """Put ``change(entries)`` in place of the entries of a range."""
        metadata = self._metadata
        entries = metadata.geometry.l2_entries
        while count:
            index = cluster & (entries - 1)
            part = min(count, entries - index)
            if change is _unallocate or not self.has_below:
                skipped = await self._skip_missing(cluster, count, part)
                if skipped:
                    cluster += skipped
                    count -= skipped
                    continue
            table = await metadata.writable(cluster // entries)
            held = self._claims.first_held(cluster, part)
            if held is not None:
                await self._claims.wait(held)
                continue
            self._change_table(table, index, part, change, unmap=unmap)
            cluster += part
            count -= part
            if count:
                await asyncio.sleep(0)  # a table may take 100 us, and there may be thousands

    async def _skip_missing(self, cluster: int, count: int, part: int) -> int:
        """Clusters of spans without an L2 table: unallocated, which is as good as zeros here."""
        metadata = self._metadata
        entries = metadata.geometry.l2_entries
        skipped = 0
        l1_index = cluster // entries
        while skipped < count and not metadata.l2_offset(l1_index):
            step = part if not skipped else min(entries, count - skipped)
            # A first write may have claimed a cluster before it has a table.
            held = self._claims.first_held(cluster + skipped, step)
            if held is not None:
                await self._claims.wait(held)
                break
            skipped += step
            l1_index += 1
        return skipped

    def _change_table(
        self, table: L2Table, index: int, count: int, change: _Change, *, unmap: bool
    ) -> None:
        metadata = self._metadata
        if table.bad:
            metadata.check_entries(table, index, count)
        old = table.entries[index : index + count]
        new = change(old)
        differs = np.flatnonzero(old != new)
        if not len(differs):
            return
        low, high = int(differs[0]), int(differs[-1]) + 1
        unmap = unmap and self._unmap_requests
        metadata.publish(table, index + low, new[low:high], unmap=unmap)

    def _zero_keep(self, old: Entries) -> Entries:
        """Zero clusters that keep their host clusters; of compressed ones nothing can be kept."""
        kept = old & np.uint64(OFFSET_MASK | COPIED)
        new = np.where((old & np.uint64(COMPRESSED)) != 0, np.uint64(ZERO), kept | np.uint64(ZERO))
        return new if self.has_below else np.where(old == 0, old, new)

    def _zero_unmap(self, old: Entries) -> Entries:
        """Zero clusters without host clusters."""
        new = np.full(len(old), ZERO, np.uint64)
        return new if self.has_below else np.where(old == 0, old, new)


def _unallocate(old: Entries) -> Entries:
    return np.zeros(len(old), np.uint64)
