"""Refcounts, and where new clusters go.

Specification: docs/interop/qcow2, "Host cluster management".

Runs on: pure; the shell (``metadata``) loads blocks and writes what ``seal`` gives it.
Refcount blocks are held unpacked: one array element for each refcount, whatever its width.

Invariants: a refcount in memory is never below the number of references that memory or the disk
has (decrements come here only after the removal of the reference is durable); a cluster is handed
out only if its refcount is 0 and it holds no known metadata; what ``seal`` took is either durable
afterwards or given back by ``reopen``.
Errors: ``BlockNeeded`` (load that block and call again; nothing was changed), ``DamageError``,
OSError(EFBIG) where the format ends.
"""

from __future__ import annotations

from errno import EFBIG
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.guarded import GuardedClusters
from liveblockd.formats.qcow2.layout import ENTRY_BYTES, MAX_HOST_OFFSET, SECTOR, Geometry
from liveblockd.formats.qcow2.tables import (
    DamageError,
    Entries,
    bad_refcount_table_entries,
    flags_at,
    repeated,
    shown,
    to_disk,
)
from liveblockd.storage.driver import Buffer
from liveblockd.storage.flags import first_true, run_length

Counts = npt.NDArray[Any]

_DTYPES: dict[int, np.dtype[Any]] = {
    3: np.dtype(">u1"),
    4: np.dtype(">u2"),
    5: np.dtype(">u4"),
    6: np.dtype(">u8"),
}


def unpack_counts(data: bytes | bytearray | memoryview, order: int) -> Counts:
    """The refcounts in a block's bytes, one native unsigned integer each."""
    if order >= 3:
        dtype = _DTYPES[order]
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
    raw = np.frombuffer(data, dtype=np.uint8)
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)


def pack_counts(counts: Counts, order: int) -> bytes:
    """The bytes on disk; for widths below 8 the number of counts must fill whole bytes."""
    if order >= 3:
        return counts.astype(_DTYPES[order]).tobytes()
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = counts.astype(np.uint8).reshape(-1, 8 // bits) << shifts
    packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=1).astype(np.uint8)
    return packed.tobytes()


