"""Refcounts of many clusters changed at once, beside those that are in use.

Specification: docs/interop/qcow2, "Host cluster management".

Runs on: pure; ``switch`` loads blocks and writes all of it to new places.
Invariants: those of ``allocator``; what lost its last reference keeps a count of 1 until
``release``, so that it is not handed out while the disk still refers to it.
Errors: ``BlockNeeded``, ``DamageError``, OverflowError (a width of few bits), with nothing changed.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EFBIG

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.allocator import Counts, RefcountBlock, Refcounts, unpack_counts
from liveblockd.formats.qcow2.layout import ENTRY_BYTES, MAX_REFCOUNT_TABLE_BYTES
from liveblockd.formats.qcow2.tables import DamageError, Entries


class ForkedRefcounts(Refcounts):
    """A copy of refcounts, without the blocks: the shell loads copies of them."""

    @classmethod
    def of(cls, refcounts: Refcounts) -> ForkedRefcounts:
        """Make it; ``refcounts`` is not changed by what happens to the copy."""
        other = cls(refcounts.geometry, refcounts.table.copy(), refcounts.table_offset)
        other.metadata = refcounts.metadata.copy()
        other.high_water = refcounts.high_water
        other._first_free = refcounts._first_free
        other._bad = refcounts._bad.copy()
        return other

    def recounted(self, order: int) -> ForkedRefcounts:
        """The same in 2^``order`` bits each, without a place on the disk; all blocks are loaded.

        BlockError where a refcount needs more bits.
        """
        geometry = replace(self.geometry, refcount_order=order)
        per_old, per_new = self.geometry.refcounts_per_block, geometry.refcounts_per_block
        dtype = unpack_counts(bytes(8), order).dtype
        arrays: dict[int, Counts] = {}
        for index, block in sorted(self.blocks.items()):
            clusters = np.flatnonzero(block.counts) + index * per_old
            counts = block.counts[clusters - index * per_old]
            wrong = np.flatnonzero(counts > geometry.refcount_max)
            if len(wrong):
                raise BlockError(
                    f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at offset "
                    f"{int(clusters[wrong[0]]) << geometry.cluster_bits:#x} has a refcount of "
                    f"{int(counts[wrong[0]])}"
                )
            for number in np.unique(clusters // per_new).tolist():
                part = clusters // per_new == number
                target = arrays.setdefault(number, np.zeros(per_new, dtype))
                target[clusters[part] % per_new] = counts[part].astype(dtype)
        entries = max(arrays, default=0) + 1
        per_cluster = geometry.cluster_size // ENTRY_BYTES
        table = np.zeros(-(-entries // per_cluster) * per_cluster, np.uint64)
        if table.nbytes > MAX_REFCOUNT_TABLE_BYTES:
            raise BlockError("The refcount table would be too large", errno=EFBIG)
        other = ForkedRefcounts(geometry, table, 0)
        other.metadata = self.metadata.copy()
        other.high_water = self.high_water
        for number, array in arrays.items():
            block = RefcountBlock(number, 0, array, is_new=False)
            block.dirty.add(0, per_new)
            other.blocks[number] = block
        return other

    def counts_of(self, clusters: Entries) -> Counts:
        """The refcounts of clusters; raises BlockNeeded."""
        per_block = self.geometry.refcounts_per_block
        result = np.zeros(len(clusters), np.uint64)
        for index, where in _by_block(clusters, per_block):
            block = self._block(index)
            if block is not None:
                result[where] = block.counts[(clusters[where] % np.uint64(per_block)).astype(int)]
        return result

    def add_references(self, clusters: Entries) -> None:
        """One reference more to each, twice to one that is named twice. All are in use already.

        Raises BlockNeeded, DamageError, OverflowError (a width of few bits), with nothing changed.
        """
        numbers, times = np.unique(clusters, return_counts=True)
        before = self.counts_of(numbers)
        self._check_in_use(numbers, before, np.ones(len(numbers), np.uint64))
        if (before > np.uint64(self.geometry.refcount_max) - times.astype(np.uint64)).any():
            raise OverflowError
        self._store(numbers, before + times.astype(np.uint64))

    def drop_references(self, clusters: Entries) -> Entries:
        """One reference less to each; those that lost the last one, whose count stays 1.

        So that they are not handed out before the disk knows; ``release`` lets them go.
        """
        numbers, times = np.unique(clusters, return_counts=True)
        before = self.counts_of(numbers)
        self._check_in_use(numbers, before, times.astype(np.uint64))
        after = before - times.astype(np.uint64)
        freed: Entries = numbers[after == 0]
        self._store(numbers, np.maximum(after, np.uint64(1)))
        return freed

    def release(self, clusters: Entries) -> None:
        """These are free from now on."""
        self._store(clusters, np.zeros(len(clusters), np.uint64))
        if len(clusters):
            self._first_free = min(self._first_free, int(clusters.min()))
        self.metadata.remove_many(clusters)

    def move_block(self, block: RefcountBlock, host_offset: int) -> None:
        """The block lies elsewhere from now on."""
        block.host_offset = host_offset
        self.table[block.index] = host_offset
        self.add_metadata(host_offset, 1)

    def move_table(self, host_offset: int) -> None:
        """The table lies elsewhere from now on; the old place is in ``retired``."""
        self.retired.append((self.table_offset, self.table_clusters))
        self.table_offset = host_offset
        self.moved = True
        self.add_metadata(host_offset, self.table_clusters)

    def written(self) -> None:
        """All of it is on the disk, and in use."""
        for block in self.blocks.values():
            block.dirty.clear()
            block.is_new = False
        self.table_dirty.clear()
        self.moved = self.table_unwritten = False
        assert not self.retired

    def _store(self, clusters: Entries, counts: Counts) -> None:
        per_block = self.geometry.refcounts_per_block
        for index, where in _by_block(clusters, per_block):
            block = self.blocks[index]
            within = (clusters[where] % np.uint64(per_block)).astype(int)
            block.counts[within] = counts[where].astype(block.counts.dtype)
            block.dirty.add(int(within.min()), int(within.max()) + 1)

    def _check_in_use(self, clusters: Entries, counts: Counts, least: Counts) -> None:
        wrong = np.flatnonzero(counts < least)
        if len(wrong):
            host_offset = int(clusters[wrong[0]]) << self.geometry.cluster_bits
            raise DamageError(
                f"Refcount of a cluster in use is too low (offset: {host_offset:#x})",
                offset=host_offset,
                size=self.geometry.cluster_size,
            )


def _by_block(clusters: Entries, per_block: int) -> list[tuple[int, slice | Counts]]:
    """(block index, which of the clusters); for sorted clusters that are slices."""
    if not len(clusters):
        return []
    blocks = clusters // np.uint64(per_block)
    if (blocks[1:] < blocks[:-1]).any():
        return [(int(index), np.flatnonzero(blocks == index)) for index in np.unique(blocks)]
    starts = [0, *(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1).tolist()]
    ends = [*starts[1:], len(clusters)]
    return [(int(blocks[a]), slice(a, b)) for a, b in zip(starts, ends, strict=True)]
