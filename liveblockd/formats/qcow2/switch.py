"""Much of the metadata changed at one instant: new tables beside the old ones, then one sector.

Specification: docs/interop/qcow2, "Header", "Host cluster management".

An internal snapshot raises the refcount of every cluster, and with that takes the COPIED flag from
every L2 entry. Done in place, a crash would leave flags and refcounts that contradict each other.
Here every table that changes, refcount blocks among them, is written to a cluster that was free;
all that is durable before the first sector of the image, which names the L1 table, the refcount
table and the snapshot table, switches from the old state to the new one.

Runs on: the event loop, in a task of the engine, with no request in flight and all metadata
written back; the caller holds ``Committer.lock``.
Invariants: until the switch nothing that the disk refers to is overwritten and memory is as it was.
What is dropped is not handed out again before the switch.
Errors: OSError, ``DamageError``; ``BlockError`` where a refcount has too few bits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from errno import EINVAL
from typing import Any, TypeVar

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.allocator import BlockNeeded, RefcountBlock, pack_counts
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.layout import COMPRESSED, ENTRY_BYTES, OFFSET_MASK, SECTOR, Geometry
from liveblockd.formats.qcow2.metadata import Metadata, read_bytes
from liveblockd.formats.qcow2.references import ForkedRefcounts
from liveblockd.formats.qcow2.tables import (
    DamageError,
    Entries,
    UnsettledError,
    bad_l1_entries,
    drop_idle_flags,
    from_disk,
    to_disk,
)

T = TypeVar("T")
_U = np.uint64


class Switch:
    """A new state in the making."""

    def __init__(self, metadata: Metadata, committer: Committer) -> None:
        self._metadata = metadata
        self._committer = committer
        self.geometry = metadata.geometry
        self.refcounts = ForkedRefcounts.of(metadata.refcounts)
        self._freed: list[Entries] = []

    # -- refcounts

    async def _with_blocks(self, function: Callable[..., T], *arguments: Any) -> T:
        while True:
            try:
                return function(*arguments)
            except BlockNeeded as needed:
                await self._load_block(needed.index)

    async def _load_block(self, index: int) -> None:
        metadata = self._metadata
        known = metadata.refcounts.blocks.get(index)
        offset = self.refcounts.block_offset(index)
        if known is not None:
            block = RefcountBlock(index, offset, known.counts.copy(), is_new=False)
            self.refcounts.blocks[index] = block
        else:
            data = await read_bytes(metadata.file, offset, self.geometry.cluster_size)
            self.refcounts.add_block(index, data)

    async def add(self, clusters: Entries) -> None:
        """One reference more to each of these clusters."""
        try:
            await self._with_blocks(self.refcounts.add_references, clusters)
        except OverflowError:
            raise BlockError(
                f"A cluster would have more than {self.geometry.refcount_max} references, which "
                f"refcounts of {self.geometry.refcount_bits} bits cannot tell",
                errno=EINVAL,
            ) from None

    async def drop(self, clusters: Entries) -> None:
        """One reference less."""
        self._freed.append(await self._with_blocks(self.refcounts.drop_references, clusters))

    async def drop_range(self, host_offset: int, length: int) -> None:
        """One reference less to the clusters that hold ``length`` bytes."""
        first = host_offset >> self.geometry.cluster_bits
        count = self.geometry.clusters(length)
        await self.drop(np.arange(first, first + count, dtype=np.uint64))

    async def counts(self, clusters: Entries) -> Entries:
        """The refcounts as they will be."""
        return await self._with_blocks(self.refcounts.counts_of, clusters)

    async def _allocate(self, clusters: int) -> int:
        host_offset = await self._with_blocks(self.refcounts.allocate_exactly, clusters)
        self.refcounts.touched(host_offset, clusters)
        # If this fails later, the clusters are free but do not read as zeros any more; nor do
        # those of refcount blocks that were made on the way.
        known = self._metadata.refcounts
        known.high_water = max(known.high_water, self.refcounts.high_water)
        return host_offset

    # -- tables

    async def write(self, data: bytes) -> int:
        """Write a table to clusters of its own; its host offset."""
        geometry = self.geometry
        clusters = max(1, geometry.clusters(len(data)))
        host_offset = await self._allocate(clusters)
        self.refcounts.add_metadata(host_offset, clusters)
        data = data.ljust(clusters * geometry.cluster_size, b"\0")
        file = self._metadata.file
        if not file.write_nowait(host_offset, data):
            await file.write(host_offset, data)
        return host_offset

    async def write_data(self) -> int:
        """A cluster that reads as zeros, for the disk; its host offset."""
        host_offset = await self._allocate(1)
        # Data, no table: of an encrypted image zeros in the file would be noise decrypted.
        await self._metadata.data.write(host_offset, bytes(self.geometry.cluster_size))
        return host_offset

    async def recount(self, order: int) -> None:
        """Refcounts of 2^``order`` bits; the first thing that is done with a switch."""
        old = self.refcounts
        used = np.flatnonzero(old.table).tolist()
        for index in used:
            if index not in old.blocks:
                await self._load_block(index)
        self.refcounts = old.recounted(order)
        places = old.table[used] >> _U(self.geometry.cluster_bits)
        await self.drop(places)
        length = old.table_clusters << self.geometry.cluster_bits
        await self.drop_range(old.table_offset, length)

    async def read_l1(self, host_offset: int, entries: int) -> Entries:
        """An L1 table; raises DamageError for one with entries that cannot be."""
        l1 = from_disk(await self._read(host_offset, entries * ENTRY_BYTES))
        self.check_l1(l1)
        return l1

    def check_l1(self, l1: Entries) -> None:
        """Raise DamageError for entries that cannot be."""
        bad = bad_l1_entries(l1, self.geometry)
        if len(bad):
            raise DamageError(f"L1 entry {int(bad[0]):#x} cannot be")

    async def read_l2(self, l1_entry: int) -> Entries:
        """The raw L2 table of an L1 entry; raises DamageError for one that cannot be."""
        host_offset = l1_entry & OFFSET_MASK
        raw = from_disk(await self._read(host_offset, self.geometry.cluster_size))
        drop_idle_flags(words(raw, self.geometry))
        bad = self._metadata.bad_entries(words(raw, self.geometry))
        if bad:
            raise DamageError(
                f"L2 entry cannot be (L2 offset: {host_offset:#x}, L2 index: {min(bad):#x})",
                offset=host_offset,
                size=self.geometry.cluster_size,
            )
        await asyncio.sleep(0)  # thousands of tables, each a fraction of a millisecond
        return raw

    async def _read(self, host_offset: int, length: int) -> bytes:
        file = self._metadata.file
        if host_offset + length > -(-file.length // SECTOR) * SECTOR:
            raise DamageError(
                f"A table lies beyond the end of the file (offset: {host_offset:#x})",
                offset=host_offset,
                size=length,
            )
        return bytes(await read_bytes(file, host_offset, length))

    # -- the end

    async def commit(self, l1: Entries, **fields: Any) -> list[tuple[int, int]]:
        """Put the new state in place; ``fields`` of the header, ``l1`` its L1 table.

        What became free: (host_offset, length), adjacent clusters joined. An error before the
        switch leaves the old state.
        """
        metadata = self._metadata
        await self._relocate()
        freed = np.unique(np.concatenate([*self._freed, np.zeros(0, np.uint64)]))
        self.refcounts.release(freed)
        await self._write_refcounts()
        await metadata.file.flush()
        header = replace(
            metadata.header,
            refcount_table_offset=self.refcounts.table_offset,
            refcount_table_clusters=self.refcounts.table_clusters,
            l1_size=len(l1),
            **fields,
        )
        old = metadata.header
        try:
            await self._committer.write_header(header)
        except BaseException as error:
            await self._back_to(old, error)
            raise
        self.refcounts.written()
        metadata.adopt(header, l1, self.refcounts)
        return _ranges(freed, self.geometry)

    async def _back_to(self, header: Any, error: BaseException) -> None:
        """Nobody knows which header the disk has: write the old one, or nothing any more.

        Either names a sound state, as long as nothing is allocated over the other's tables.
        """
        try:
            await self._committer.write_header(header)
        except BaseException:
            damage = UnsettledError(f"The header may be the old one or the new one: {error}")
            with contextlib.suppress(Exception):
                self._committer.on_damage(damage)
            self._committer.damaged = True
            raise

    async def _relocate(self) -> None:
        """New places for the refcount table and every block that changes.

        Each move changes refcounts itself, until no block is left that was not moved.
        """
        refcounts = self.refcounts
        bits = self.geometry.cluster_bits
        moved: set[int] = set()
        while True:
            pending = [
                block
                for block in refcounts.blocks.values()
                if block.dirty and not block.is_new and block.index not in moved
            ]
            for block in pending:
                host_offset = await self._allocate(1)
                old = block.host_offset >> bits
                refcounts.move_block(block, host_offset)
                moved.add(block.index)
                if old:  # not of refcounts that were made anew
                    await self.drop(np.array([old], np.uint64))
            if not pending and not refcounts.moved:
                clusters = refcounts.table_clusters
                host_offset = await self._allocate(clusters)
                if refcounts.moved:  # it grew to find room for itself, and is moved by that
                    await self.drop_range(host_offset, clusters << bits)
                else:
                    refcounts.move_table(host_offset)
                continue
            if not pending and not refcounts.retired:
                return
            while refcounts.retired:
                host_offset, clusters = refcounts.retired.pop()
                if host_offset:
                    await self.drop_range(host_offset, clusters << bits)

    async def _write_refcounts(self) -> None:
        refcounts = self.refcounts
        file = self._metadata.file
        for block in refcounts.blocks.values():
            if block.dirty:
                data = pack_counts(block.counts, refcounts.geometry.refcount_order)
                await file.write(block.host_offset, data)
        size = refcounts.table_clusters * self.geometry.cluster_size
        await file.write(refcounts.table_offset, to_disk(refcounts.table).ljust(size, b"\0"))


def words(raw: Entries, geometry: Geometry) -> Entries:
    """The words of an L2 table that name clusters (a view; of extended entries every other)."""
    return raw[:: len(raw) // geometry.l2_entries]


def references(entries: Entries, geometry: Geometry) -> Entries:
    """The clusters that L2 entries refer to, each as often as they do."""
    compressed = (entries & _U(COMPRESSED)) != 0
    hosts = entries[~compressed] & _U(OFFSET_MASK)
    found = [hosts[hosts != 0] >> _U(geometry.cluster_bits)]
    packed = entries[compressed]
    if len(packed):
        bits = geometry.compressed_offset_bits
        starts = packed & _U((1 << bits) - 1)
        sectors = ((packed >> _U(bits)) & _U((1 << (62 - bits)) - 1)) + _U(1)
        ends = starts - starts % _U(SECTOR) + sectors * _U(SECTOR) - _U(1)
        first, last = starts >> _U(geometry.cluster_bits), ends >> _U(geometry.cluster_bits)
        steps = [first + _U(step) for step in range(int((last - first).max()) + 1)]
        found += [clusters[clusters <= last] for clusters in steps]
    return np.concatenate(found)


def _ranges(clusters: Entries, geometry: Geometry) -> list[tuple[int, int]]:
    if not len(clusters):
        return []
    bits = geometry.cluster_bits
    breaks = np.flatnonzero(clusters[1:] != clusters[:-1] + _U(1)) + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(clusters)]
    return [
        (int(clusters[start]) << bits, (end - start) << bits)
        for start, end in zip(starts, ends, strict=True)
    ]