class BlockNeeded(Exception):  # noqa: N818 - a request, not an error
    """The refcount block ``index`` must be loaded first."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Write(NamedTuple):
    """Bytes for the image file."""

    offset: int
    data: bytes


class DirtyRange:
    """The smallest range of entries that holds all that were changed."""

    __slots__ = ("high", "low")

    def __init__(self) -> None:
        self.low = 1 << 62
        self.high = 0

    def __bool__(self) -> bool:
        return self.low < self.high

    def add(self, low: int, high: int) -> None:
        """Entries ``low`` up to, not including, ``high`` were changed."""
        # Twice as fast as min() and max(), once a write that allocates
        if low < self.low:
            self.low = low
        if high > self.high:
            self.high = high

    def clear(self) -> None:
        """Nothing is changed."""
        self.low = 1 << 62
        self.high = 0

    def take(self) -> tuple[int, int]:
        """The range, which is cleared."""
        taken = (self.low, self.high)
        self.clear()
        return taken


class RefcountBlock:
    """One refcount block in memory; indices are refcounts within it."""

    __slots__ = ("counts", "dirty", "host_offset", "index", "is_new", "pins", "used", "view")

    def __init__(self, index: int, host_offset: int, counts: Counts, *, is_new: bool) -> None:
        self.index = index
        self.host_offset = host_offset
        self.counts = counts
        self.view: memoryview = memoryview(cast(Buffer, counts))
        self.dirty = DirtyRange()
        #: the refcount table on disk does not name it: it is written whole, before the table
        self.is_new = is_new
        #: what was sealed is being written: it must not be read from the disk
        self.pins = 0
        self.used = True

    def fill(self, first: int, count: int, value: int) -> None:
        """Set refcounts."""
        self.counts[first : first + count] = value
        self.dirty.add(first, first + count)


class SealedRefcounts(NamedTuple):
    """What must reach the disk; the blocks in ``new`` before the table entries."""

    new: list[tuple[RefcountBlock, Write]]
    blocks: list[tuple[RefcountBlock, tuple[int, int], Write]]
    table: list[Write]
    table_range: tuple[int, int] | None
    #: the table lies at a new place and is written whole
    table_whole: bool


class Refcounts:
    """The refcount table, the blocks in memory, and the search for free clusters."""

    def __init__(self, geometry: Geometry, table: Entries, table_offset: int) -> None:
        self.geometry = geometry
        self._per_block = geometry.refcounts_per_block
        #: clusters that the format can have
        self._end = MAX_HOST_OFFSET >> geometry.cluster_bits
        self.table = table
        self.table_offset = table_offset
        self.blocks: dict[int, RefcountBlock] = {}
        #: indices of clusters with metadata: never handed out, never data of a guest
        self.metadata = GuardedClusters()
        self.table_dirty = DirtyRange()
        #: the table was moved and the header does not name the new place yet
        self.moved = False
        #: the table at its new place was not yet written whole
        self.table_unwritten = False
        #: (host_offset, clusters) of tables that were replaced; the shell frees them
        self.retired: list[tuple[int, int]] = []
        #: index of a cluster below which none is free
        self._first_free = 1
        #: table entries that cannot be used
        self._bad = flags_at(bad_refcount_table_entries(table, geometry), len(table))
        #: first cluster index that the file has never reached; see ``is_fresh``
        self.high_water = 0
        #: host offset behind compressed data, in a cluster that has room for more; 0: none has
        self.packed_end = 0

    @property
    def table_clusters(self) -> int:
        """Clusters of the refcount table."""
        return self.geometry.clusters(len(self.table) * ENTRY_BYTES)

    # -- metadata clusters

    def refuse_blocks_at(self, clusters: Entries) -> None:
        """Blocks that lie at one of these clusters, or where another block is, cannot be used."""
        indices = np.flatnonzero(self.table)
        blocks = self.table[indices] >> np.uint64(self.geometry.cluster_bits)
        clash = np.isin(blocks, clusters) | repeated(blocks)
        self._bad[indices[clash]] = True

    def add_metadata(self, host_offset: int, clusters: int) -> None:
        """These clusters hold metadata from now on."""
        first = host_offset >> self.geometry.cluster_bits
        self.metadata.add(first, clusters)

    def remove_metadata(self, host_offset: int, clusters: int) -> None:
        """No longer."""
        first = host_offset >> self.geometry.cluster_bits
        self.metadata.remove(first, clusters)

    # -- blocks

    def block_offset(self, index: int) -> int:
        """Host offset of a block, 0 where there is none; raises DamageError."""
        if index < len(self._bad) and self._bad[index]:
            raise DamageError(
                f"Refblock offset {int(self.table[index]):#x} unaligned "
                f"(reftable index: {shown(index)})",
            )
        return int(self.table[index]) if index < len(self.table) else 0

    def is_bad(self, index: int) -> bool:
        """Whether the block cannot be: its table entry is no place for one."""
        return index < len(self._bad) and bool(self._bad[index])

    def add_block(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """A block that was read from the disk."""
        counts = unpack_counts(data, self.geometry.refcount_order)
        self.blocks[index] = RefcountBlock(index, int(self.table[index]), counts, is_new=False)

    def _block(self, index: int) -> RefcountBlock | None:
        """The block, None where the image has none; raises BlockNeeded."""
        block = self.blocks.get(index)
        if block is None:
            if self.block_offset(index):
                raise BlockNeeded(index)
            return None
        block.used = True
        return block

    def evict(self, keep: int) -> None:
        """Forget clean blocks that were not used since the last call, down to ``keep`` blocks."""
        for index in list(self.blocks):
            if len(self.blocks) <= keep:
                return
            block = self.blocks[index]
            if block.dirty or block.is_new or block.pins:
                continue
            if block.used:
                block.used = False
                continue
            del self.blocks[index]

    # -- reading and changing refcounts

    def refcount(self, cluster: int) -> int:
        """The refcount of a cluster; raises BlockNeeded."""
        index, within = divmod(cluster, self.geometry.refcounts_per_block)
        block = self._block(index)
        return int(block.counts[within]) if block else 0

    def single(self, cluster: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of ``count`` clusters have the refcount 1; raises BlockNeeded."""
        found = np.zeros(count, np.bool_)
        done = 0
        for index, within, length in self._pieces(cluster, count):
            block = self._block(index)
            if block is not None:
                found[done : done + length] = block.counts[within : within + length] == 1
            done += length
        return found

    def decrement(self, cluster: int, count: int) -> None:
        """One reference less to each of ``count`` clusters; the removal is durable.

        Raises DamageError, with nothing changed, where there was none.
        """
        pieces = list(self._pieces(cluster, count))
        for index, within, length in pieces:
            block = self._block(index)
            if block is None or not block.counts[within : within + length].all():
                host_offset = cluster << self.geometry.cluster_bits
                raise DamageError(
                    f"Refcount of a cluster in use is 0 (offset: {host_offset:#x})",
                    offset=host_offset,
                    size=count << self.geometry.cluster_bits,
                )
        for index, within, length in pieces:
            block = self.blocks[index]
            part = block.counts[within : within + length]
            part -= 1
            block.dirty.add(within, within + length)
            if not part.all():
                self._first_free = min(self._first_free, cluster)

    def lower(self, cluster: int, count: int) -> None:
        """Nothing, on the disk or in memory, refers more than ``count`` times to the cluster.

        Its block is loaded. A check found that; all else goes by ``decrement``.
        """
        index, within = divmod(cluster, self.geometry.refcounts_per_block)
        block = self.blocks[index]
        assert count < int(block.counts[within])
        block.fill(within, 1, count)
        self.stop_packing(cluster, 1)
        if not count:
            self._first_free = min(self._first_free, cluster)

    def _pieces(self, cluster: int, count: int) -> list[tuple[int, int, int]]:
        """(block index, index within, length) for a range of clusters."""
        per_block = self.geometry.refcounts_per_block
        pieces = []
        while count:
            index, within = divmod(cluster, per_block)
            length = min(count, per_block - within)
            pieces.append((index, within, length))
            cluster += length
            count -= length
        return pieces

    # -- allocation

    def allocate(self, count: int) -> tuple[int, int]:
        """(host_offset, clusters) of 1 to ``count`` adjacent clusters, whose refcount is now 1."""
        if count == 1 and (next_one := self._take_next()):
            return next_one << self.geometry.cluster_bits, 1
        start, found = self._search(self._first_free, count, exact=False)
        self._first_free = start + found
        self._claim(start, found)
        return start << self.geometry.cluster_bits, found

    def _take_next(self) -> int:
        """The cluster where the search begins, if it is free and its block in memory; else 0.

        What a guest's write to a new cluster needs, nearly always: a third of the general way.
        """
        cluster = self._first_free
        index, within = divmod(cluster, self._per_block)
        block = self.blocks.get(index)
        if block is None or block.view[within] or cluster >= self._end or cluster in self.metadata:
            return 0
        block.used = True
        block.view[within] = 1
        block.dirty.add(within, within + 1)
        self._first_free = cluster + 1
        return cluster

    def give_back(self, host_offset: int) -> None:
        """Nobody has heard of the one cluster that ``allocate`` has just given, nor will."""
        cluster = host_offset >> self.geometry.cluster_bits
        index, within = divmod(cluster, self._per_block)
        self.blocks[index].fill(within, 1, 0)
        self._first_free = min(self._first_free, cluster)

    def allocate_exactly(self, count: int) -> int:
        """The host offset of ``count`` adjacent clusters, whose refcount is now 1."""
        start, _ = self._search(self._first_free, count, exact=True)
        # Only when nothing free was passed by does the search begin behind it the next time.
        if start == self._first_free:
            self._first_free = start + count
        self._claim(start, count)
        return start << self.geometry.cluster_bits

    def allocate_bytes(self, length: int) -> int:
        """The host offset of less than a cluster of bytes, at any alignment, for compressed data.

        Every cluster that they touch counts one reference more. Raises BlockNeeded.
        """
        bits, size = self.geometry.cluster_bits, self.geometry.cluster_size
        assert 0 < length < size
        start = self.packed_end
        cluster = start >> bits
        if start and self.refcount(cluster) >= self.geometry.refcount_max:
            start = 0
        if not start or length > size - start % size:
            new, _ = self.allocate(1)
            self.touched(new, 1)
            if not start or new >> bits != cluster + 1:
                self.packed_end = new + length
                return new
        index, within = divmod(cluster, self.geometry.refcounts_per_block)
        block = self.blocks[index]
        block.fill(within, 1, int(block.counts[within]) + 1)
        end = start + length
        self.packed_end = end if end % size else 0
        return start

    def stop_packing(self, cluster: int, count: int) -> None:
        """No more compressed data goes to these clusters: one of them may be freed."""
        if cluster <= self.packed_end >> self.geometry.cluster_bits < cluster + count:
            self.packed_end = 0

    def is_fresh(self, host_offset: int) -> bool:
        """Whether the file never reached ``host_offset``: reads as zeros. Call after allocating."""
        return host_offset >> self.geometry.cluster_bits >= self.high_water

    def touched(self, host_offset: int, clusters: int) -> None:
        """The clusters may hold something from now on."""
        end = (host_offset >> self.geometry.cluster_bits) + clusters
        self.high_water = max(self.high_water, end)

    def _claim(self, start: int, count: int) -> None:
        if not self.metadata.isdisjoint(range(start, start + count)):
            bits = self.geometry.cluster_bits
            raise DamageError(
                f"Refcount of a metadata cluster is 0 (offset: {start << bits:#x})",
                offset=start << bits,
                size=count << bits,
            )
        for index, within, length in self._pieces(start, count):
            self.blocks[index].fill(within, length, 1)

    def _search(self, start: int, count: int, *, exact: bool) -> tuple[int, int]:
        """The first free cluster from ``start`` on and how many free ones follow, up to count."""
        per_block = self.geometry.refcounts_per_block
        cluster = start
        run_start, run = start, 0  # free clusters that reach up to ``cluster``
        none_free = start == self._first_free
        while True:
            index, within = divmod(cluster, per_block)
            if cluster << self.geometry.cluster_bits >= MAX_HOST_OFFSET:
                raise OSError(EFBIG, "File too large")
            block = self._block(index) if index < len(self.table) else None
            if block is None:
                index = self._create_blocks(index, count if exact else 1)
                cluster = max(cluster, index * per_block)
                within = cluster - index * per_block
                block = self.blocks[index]
                none_free = False
            while within < per_block:
                if run == 0:
                    skip = self._next_zero(block, within)
                    if skip is None:
                        break
                    none_free = False
                    within = skip
                    run_start = index * per_block + within
                length = min(count - run, per_block - within)
                free = self._zeros_at(block, within, length)
                run += free
                within += free
                if run == count or (run and not exact):
                    return run_start, run
                if free < length:
                    run = 0
            cluster = (index + 1) * per_block
            if none_free:  # the search goes on from here when a block must be loaded first
                self._first_free = cluster

    @staticmethod
    def _next_zero(block: RefcountBlock, within: int) -> int | None:
        if block.view[within] == 0:
            return within
        # In pieces: the free cluster is mostly near, and the comparison looks at all it is given.
        counts = block.counts
        piece = 1024
        while within < len(counts):
            part = counts[within : within + piece] == 0
            hit = first_true(part)
            if hit >= 0:
                return within + hit
            within += piece
            piece *= 4
        return None

    @staticmethod
    def _zeros_at(block: RefcountBlock, within: int, length: int) -> int:
        if length == 1:
            return int(block.view[within] == 0)
        return run_length(block.counts[within : within + length] == 0)

    def _create_blocks(self, index: int, count: int) -> int:
        """Refcount blocks for clusters none of which is in use; the index of the first.

        They lie side by side in the first of these clusters, so that ``count`` clusters can follow
        them without a gap, however few clusters a block describes.
        """
        per_block = self.geometry.refcounts_per_block
        blocks = -(-count // (per_block - 1))
        if index + blocks > len(self.table):
            return self._grow_table(index, blocks)
        if blocks > 1 and self.table[index : index + blocks].any():
            blocks = 1
        self._add_new_blocks(index, blocks, blocks)
        self.table_dirty.add(index, index + blocks)
        self.touched(index * per_block << self.geometry.cluster_bits, blocks)
        return index

    def _grow_table(self, index: int, needed: int) -> int:
        """Move the table to a larger place behind all that it can describe; the first new index.

        There is room for ``needed`` more blocks behind those that describe the table itself.

        Blocks and table lie side by side at the start of what the new blocks describe. The disk
        keeps the old table until the header names the new one.
        """
        geometry = self.geometry
        per_block = geometry.refcounts_per_block
        per_cluster = geometry.table_entries
        index = max(index, len(self.table))
        entries = max(len(self.table) * 3 // 2, index + needed + 1)
        while True:
            entries = -(-entries // per_cluster) * per_cluster
            clusters = entries // per_cluster
            blocks = -(-clusters // (per_block - 1))
            if index + blocks + needed <= entries:
                break
            entries = index + blocks + needed
        entries = min(entries, geometry.max_refcount_blocks)
        clusters = entries // per_cluster
        if index + blocks > entries:
            raise OSError(EFBIG, "File too large")
        base = index * per_block
        if (base + blocks + clusters) << geometry.cluster_bits > MAX_HOST_OFFSET:
            raise OSError(EFBIG, "File too large")
        if not self.metadata.isdisjoint(range(base, base + blocks + clusters)):
            raise DamageError(
                "Metadata lies beyond all refcounts", offset=base << geometry.cluster_bits
            )
        old = (self.table_offset, self.table_clusters)
        table = np.zeros(entries, np.uint64)
        table[: len(self.table)] = self.table
        self.table = table
        self._add_new_blocks(index, blocks, blocks + clusters)
        self.table_offset = (base + blocks) << geometry.cluster_bits
        self.add_metadata(self.table_offset, clusters)
        self.touched(base << geometry.cluster_bits, blocks + clusters)
        self.table_dirty.clear()
        self.moved = self.table_unwritten = True
        self.retired.append(old)
        return index

    def _add_new_blocks(self, index: int, blocks: int, clusters_in_use: int) -> None:
        """Blocks from ``index`` on, at the start of what they describe, of which some is used."""
        geometry = self.geometry
        per_block = geometry.refcounts_per_block
        base = index * per_block
        if not self.metadata.isdisjoint(range(base, base + blocks)):
            raise DamageError(
                "Metadata lies where no refcounts are", offset=base << geometry.cluster_bits
            )
        dtype = _DTYPES[max(3, geometry.refcount_order)].newbyteorder("=")
        for number in range(blocks):
            host_offset = (base + number) << geometry.cluster_bits
            counts = np.zeros(per_block, dtype)
            block = RefcountBlock(index + number, host_offset, counts, is_new=True)
            block.dirty.add(0, per_block)
            self.blocks[index + number] = block
            self.table[index + number] = host_offset
        self.add_metadata(base << geometry.cluster_bits, blocks)
        for block_index, within, length in self._pieces(base, clusters_in_use):
            self.blocks[block_index].fill(within, length, 1)

    # -- writing back

    @property
    def is_dirty(self) -> bool:
        """Whether there is anything to write."""
        return (
            bool(self.table_dirty)
            or self.table_unwritten
            or any(block.dirty for block in self.blocks.values())
        )

    def seal(self) -> SealedRefcounts:
        """Copies of all that is dirty; marks it clean, and pins the blocks (the caller unpins)."""
        new, blocks = [], []
        for block in self.blocks.values():
            if not block.dirty:
                continue
            taken = block.dirty.take()
            block.pins += 1
            if block.is_new:
                data = pack_counts(block.counts, self.geometry.refcount_order)
                new.append((block, Write(block.host_offset, data)))
            else:
                blocks.append((block, taken, self._block_write(block, *taken)))
        table: list[Write] = []
        table_range = None
        if self.table_unwritten:
            table.append(Write(self.table_offset, to_disk(self.table)))
            self.table_dirty.clear()
        elif self.table_dirty:
            table_range = self.table_dirty.take()
            per_sector = SECTOR // ENTRY_BYTES
            low = table_range[0] // per_sector * per_sector
            high = -(-table_range[1] // per_sector) * per_sector
            data = to_disk(self.table[low:high])
            table.append(Write(self.table_offset + low * ENTRY_BYTES, data))
        return SealedRefcounts(new, blocks, table, table_range, self.table_unwritten)

    def _block_write(self, block: RefcountBlock, low: int, high: int) -> Write:
        order = self.geometry.refcount_order
        per_sector = SECTOR * 8 >> order
        low = low // per_sector * per_sector
        high = -(-high // per_sector) * per_sector
        data = pack_counts(block.counts[low:high], order)
        return Write(block.host_offset + (low // per_sector) * SECTOR, data)

    def reopen(self, sealed: SealedRefcounts) -> None:
        """What ``seal`` took did not (surely) become durable: it is dirty again."""
        for block, _ in sealed.new:
            block.dirty.add(0, len(block.counts))
        for block, taken, _ in sealed.blocks:
            block.dirty.add(*taken)
        if sealed.table_range is not None:
            self.table_dirty.add(*sealed.table_range)
