"""The L1 table, the L2 tables and the refcounts of an open image, in memory.

Specification: docs/interop/qcow2, "Cluster mapping", "Host cluster management".

Runs on: the event loop alone; every method that is no coroutine changes tables without a wait.
Invariants:

* A table that is dirty or pinned is never evicted, so that the object for an L1 index stays the
  same while somebody changes it. Pin a table across an await, or look it up again after it.
* An L2 table is changed only if it is ``exclusive`` (the L1 entry says COPIED); ``writable``
  makes it so by copying it first.
* What memory no longer refers to goes through ``quarantine``; nothing else lowers a refcount.

Errors: OSError from the file child; ``DamageError`` for tables that cannot be (it marks the image).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2 import subclusters
from liveblockd.formats.qcow2.allocator import BlockNeeded, DirtyRange, Refcounts
from liveblockd.formats.qcow2.damage import bad_offset, use_of
from liveblockd.formats.qcow2.header import Header
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    ENTRY_BYTES,
    OFFSET_MASK,
)
from liveblockd.formats.qcow2.live_references import LiveReferences
from liveblockd.formats.qcow2.quarantine import Quarantine
from liveblockd.formats.qcow2.tables import (
    DamageError,
    Entries,
    bad_data_file_entries,
    bad_l1_entries,
    bad_l2_entries,
    compressed_clusters,
    compressed_range,
    drop_idle_flags,
    flags_at,
    from_disk,
    repeated,
    shown,
)
from liveblockd.storage.driver import BlockIO, Buffer

#: L2 tables in memory at most, whatever their size: each costs about 1 KiB besides its entries
MAX_TABLES = 16384
#: host offsets that are free to be used are found in this many refcount blocks in memory
MIN_REFCOUNT_BLOCKS = 4
#: debug events of a new L2 table, a new refcount block and a larger refcount table
_FREE = "cluster_free"
_NEW_L2 = ("cluster_alloc", "refblock_alloc", "l2_alloc_write")
_NEW_BLOCK = ("refblock_alloc_write", "refblock_alloc_hookup")
_NEW_TABLE = ("refblock_alloc_write", "reftable_grow", "refblock_alloc_write_blocks",
              "refblock_alloc_write_table", "refblock_alloc_switch_table", _FREE)  # fmt: skip


async def read_bytes(file: BlockIO, offset: int, length: int) -> Buffer:
    """Bytes of the image file; zeros past its end."""
    available = min(length, max(0, file.length - offset))
    if available == length:
        data = file.read_nowait(offset, length)
        return data if data is not None else await file.read(offset, length)
    if available == 0:
        return bytes(length)
    return bytes(await file.read(offset, available)).ljust(length, b"\0")


class Metadata:
    """See the module. ``children`` is the driver's: surgery may replace the file child."""

    def __init__(
        self,
        children: Mapping[str, BlockIO],
        header: Header,
        l1: Entries,
        refcounts: Refcounts,
        *,
        max_tables: int,
        max_refcount_blocks: int,
    ) -> None:
        self.children = children
        #: what the disk has
        self.header = header
        #: header fields that the next commit changes
        self.pending_fields: dict[str, Any] = {}
        self.geometry = header.geometry
        self.refcounts = refcounts
        self.quarantine = Quarantine()
        #: how many ranges were freed by new entries
        self.freed = 0
        self.l1 = l1
        self.l1_view = memoryview(cast(Buffer, l1))
        self.l1_offset = header.l1_table_offset
        self.l1_dirty = DirtyRange()
        #: the L1 table was moved and is not yet written whole at its new place
        self.l1_unwritten = False
        #: L1 entries that cannot be used; the table may have grown since
        self.bad_l1 = flags_at(bad_l1_entries(l1, self.geometry), len(l1))
        self.tables: dict[int, L2Table] = {}
        self.dirty_tables: dict[int, L2Table] = {}
        #: guest data lie in another file, each cluster at its guest offset, without refcounts
        self.has_data_file = header.has_data_file
        #: and what the guest sees is what that file has: zeros are written there
        self.raw_data_file = header.raw_data_file
        #: where guest data go: ``stores[data_role]``
        self.data_role = "data-file" if self.has_data_file else "file"
        self.stores: Mapping[str, BlockIO] = children
        self.limit_cache(max_tables, max_refcount_blocks)
        #: called when something became dirty; set by ``commit``
        self.on_dirty: Callable[[], None] = lambda: None
        #: called, if anybody listens, when entries of a range (bytes of the disk) were replaced
        self.on_remap: Callable[[int, int], None] | None = None
        #: called when requests ended that held back what is to be freed; set by ``image``
        self.on_idle: Callable[[], None] = lambda: None
        #: told of every change of an entry while a check runs (``live_check``)
        self.watch: LiveReferences | None = None
        self._loading: dict[int, asyncio.Task[L2Table]] = {}
        self._loading_blocks: dict[int, asyncio.Task[None]] = {}
        self._register_tables()

    @property
    def file(self) -> BlockIO:
        """The node with the image."""
        return self.children["file"]

    @property
    def data(self) -> BlockIO:
        """What holds the data of guest clusters, at the offsets of their entries."""
        return self.stores[self.data_role]

    def _register_tables(self) -> None:
        """Make all metadata known to the allocator; find L1 entries that cannot be."""
        geometry, refcounts = self.geometry, self.refcounts
        refcounts.add_metadata(0, 1)
        refcounts.add_metadata(self.l1_offset, self.l1_clusters)
        refcounts.add_metadata(refcounts.table_offset, refcounts.table_clusters)
        fixed = refcounts.metadata.array()
        bits = np.uint64(geometry.cluster_bits)
        blocks = refcounts.table[refcounts.table != 0] >> bits
        # An L2 table that is also something else, or the table of two L1 entries, or that a file
        # which was cut off no longer has: zeros in its place would be wrong data.
        indices = np.flatnonzero(self.l1 & np.uint64(OFFSET_MASK))
        l2 = (self.l1[indices] & np.uint64(OFFSET_MASK)) >> bits
        bad = np.isin(l2, fixed) | np.isin(l2, blocks) | repeated(l2)
        bad |= l2 >= np.uint64(max(1, geometry.clusters(self.file.length)))
        self.bad_l1[indices[bad]] = True
        refcounts.refuse_blocks_at(fixed)
        refcounts.metadata.add_many(np.concatenate((l2, blocks)))

    # -- L1

    @property
    def l1_clusters(self) -> int:
        """Clusters that the L1 table occupies."""
        return self.geometry.clusters(len(self.l1) * ENTRY_BYTES)

    def l2_offset(self, l1_index: int) -> int:
        """Host offset of an L2 table, 0 where there is none; raises DamageError."""
        if l1_index < len(self.bad_l1) and self.bad_l1[l1_index]:
            offset = self.l1_view[l1_index] & OFFSET_MASK
            raise bad_offset(self, "L2 table", offset, f"L1 index: {shown(l1_index)}")
        return self.l1_view[l1_index] & OFFSET_MASK

    def _set_l1(self, l1_index: int, host_offset: int) -> None:
        if self.watch is not None:
            self.watch.l1_changed(l1_index, self.l1_view[l1_index], host_offset | COPIED)
        self.l1_view[l1_index] = host_offset | COPIED
        self.l1_dirty.add(l1_index, l1_index + 1)

    def replace_l1(self, entries: Entries, host_offset: int) -> None:
        """The L1 table is ``entries`` at a new place from now on; the next commit writes it."""
        self.quarantine.free(self.l1_offset, self.l1_clusters, unmap=False)
        self.l1 = entries
        self.l1_view = memoryview(cast(Buffer, entries))
        self.l1_offset = host_offset
        self.l1_dirty.clear()
        self.l1_unwritten = True
        self.refcounts.add_metadata(host_offset, self.l1_clusters)
        self.pending_fields.update(l1_table_offset=host_offset, l1_size=len(entries))
        self.on_dirty()

    def adopt(self, header: Header, l1: Entries, refcounts: Refcounts) -> None:
        """Go on with what another header names; the disk has all of it, and no request is there."""
        assert not self.dirty_tables and not self._loading and not self.pending_fields
        self.header = header
        self.geometry = header.geometry
        self.refcounts = refcounts
        self.l1 = l1
        self.l1_view = memoryview(cast(Buffer, l1))
        self.l1_offset = header.l1_table_offset
        self.bad_l1 = flags_at(bad_l1_entries(l1, header.geometry), len(l1))
        self.tables.clear()
        if self.on_remap is not None:
            self.on_remap(0, 1 << 63)

    def leave(self, epoch: int) -> None:
        """A request ends that took ``epoch`` from ``quarantine.enter``."""
        if self.quarantine.leave(epoch):
            self.on_idle()

    # -- L2

    async def load(self, l1_index: int) -> L2Table | None:
        """The L2 table of an L1 entry; None where there is none."""
        table = self.tables.get(l1_index)
        if table is not None:
            table.used = True
            return table
        if not self.l2_offset(l1_index):
            return None
        task = self._loading.get(l1_index)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(l1_index))
            self._loading[l1_index] = task
        # Shielded: whoever else waits for this table does not suffer from a cancelled request.
        return await asyncio.shield(task)

    async def _load(self, l1_index: int) -> L2Table:
        try:
            entry = self.l1_view[l1_index]
            host_offset = entry & OFFSET_MASK
            data = await read_bytes(self.file, host_offset, self.geometry.cluster_size)
            assert self.l1_view[l1_index] == entry and l1_index not in self.tables
            table = self.parse(l1_index, host_offset, data, exclusive=bool(entry & COPIED))
            self._evict()
            self.tables[l1_index] = table
            return table
        finally:
            del self._loading[l1_index]

    def parse(self, l1_index: int, host_offset: int, data: Buffer, *, exclusive: bool) -> L2Table:
        """A table of these bytes."""
        extended = self.geometry.extended_l2
        words, bitmaps = subclusters.from_disk(data) if extended else (from_disk(data), None)
        if not self.has_data_file:
            drop_idle_flags(words)
        entries = words
        if bitmaps is not None:
            bitmaps[(words & np.uint64(COMPRESSED)) != 0] = 0  # not used there
            entries = subclusters.summaries(words, bitmaps)
        table = L2Table(l1_index, host_offset, entries, bitmaps, exclusive=exclusive, is_new=False)
        if self.has_data_file:
            table.bad = frozenset(bad_data_file_entries(words, self.geometry, l1_index).tolist())
        else:
            table.bad = self.bad_entries(words)
        if bitmaps is not None:
            table.bad |= frozenset(subclusters.bad_bitmaps(words, bitmaps).tolist())
        return table

    def bad_entries(self, entries: Entries) -> frozenset[int]:
        """Entries that cannot be, or that would let a guest reach metadata."""
        # Most tables are sparse, and nothing can be wrong with 0.
        places = np.flatnonzero(entries != 0)
        if len(places) < len(entries):
            entries = entries[places]
        bad = set(places[bad_l2_entries(entries, self.geometry)].tolist())
        standard = (entries & np.uint64(COMPRESSED)) == 0
        hosts = (entries & np.uint64(OFFSET_MASK)) >> np.uint64(self.geometry.cluster_bits)
        if not standard.all():
            compressed = np.flatnonzero(~standard)
            first, last = compressed_clusters(entries[compressed], self.geometry)
            guarded = self.refcounts.metadata.overlaps(first, last)
            bad.update(places[compressed[guarded]].tolist())
            hosts[compressed] = 0
        bad.update(places[self._guarded(hosts)].tolist())
        return frozenset(bad)

    def _guarded(self, hosts: Entries) -> Entries:
        """Indices of those host clusters that hold metadata; 0 stands for none.

        Data mostly lie side by side: each run is looked up, and its clusters only if it is hit.
        """
        if not len(hosts):
            return hosts
        guarded = self.refcounts.metadata
        first = np.flatnonzero(np.diff(hosts) != 1) + 1
        first = np.concatenate((np.zeros(1, first.dtype), first))
        last = np.append(first[1:], len(hosts)) - 1
        if not guarded.overlaps(np.maximum(hosts[first], 1), hosts[last]).any():
            return np.zeros(0, np.uint64)
        clash = (hosts != 0) & guarded.overlaps(hosts, hosts)
        return np.flatnonzero(clash).astype(np.uint64)

    def check_entries(self, table: L2Table, first: int, count: int) -> None:
        """Raise DamageError if one of these entries cannot be."""
        for index in table.bad:
            if first <= index < first + count:
                entry = table.view[index]
                offset = entry & OFFSET_MASK
                if entry & COMPRESSED:
                    offset = compressed_range(entry, self.geometry).host_offset
                where = f"L2 offset: {shown(table.host_offset)}, L2 index: {shown(index)}"
                raise bad_offset(self, "Cluster allocation", offset, where)

    def check_in_place(self, host_offset: int, length: int) -> None:
        """Raise DamageError if a guest write to the host clusters would hit metadata.

        Entries were checked when their table was loaded, but in an image whose refcounts lie, what
        is data to one entry may have been freed by another and hold a table since then.
        """
        if self.has_data_file:
            return
        bits = self.geometry.cluster_bits
        first, last = host_offset >> bits, (host_offset + length - 1) >> bits
        if not self.refcounts.metadata.added.isdisjoint(range(first, last + 1)):
            raise DamageError(
                f"Preventing invalid write on metadata (overlaps with {use_of(self, host_offset)})",
                offset=host_offset,
                size=length,
            )

    async def writable(self, l1_index: int) -> L2Table:
        """The L2 table of an L1 entry, to be changed; made or copied if need be. Not pinned."""
        while True:
            host_offset = self.l2_offset(l1_index)
            if not host_offset:
                new_offset, _, fresh = await self.allocate(1)
                await self.event(*_NEW_L2)
                if self.l2_offset(l1_index):  # somebody was faster
                    self.quarantine.free(new_offset, 1, unmap=False)
                    continue
                return self._add_table(l1_index, new_offset, fresh)
            table = self.tables.get(l1_index) or await self.load(l1_index)
            if table is None or self.tables.get(l1_index) is not table:
                continue
            if table.exclusive:
                return table
            table.pins += 1
            try:
                new_offset = await self.allocate_cluster()
                await self.event("l2_alloc_cow_read", *_NEW_L2, _FREE)
            finally:
                table.pins -= 1
            if table.exclusive:
                self.quarantine.free(new_offset, 1, unmap=False)
                continue
            self._make_exclusive(table, new_offset)
            return table

    def _add_table(self, l1_index: int, host_offset: int, fresh: bool) -> L2Table:
        entries = np.zeros(self.geometry.l2_entries, np.uint64)
        bitmaps = np.zeros_like(entries) if self.geometry.extended_l2 else None
        table = L2Table(l1_index, host_offset, entries, bitmaps, exclusive=True, is_new=True)
        # Only of a host file it is known that what was never written reads as zeros.
        table.fresh = fresh and self.file.host_file() is not None
        self._evict()
        self.tables[l1_index] = table
        self.refcounts.add_metadata(host_offset, 1)
        self._set_l1(l1_index, host_offset)
        self.mark_dirty(table, 0, len(entries))
        return table

    def add_written_tables(self, l1_indices: npt.NDArray[np.int64], host_offsets: Entries) -> None:
        """L1 entries, all of them 0 by now, name tables that the file has; no check is counting.

        They are not kept: who wants one loads it.
        """
        assert self.watch is None and not self.l1[l1_indices].any()
        self.l1[l1_indices] = host_offsets | np.uint64(COPIED)
        self.l1_dirty.add(int(l1_indices.min()), int(l1_indices.max()) + 1)
        clusters = host_offsets >> np.uint64(self.geometry.cluster_bits)
        self.refcounts.metadata.add_each(clusters.tolist())
        self.on_dirty()
        if self.on_remap is not None:
            for l1_index in l1_indices.tolist():
                self.on_remap(l1_index * self.geometry.span, self.geometry.span)

    def _make_exclusive(self, table: L2Table, host_offset: int) -> None:
        """Give the table, which a snapshot shares, a cluster of its own."""
        self.quarantine.free(table.host_offset, 1, unmap=False)
        table.host_offset = host_offset
        table.exclusive = table.is_new = True
        table.fresh = False
        self.refcounts.add_metadata(host_offset, 1)
        self._set_l1(table.l1_index, host_offset)
        self.mark_dirty(table, 0, len(table.entries))

    def limit_cache(self, max_tables: int, max_refcount_blocks: int) -> None:
        """How much stays in memory from now on; what is too much goes when more is loaded."""
        self.max_tables = max(4, min(max_tables, MAX_TABLES))
        self.max_refcount_blocks = max(MIN_REFCOUNT_BLOCKS, max_refcount_blocks)

    def mark_dirty(self, table: L2Table, first: int, end: int) -> None:
        """Entries ``first`` up to, not including, ``end`` were changed."""
        table.dirty.add(first, end)
        self.dirty_tables[table.l1_index] = table
        self.on_dirty()

    def _evict(self) -> None:
        """Make room for one more table, where there are clean ones that were not used lately."""
        surplus = len(self.tables) + 1 - self.max_tables
        if surplus <= 0:
            return
        for l1_index, table in list(self.tables.items()):
            if table.dirty or table.is_new or table.pins:
                continue
            # Clean, new since the last round: back to the end of the queue
            del self.tables[l1_index]
            if table.used:
                table.used = False
                self.tables[l1_index] = table
                continue
            surplus -= 1
            if surplus <= 0:
                return

    # -- entries

    def publish(self, table: L2Table, first: int, entries: Entries, *, unmap: bool = False) -> None:
        """Replace entries, by ones that are not MIXED; what they referred to is freed.

        ``unmap``: given back to the host. Raises DamageError, having changed nothing, if that is
        metadata.
        """
        bitmaps = None if table.bitmaps is None else subclusters.bitmaps_of(entries)
        self._publish(table, first, entries, bitmaps, unmap=unmap)

    def publish_words(self, table: L2Table, first: int, words: Entries, bitmaps: Entries) -> None:
        """Replace extended entries by these words (without ZERO or MIXED) and bitmaps."""
        self._publish(table, first, subclusters.summaries(words, bitmaps), bitmaps, unmap=False)

    def _publish(
        self, table: L2Table, first: int, entries: Entries, bitmaps: Entries | None, *, unmap: bool
    ) -> None:
        count = len(entries)
        old = table.entries[first : first + count].copy()
        kept = np.uint64(OFFSET_MASK | COMPRESSED)
        changed = (old & kept) != (entries & kept)
        # Of compressed data every bit says where it lies: two may begin in one sector.
        changed |= ((old & np.uint64(COMPRESSED)) != 0) & (old != entries)
        changed &= (old & kept) != 0
        freed = self._host_ranges(old[changed]) if changed.any() else []
        self._check_freed(freed)
        if self.watch is not None:
            self.watch.entries_changed(table.l1_index, old, entries)
        table.entries[first : first + count] = entries
        if table.bitmaps is not None:
            assert bitmaps is not None
            table.bitmaps[first : first + count] = bitmaps
        self.mark_dirty(table, first, first + count)
        self._free_ranges(freed, unmap=unmap)
        if self.on_remap is not None:
            self._tell(self.on_remap, table, first, count)

    def _tell(
        self, on_remap: Callable[[int, int], None], table: L2Table, first: int, count: int
    ) -> None:
        cluster = table.l1_index * self.geometry.l2_entries + first
        on_remap(cluster << self.geometry.cluster_bits, count << self.geometry.cluster_bits)

    def publish_run(self, table: L2Table, first: int, host_offset: int, count: int) -> None:
        """``count`` entries refer to adjacent clusters from ``host_offset`` on, owned alone."""
        if count == 1 and not table.view[first]:  # by far the most frequent, and 10 times faster
            table.view[first] = host_offset | COPIED
            if self.watch is not None:
                self.watch.cluster_added(table.l1_index, host_offset | COPIED)
            if table.bitmap_view is not None:
                table.bitmap_view[first] = subclusters.ALL_ALLOCATED
            self.mark_dirty(table, first, first + 1)
            if self.on_remap is not None:
                self._tell(self.on_remap, table, first, 1)
            return
        hosts = np.arange(count, dtype=np.uint64) << np.uint64(self.geometry.cluster_bits)
        hosts += np.uint64(host_offset | COPIED)
        replaced = table.entries[first : first + count]
        if self.watch is not None or table.bitmaps is not None or np.count_nonzero(replaced):
            self.publish(table, first, hosts)
            return
        replaced[:] = hosts  # nothing is freed, and nobody counts
        self.mark_dirty(table, first, first + count)
        if self.on_remap is not None:
            self._tell(self.on_remap, table, first, count)

    def _host_ranges(self, entries: Entries) -> list[tuple[int, int]]:
        """(host_offset, clusters) of all that these L2 entries refer to."""
        geometry = self.geometry
        found: list[tuple[int, int]] = []
        if self.has_data_file:  # only metadata has refcounts
            return found
        compressed = (entries & np.uint64(COMPRESSED)) != 0
        for entry in entries[compressed].tolist():
            place = compressed_range(entry, geometry)
            start = place.host_offset >> geometry.cluster_bits
            end = (place.host_offset + place.length - 1) >> geometry.cluster_bits
            found.append((start << geometry.cluster_bits, end - start + 1))
        hosts = entries[~compressed] & np.uint64(OFFSET_MASK)
        if not len(hosts):
            return found
        breaks = np.flatnonzero(hosts[1:] != hosts[:-1] + np.uint64(geometry.cluster_size)) + 1
        starts = [0, *breaks.tolist()]
        for start, end in zip(starts, [*starts[1:], len(hosts)], strict=True):
            found.append((int(hosts[start]), end - start))
        return found

    def _free_ranges(self, ranges: list[tuple[int, int]], *, unmap: bool) -> None:
        """Memory no longer has what referred to these (host_offset, clusters)."""
        self.freed += len(ranges)
        for host_offset, clusters in ranges:
            self.quarantine.free(host_offset, clusters, unmap=unmap)

    def _check_freed(self, ranges: list[tuple[int, int]]) -> None:
        """Raise DamageError if what is to be freed holds metadata by now (``check_in_place``)."""
        bits = self.geometry.cluster_bits
        for host_offset, clusters in ranges:
            first = host_offset >> bits
            if not self.refcounts.metadata.isdisjoint(range(first, first + clusters)):
                raise DamageError(
                    f"Preventing the release of metadata (offset: {host_offset:#x})",
                    offset=host_offset,
                    size=clusters << bits,
                )

    # -- clusters

    async def allocate(self, count: int) -> tuple[int, int, bool]:
        """(host_offset, clusters, fresh) of 1 to ``count`` adjacent clusters.

        ``fresh`` ones were never written to and read as zeros.
        """
        while True:
            refcounts = self.refcounts
            blocks, table = len(refcounts.blocks), refcounts.table_offset
            try:
                host_offset, found = refcounts.allocate(count)
            except BlockNeeded as needed:
                await self.load_block(needed.index)
                continue
            fresh = refcounts.is_fresh(host_offset)
            refcounts.touched(host_offset, found)
            self.on_dirty()
            if refcounts.table_offset != table:
                await self.event(*_NEW_TABLE)
            elif len(refcounts.blocks) != blocks:
                await self.event(*_NEW_BLOCK)
            return host_offset, found, fresh

    async def event(self, *names: str) -> None:
        """QEMU's debug events: steps that requests to the file do not show."""
        listener = getattr(getattr(self.file, "driver", self.file), "debug_event", None)
        if listener is not None:
            for name in names:
                await listener(name)

    async def allocate_data(self, cluster: int, count: int) -> tuple[int, int, bool]:
        """As ``allocate``, for guest clusters from ``cluster`` on, which the caller has claimed."""
        await self.event("cluster_alloc")
        if self.has_data_file:
            return cluster << self.geometry.cluster_bits, count, False
        await self.event("refblock_alloc")
        host_offset, found, fresh = await self.allocate(count)
        return host_offset, found, fresh and self.stores is self.children

    def free_data(self, host_offset: int, clusters: int) -> None:
        """What ``allocate_data`` gave is not going to be used."""
        if not self.has_data_file:
            self.quarantine.free(host_offset, clusters, unmap=False)

    async def allocate_cluster(self) -> int:
        """The host offset of one cluster."""
        return (await self.allocate(1))[0]

    async def allocate_exactly(self, count: int) -> int:
        """The host offset of ``count`` adjacent clusters."""
        while True:
            try:
                host_offset = self.refcounts.allocate_exactly(count)
            except BlockNeeded as needed:
                await self.load_block(needed.index)
                continue
            self.refcounts.touched(host_offset, count)
            self.on_dirty()
            return host_offset

    async def load_block(self, index: int) -> None:
        """Read a refcount block."""
        task = self._loading_blocks.get(index)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load_block(index))
            self._loading_blocks[index] = task
        await asyncio.shield(task)

    async def _load_block(self, index: int) -> None:
        try:
            offset = self.refcounts.block_offset(index)
            data = await read_bytes(self.file, offset, self.geometry.cluster_size)
            if index not in self.refcounts.blocks:
                self.refcounts.evict(self.max_refcount_blocks)
                self.refcounts.add_block(index, data)
        finally:
            del self._loading_blocks[index]
