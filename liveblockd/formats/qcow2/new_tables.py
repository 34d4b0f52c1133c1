"""A job's copy into a part of the disk for which the image has no L2 tables yet.

Specification: docs/interop/qcow2, "Cluster mapping"; README.md, invariant 1;
``storage.driver.BlockDriver.populate_many``.

Data that is scattered over an immense disk wants thousands of L2 tables with next to nothing in
them. To make each in memory and to write it with the next commit costs more than its data; here
the worker that copies the data writes the tables as well, and one step puts them into the L1 table.

Runs on: the event loop; ``copy_with_tables`` on workers.
Invariants: nothing refers to the new tables, nor to the data, before the L1 entries are set, which
the disk gets after a flush that makes both durable (``commit``): tables and data that were written
before a crash, an error or a lost race are leaked clusters at worst. An L1 entry is set only if it
is still 0 (compare and set): where a guest write has made a table meanwhile, that one stays.
Where an L1 entry is 0 nobody has a claim on a cluster of its span, for claims come after tables.
Errors: OSError, ``HaltedError``; then nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.descriptors import Descriptors
from liveblockd.formats.qcow2.l2table import PAGE
from liveblockd.formats.qcow2.layout import COPIED, ENTRY_BYTES, ZERO
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.tables import Entries
from liveblockd.runtime import halting
from liveblockd.runtime.workers import Lane, WorkerPool
from liveblockd.storage import copy_engine, hostcalls
from liveblockd.storage.copy_engine import Copied, Zeroes
from liveblockd.storage.driver import HostFile, Source
from liveblockd.storage.many_writes import Batch, write_many
from liveblockd.storage.segments import Segment, copy_segments

#: bytes of tables that are made at a time
BUFFER = 1 << 20

_Indices = npt.NDArray[np.int64]


class NewTables(NamedTuple):
    """L2 tables that are to be written, and the clusters of their entries, in order of the disk."""

    #: of each table: its L1 index, its host offset, whether its cluster was never written to
    l1_indices: _Indices
    offsets: Entries
    fresh: list[bool]
    #: where the clusters of each table begin, and where those of the last one end
    bounds: list[int]
    #: of each cluster: its entry in the table, its host offset
    indices: _Indices
    hosts: Entries


def copy_with_tables(
    segments: Sequence[Segment], fd: int, cluster_size: int, direct: bool, tables: NewTables
) -> Copied:
    """On a worker: copy the clusters, write the tables, with (duplicated) descriptors."""
    copied = copy_segments(segments, fd, cluster_size, direct=direct)
    for batch in table_writes(tables, copied.zero, cluster_size):
        write_many(fd, batch, alignment=copy_engine.CLONE_ALIGNMENT if direct else 0)
    return copied


def table_writes(tables: NewTables, zero: Zeroes, cluster_size: int) -> Iterator[Batch]:
    """What makes the tables; clusters that are ``zero`` become zero clusters.

    Where the host has zeros anyway that is a page, if only one is used. ``BUFFER`` bytes at a time.
    """
    words = np.where(zero, np.uint64(ZERO), tables.hosts | np.uint64(COPIED))
    bounds = np.array(tables.bounds)
    page = min(PAGE, cluster_size)
    first = tables.indices[bounds[:-1]] // (page // ENTRY_BYTES)
    last = tables.indices[bounds[1:] - 1] // (page // ENTRY_BYTES)
    whole = (first != last) | ~np.array(tables.fresh)
    whole[tables.offsets.argmax()] = True  # for no table lies beyond the end
    begins = np.where(whole, 0, first * page)
    lengths = np.where(whole, cluster_size, page)
    for start, end in _groups(lengths):
        low, high = bounds[start], bounds[end]
        part = lengths[start:end]
        data = np.frombuffer(hostcalls.aligned_buffer(int(part.sum())), np.uint8)
        data[:] = 0
        shift = np.cumsum(part) - part - begins[start:end]
        shift = np.repeat(shift // ENTRY_BYTES, np.diff(bounds[start : end + 1]))
        data.view(">u8")[tables.indices[low:high] + shift] = words[low:high]
        offsets = tables.offsets[start:end].astype(np.int64) + begins[start:end]
        yield Batch(offsets, part, data)


def _groups(lengths: _Indices) -> Iterator[tuple[int, int]]:
    """From and to, in turn, of lengths that together are at most ``BUFFER``, or one alone."""
    ends = np.cumsum(lengths)
    start = done = 0
    while start < len(lengths):
        end = max(start + 1, int(ends.searchsorted(done + BUFFER, "right")))
        yield start, end
        start, done = end, int(ends[end - 1])


class TableMaker:
    """See the module."""

    def __init__(
        self,
        metadata: Metadata,
        copying: Callable[[HostFile], Lane | WorkerPool],
        descriptors: Descriptors,
    ) -> None:
        self._metadata = metadata
        self._descriptors = descriptors
        self._copying = copying
        #: L1 indices for which a batch is on its way: two that make one table copy in vain
        self._making: set[int] = set()
        #: tables that came into the image this way
        self.made = 0

    @property
    def takes(self) -> bool:
        """Whether this way is open: no check is counting references, entries are plain."""
        return self._metadata.watch is None and not self._metadata.geometry.extended_l2

    def is_free(self, l1_index: int) -> bool:
        """Whether there is no table, nor one on its way."""
        view = self._metadata.l1_view
        return l1_index < len(view) and not view[l1_index] and l1_index not in self._making

    async def populate(
        self, sources: Sequence[Source], target: HostFile, left: list[Source]
    ) -> Copied:
        """Copy whole clusters into spans that have no table; what was lost to a guest is ``left``.

        ``sources`` come in the order of the disk, each within one span that ``is_free``.
        """
        metadata = self._metadata
        size = metadata.geometry.cluster_size
        taken: list[tuple[int, int]] = []
        making = {source.offset // metadata.geometry.span for source in sources}
        self._making |= making
        try:
            tables = await self._allocate(sources, taken)
            with self._descriptors.borrow() as duplicate:
                segments = _segments(sources, tables.hosts, duplicate, size)
                fd = duplicate(target)
                copied = await halting.run(
                    self._copying(target),
                    copy_with_tables, segments, fd, size, target.direct, tables,
                )  # fmt: skip
        except BaseException:
            for host_offset, clusters in taken:
                metadata.quarantine.free(host_offset, clusters, unmap=False)
            raise
        finally:
            self._making -= making
        # From here on no await: compare and set.
        self._publish(sources, tables, copied, left)
        return copied

    async def _allocate(self, sources: Sequence[Source], taken: list[tuple[int, int]]) -> NewTables:
        """Places for data and tables; added to ``taken`` as they come."""
        metadata = self._metadata
        geometry = metadata.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        first = np.array([source.offset >> bits for source in sources], np.int64)
        counts = np.array([source.length >> bits for source in sources], np.int64)
        begins = np.cumsum(counts) - counts  # of each source: its first cluster in the batch
        clusters = np.repeat(first - begins, counts) + np.arange(counts.sum())
        spans = clusters >> geometry.l2_bits
        bounds = np.flatnonzero(np.diff(spans, prepend=-1))
        offsets, fresh = await self._clusters(len(bounds), taken)
        hosts, _ = await self._clusters(len(clusters), taken)
        assert size * len(hosts) == sum(source.length for source in sources)
        return NewTables(
            spans[bounds],
            offsets,
            fresh,
            [*bounds.tolist(), len(clusters)],
            clusters & (geometry.l2_entries - 1),
            hosts,
        )

    async def _clusters(
        self, count: int, taken: list[tuple[int, int]]
    ) -> tuple[Entries, list[bool]]:
        """Host offsets of so many clusters, and which were never written to."""
        bits = np.uint64(self._metadata.geometry.cluster_bits)
        parts: list[Entries] = []
        fresh: list[bool] = []
        while count:
            host_offset, found, new = await self._metadata.allocate(count)
            taken.append((host_offset, found))
            parts.append(np.uint64(host_offset) + (np.arange(found, dtype=np.uint64) << bits))
            fresh += [new] * found
            count -= found
        return np.concatenate(parts), fresh

    def _publish(
        self, sources: Sequence[Source], tables: NewTables, copied: Copied, left: list[Source]
    ) -> None:
        """The tables are written: the L1 entries that are still 0 name them."""
        metadata = self._metadata
        wins = np.zeros(len(tables.l1_indices), np.bool_)
        if self.takes and int(tables.l1_indices[-1]) < len(metadata.l1):
            wins = metadata.l1[tables.l1_indices] == 0
        freed = copied.zero
        if wins.any():
            metadata.add_written_tables(tables.l1_indices[wins], tables.offsets[wins])
            self.made += int(wins.sum())
        if not wins.all():
            lost = np.repeat(~wins, np.diff(tables.bounds))
            freed = freed | lost
            self._free(tables.offsets[~wins])
            spans = set(tables.l1_indices[~wins].tolist())
            span = metadata.geometry.span
            left += [source for source in sources if source.offset // span in spans]
        if freed.any():
            self._free(tables.hosts[freed])

    def _free(self, host_offsets: Entries) -> None:
        """Clusters, in any order, that nothing will refer to."""
        size = self._metadata.geometry.cluster_size
        breaks = np.flatnonzero(np.diff(host_offsets) != size) + 1
        for run in np.split(host_offsets, breaks):
            self._metadata.quarantine.free(int(run[0]), len(run), unmap=False)


def _segments(
    sources: Sequence[Source], hosts: Entries, duplicate: Callable[[HostFile], int], size: int
) -> list[Segment]:
    """For a worker, with descriptors for it."""
    segments = []
    places = hosts.tolist()
    number = 0
    for _, length, file, source_offset in sources:
        end = number + length // size
        fd = duplicate(file)
        while number < end:
            first = number
            number += 1
            while number < end and places[number] == places[number - 1] + size:
                number += 1
            part = (number - first) * size
            segments.append(
                Segment(fd, source_offset, places[first], part, file.direct, file.read_flags)
            )
            source_offset += part
    return segments
