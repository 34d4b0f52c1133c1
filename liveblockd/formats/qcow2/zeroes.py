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
import contextlib
import os
from collections.abc import Callable
from errno import ENOTSUP

import numpy as np

from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.cow import Writer
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.subclusters import ALL_ALLOCATED, ALL_ZERO, SUBCLUSTERS, mask
from liveblockd.formats.qcow2.tables import Entries
from liveblockd.storage import hostcalls
from liveblockd.storage.driver import ExtentKind

#: zeros that are written at a time where there are no zero clusters (version 2)
PIECE = 1 << 20
#: clusters of an external data file that are erased at a time
MAX_ERASED = 1024
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
        self.configure(unmap_requests=unmap_requests, keep_on_discard=keep_on_discard)

    def configure(self, *, unmap_requests: bool, keep_on_discard: bool) -> None:
        """What discards do from now on."""
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
        size = self._metadata.geometry.subcluster_size
        end = offset + length
        first, last = self._whole(offset, end)
        edges = [(offset, min(end, first))]
        if last >= first:
            edges.append((max(offset, last), end))
        edges = [(start, stop) for start, stop in edges if start < stop]
        if fast_only:
            await self._check_fast(edges, first, last, may_unmap=may_unmap)
        for start, stop in edges:
            if not await self._reads_zeroes(start // size * size, -(-stop // size) * size):
                await self._write(start, stop)
        if first < last:
            await self._zero_subclusters(first, last, may_unmap=may_unmap)

    def _whole(self, offset: int, end: int) -> tuple[int, int]:
        """The (sub)clusters that lie within a range, from the first byte of them to their end."""
        geometry = self._metadata.geometry
        size = geometry.subcluster_size
        first = -(-offset // size) * size
        if first >= end:
            return first, first
        if end == self._writer.disk_size:
            # The end of the disk is the end of a cluster: nobody reads what is behind.
            return first, geometry.clusters(end) * geometry.cluster_size
        return first, end // size * size

    def _partial(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts, of less than a cluster each, at the ends of a range of subclusters."""
        size = self._metadata.geometry.cluster_size
        inner, outer = -(-first // size) * size, last // size * size
        parts = [(first, last)] if inner > outer else [(first, inner), (outer, last)]
        return [(start, stop) for start, stop in parts if start < stop]

    async def _check_fast(
        self, edges: list[tuple[int, int]], first: int, last: int, *, may_unmap: bool
    ) -> None:
        """Raise ENOTSUP if zeros would have to be written."""
        geometry = self._metadata.geometry
        size = geometry.subcluster_size
        slow = [(start // size * size, -(-stop // size) * size) for start, stop in edges]
        fast = all([await self._reads_zeroes(start, stop) for start, stop in slow])
        unallocates = may_unmap and not self.has_below
        if fast and first < last and not geometry.has_zero_clusters and not unallocates:
            fast = await self._reads_zeroes(first, last)
        if fast and first < last and geometry.extended_l2:
            partial = [start for start, _ in self._partial(first, last)]
            fast = not any([await self._is_compressed(start) for start in partial])
        if not fast:
            raise OSError(ENOTSUP, os.strerror(ENOTSUP))

    async def _is_compressed(self, offset: int) -> bool:
        geometry = self._metadata.geometry
        table = await self._metadata.load(offset // geometry.span)
        index = offset >> geometry.cluster_bits & (geometry.l2_entries - 1)
        return table is not None and bool(table.view[index] & COMPRESSED)

    async def _reads_zeroes(self, start: int, stop: int) -> bool:
        """Whether the tables alone say that these (sub)clusters read as zeros."""
        metadata = self._metadata
        bits = metadata.geometry.cluster_bits
        entries = metadata.geometry.l2_entries
        cluster, count = start >> bits, (stop - 1 >> bits) - (start >> bits) + 1
        # Of the first cluster and of the last one only this is asked for.
        skip, spare = start - (cluster << bits), (cluster + count << bits) - stop
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
                found = table.kinds(index, part, skip, spare if part == count else 0)
                zero = found == ExtentKind.ZERO
                if not self.has_below:
                    zero |= found == ExtentKind.UNALLOCATED
                if not zero.all():
                    return False
            cluster += part
            count -= part
            skip = 0
        return True

    async def _write(self, start: int, stop: int) -> None:
        while start < stop:
            part = min(PIECE, stop - start)
            await self._writer.write(start, hostcalls.zeroes(part))
            start += part

    async def _zero_subclusters(self, first: int, last: int, *, may_unmap: bool) -> None:
        """From one guest offset to another: whole clusters, with parts of extended ones around."""
        bits = self._metadata.geometry.cluster_bits
        partial = self._partial(first, last)
        for start, stop in partial:
            raw = self._metadata.raw_data_file  # which must have the zeros
            if raw or not await self._zero_part(start, stop, may_unmap=may_unmap):
                await self._write(start, stop)  # of a compressed cluster
        inner, outer = self._metadata.geometry.clusters(first), last >> bits
        if inner < outer:
            await self._zero_clusters(inner, outer - inner, may_unmap=may_unmap)

    async def _zero_part(self, start: int, stop: int, *, may_unmap: bool) -> bool:
        """Subclusters of one cluster that read as zeros; False, nothing done: compressed."""
        metadata = self._metadata
        geometry = metadata.geometry
        cluster = start >> geometry.cluster_bits
        index = cluster & (geometry.l2_entries - 1)
        size, inside = geometry.subcluster_size, start & (geometry.cluster_size - 1)
        wanted = mask(inside // size, (inside + stop - start) // size)
        while True:
            if not self.has_below and await self._skip_missing(cluster, 1, 1):
                return True
            table = await metadata.writable(cluster // geometry.l2_entries)
            if cluster not in self._claims:
                break
            await self._claims.wait(cluster)
        if table.bad:
            metadata.check_entries(table, index, 1)
        entry, bitmap = table.view[index], table.bitmap(index)
        if entry & COMPRESSED:
            return False
        # Without anything below, what is not allocated reads as zeros already.
        zero = bitmap >> SUBCLUSTERS | (wanted if self.has_below else wanted & bitmap)
        new = zero << SUBCLUSTERS | bitmap & ALL_ALLOCATED & ~wanted
        if may_unmap and not new & ALL_ALLOCATED and (new == ALL_ZERO or not self.has_below):
            self._change_table(table, index, 1, self._zero_unmap, unmap=True)
        elif new != bitmap:
            word = np.array([entry & (OFFSET_MASK | COPIED)], np.uint64)
            metadata.publish_words(table, index, word, np.array([new], np.uint64))
        return True

    async def _zero_clusters(self, cluster: int, count: int, *, may_unmap: bool) -> None:
        size = self._metadata.geometry.cluster_size
        if self._metadata.geometry.has_zero_clusters:
            change = self._zero_unmap if may_unmap else self._zero_keep
            await self._change(cluster, count, change, unmap=may_unmap)
        elif may_unmap and not self.has_below:
            await self._change(cluster, count, _unallocate, unmap=True)
        elif not await self._reads_zeroes(cluster * size, (cluster + count) * size):
            end = min((cluster + count) * size, self._writer.disk_size)
            await self._write(cluster * size, end)

    async def discard(self, offset: int, length: int) -> None:
        """Give back whole clusters; of extended ones also the last subclusters of them."""
        geometry = self._metadata.geometry
        begin, stop = self._whole(offset, offset + length)
        if begin >= stop:
            return
        if geometry.extended_l2 and not self._metadata.raw_data_file:
            for part in self._partial(begin, stop):
                await self._zero_part(*part, may_unmap=not self._keep_on_discard)
        size = geometry.cluster_size
        first, last = -(-begin // size), stop // size
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
        freed = metadata.freed
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
            if metadata.has_data_file and change != _unallocate:
                part = min(part, MAX_ERASED)
                await self._change_data_file(table, cluster, part, change, unmap=unmap)
            else:
                self._change_table(table, index, part, change, unmap=unmap)
            cluster += part
            count -= part
            if count:
                await asyncio.sleep(0)  # a table may take 100 us, and there may be thousands
        if metadata.freed != freed:
            await metadata.event("cluster_free", "refblock_alloc")

    async def _change_data_file(
        self, table: L2Table, cluster: int, count: int, change: _Change, *, unmap: bool
    ) -> None:
        """The same with an external data file: nobody may write there while it is erased."""
        metadata = self._metadata
        bits = metadata.geometry.cluster_bits
        index = cluster & (metadata.geometry.l2_entries - 1)
        if metadata.raw_data_file:
            change = self._zero_keep
        claim = self._claims.take(cluster, count)
        table.pins += 1
        try:
            file = metadata.children[metadata.data_role]
            end = self._writer.disk_size if metadata.raw_data_file else file.length
            length = min(count << bits, end - (cluster << bits))
            unmap = unmap and self._unmap_requests
            if metadata.raw_data_file and length > 0:
                await metadata.data.write_zeroes(cluster << bits, length, may_unmap=unmap)
            elif unmap and length > 0 and change == self._zero_unmap and metadata.data is file:
                # The disk's entries go on naming these clusters until they are committed: a crash
                # may leave the old bytes there or zeros, not what a discard leaves (on a block
                # device anything), and not zeros that somebody then decrypts.
                with contextlib.suppress(OSError):  # a wish only
                    await file.write_zeroes(cluster << bits, length, may_unmap=True, fast_only=True)
            self._change_table(table, index, count, change, unmap=False)
        finally:
            table.pins -= 1
            self._claims.release(claim)

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
