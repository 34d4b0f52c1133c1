"""A job's copy of many pieces at once: one allocation, one worker job, one step that publishes.

Specification: README.md, invariant 1; ``storage.driver.BlockDriver.populate_many``.

A chain of many snapshots holds its data in many short runs: a task, a hop to a worker and an
allocation for each cost more than the copy. Here they are collected first, get clusters that lie
side by side, and a worker copies them all.

Runs on: the event loop, in tasks of the engine; ``copy_segments`` on workers.
Invariants: those of ``populate``: clusters are published by compare-and-set; what a guest write has
won or claimed meanwhile, and what is not simply unallocated to begin with, is left to
``populate_from``, which looks again.
Errors: OSError; ``DamageError``; ``HaltedError``. Clusters that were published before it stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.descriptors import Descriptors
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.new_tables import TableMaker
from liveblockd.formats.qcow2.populate import Populator
from liveblockd.runtime import halting
from liveblockd.storage import copy_engine, segments
from liveblockd.storage.copy_engine import Copied
from liveblockd.storage.driver import HostFile, Source
from liveblockd.storage.flags import runs_of
from liveblockd.storage.segments import Segment

#: L2 tables that a batch keeps in memory, and which part of what the image may have there
MAX_TABLES = 64
TABLES_SHARE = 8
#: a batch of fewer spans than this has no tables made by a worker
FEWEST_SPANS = 3


class _Piece(NamedTuple):
    """Clusters within one L2 table that were unallocated."""

    table: L2Table
    first_entry: int
    clusters: int
    source: HostFile
    source_offset: int  # bytes


class _Part(NamedTuple):
    """``clusters`` of a piece from its ``first`` on, with their place."""

    piece: _Piece
    first: int
    clusters: int
    host_offset: int


def copy_segments(batch: Sequence[Segment], fd: int, cluster_size: int, direct: bool) -> Copied:
    """On a worker: ``segments.copy_segments``, with (duplicated) descriptors."""
    return segments.copy_segments(batch, fd, cluster_size, direct=direct)


class Gatherer:
    """See the module."""

    def __init__(self, metadata: Metadata, claims: Claims, populator: Populator) -> None:
        self._metadata = metadata
        self._claims = claims
        self._populator = populator
        self._descriptors = Descriptors()
        self._maker = TableMaker(metadata, populator.copying, self._descriptors)
        #: pieces that were copied in batches
        self.gathered = 0

    def target(self) -> HostFile | None:
        """The host file for copies that can be gathered, if they can."""
        if self._metadata.has_data_file or not self._populator.has_zero_clusters:
            return None
        return self._metadata.data.host_file()

    async def populate(self, sources: Sequence[Source]) -> None:
        """See ``BlockDriver.populate_many``."""
        left: list[Source] = []
        pieces: list[_Piece] = []
        tables: set[int] = set()
        target = self.target()
        if target is not None:
            sources = await self._populate_new_spans(sources, target, left)
        try:
            plain: list[Source] = []
            for source in sources:
                if target is None or not self._is_plain(source, target):
                    left.append(source)
                else:
                    plain.append(source)
            if target is not None:
                for group in _side_by_side(plain, self._metadata.geometry.span):
                    await self._collect(group, target, pieces, tables, left)
                await self._copy(pieces, target, left)
        finally:
            _unpin(pieces)
        for source in left:
            await self._populator.populate_from(*source)

    async def _populate_new_spans(
        self, sources: Sequence[Source], target: HostFile, left: list[Source]
    ) -> Sequence[Source]:
        """Copy what goes where there are no tables yet; the others."""
        span = self._metadata.geometry.span
        sources = sorted(sources, key=lambda source: source.offset)
        first, last = sources[0].offset // span, sources[-1].offset // span
        if last - first + 1 < FEWEST_SPANS or not self._maker.takes:
            return sources
        new: list[Source] = []
        others: list[Source] = []
        for source in sources:
            plain = source.offset % span + source.length <= span
            plain = plain and self._maker.is_free(source.offset // span)
            (new if plain and self._is_plain(source, target) else others).append(source)
        if new:
            copied = await self._maker.populate(new, target, left)
            self._account(len(new), copied)
        return others

    def _account(self, pieces: int, copied: Copied) -> None:
        self.gathered += pieces
        self._populator.cloned += copied.cloned
        self._populator.copied += (
            len(copied.zero) * self._metadata.geometry.cluster_size - copied.cloned
        )

    def _is_plain(self, source: Source, target: HostFile) -> bool:
        """Whole clusters, of which O_DIRECT asks nothing that a worker does not do."""
        size = self._metadata.geometry.cluster_size
        if (source.offset | source.length) % size:
            return False
        blocks = (source.source_offset | size) % copy_engine.CLONE_ALIGNMENT == 0
        return blocks or not (source.file.direct or target.direct)

    async def _collect(
        self,
        group: list[Source],
        target: HostFile,
        pieces: list[_Piece],
        tables: set[int],
        left: list[Source],
    ) -> None:
        """Put what is unallocated into ``pieces``, its table pinned; anything else is ``left``.

        The sources of the group lie side by side, within one table. ``tables`` are those of the
        pieces; when they are enough these are copied first.
        """
        metadata = self._metadata
        bits, entries = metadata.geometry.cluster_bits, metadata.geometry.l2_entries
        most = max(1, min(MAX_TABLES, metadata.max_tables // TABLES_SHARE))
        first = group[0].offset >> bits
        count = (group[-1].offset + group[-1].length >> bits) - first
        if len(tables) >= most and first // entries not in tables:
            await self._copy(pieces, target, left)
            tables.clear()
        table = await metadata.writable(first // entries)
        # From here on no await: what was looked at is pinned.
        if table.bad:
            left += group
            return
        index = first & (entries - 1)
        tables.add(table.l1_index)
        free = self._claims.free_count(first, count) == count
        if free and not table.entries[index : index + count].any():  # by far the most frequent
            for offset, length, file, at in group:
                place = (offset >> bits) & (entries - 1)
                pieces.append(_Piece(table, place, length >> bits, file, at))
            table.pins += len(group)
            return
        for source in group:
            self._collect_empty(table, source, pieces, left)

    def _collect_empty(
        self, table: L2Table, source: Source, pieces: list[_Piece], left: list[Source]
    ) -> None:
        """What a guest has written in between is held already: its neighbours go together."""
        geometry = self._metadata.geometry
        bits = geometry.cluster_bits
        index = (source.offset >> bits) & (geometry.l2_entries - 1)
        count = source.length >> bits
        offset, at = source.offset, source.source_offset
        if self._claims.free_count(offset >> bits, count) < count:
            left.append(source)
            return
        empty = table.entries[index : index + count] == 0
        for first, last in runs_of(~empty & ~table.holds(index, count)):
            there, length = first << bits, (last - first) << bits
            left.append(Source(offset + there, length, source.file, at + there))
        for first, last in runs_of(empty):
            table.pins += 1
            there = at + (first << bits)
            pieces.append(_Piece(table, index + first, last - first, source.file, there))

    async def _copy(self, pieces: list[_Piece], target: HostFile, left: list[Source]) -> None:
        """Allocate, copy and publish; ``pieces`` is empty and unpinned afterwards.

        What was lost to a guest write is ``left``: that write may fail.
        """
        if not pieces:
            return
        metadata, copies = self._metadata, self._populator.copying(target)
        size = metadata.geometry.cluster_size
        places: list[tuple[int, int]] = []
        try:
            await self._allocate(sum(piece.clusters for piece in pieces), places)
            parts = list(_match(pieces, places, size))
            with self._descriptors.borrow() as duplicate:
                batch = _segments(parts, duplicate, size)
                fd = duplicate(target)
                copied = await halting.run(copies, copy_segments, batch, fd, size, target.direct)
        except BaseException:
            for host_offset, count in places:
                metadata.free_data(host_offset, count)
            raise
        # From here on no await: compare and set.
        zero = copied.zero if copied.zero.any() else None
        number = 0
        for run in _joined(parts, size):
            end = number + sum(part.clusters for part in run)
            done = self._populator.publish_copy(
                run[0].piece.table,
                run[0].piece.first_entry + run[0].first,
                run[0].host_offset,
                end - number,
                None if zero is None else zero[number:end],
                claimed=False,
            )
            if not done:
                left += [self._source_of(part) for part in run]
            number = end
        self._account(len(pieces), copied)
        _unpin(pieces)

    def _source_of(self, part: _Part) -> Source:
        geometry = self._metadata.geometry
        piece = part.piece
        cluster = piece.table.l1_index * geometry.l2_entries + piece.first_entry + part.first
        bits = geometry.cluster_bits
        at = piece.source_offset + (part.first << bits)
        return Source(cluster << bits, part.clusters << bits, piece.source, at)

    async def _allocate(self, count: int, places: list[tuple[int, int]]) -> None:
        """``count`` clusters, in as few runs as there are; added to ``places`` as they come."""
        while count:
            host_offset, found, _ = await self._metadata.allocate(count)
            places.append((host_offset, found))
            count -= found


def _side_by_side(sources: Sequence[Source], span: int) -> Iterator[list[Source]]:
    """The sources in order, cut where a table ends, in groups without a gap within one table."""
    group: list[Source] = []
    end = -1
    for source in sources:
        offset, rest, file, at = source
        while rest:
            length = min(rest, span - offset % span)
            if offset != end or not offset % span:
                if group:
                    yield group
                group = []
            group.append(source if length == source.length else Source(offset, length, file, at))
            offset, rest, at = offset + length, rest - length, at + length
            end = offset
    if group:
        yield group


def _joined(parts: Sequence[_Part], size: int) -> Iterator[list[_Part]]:
    """The parts in order, together that lie side by side in the table as well as in the file."""
    run: list[_Part] = []
    entry = host_offset = -1
    table: L2Table | None = None
    for part in parts:
        first = part.piece.first_entry + part.first
        if part.piece.table is not table or first != entry or part.host_offset != host_offset:
            if run:
                yield run
            run = []
        run.append(part)
        table, entry = part.piece.table, first + part.clusters
        host_offset = part.host_offset + part.clusters * size
    if run:
        yield run


def _match(
    pieces: Sequence[_Piece], places: Sequence[tuple[int, int]], size: int
) -> Iterator[_Part]:
    """The pieces in order, cut where a place ends."""
    if len(places) == 1:  # by far the most frequent
        host_offset = places[0][0]
        for piece in pieces:
            yield _Part(piece, 0, piece.clusters, host_offset)
            host_offset += piece.clusters * size
        return
    where = iter(places)
    host_offset = room = 0
    for piece in pieces:
        first = 0
        while first < piece.clusters:
            if not room:
                host_offset, room = next(where)
            count = min(room, piece.clusters - first)
            yield _Part(piece, first, count, host_offset)
            host_offset += count * size
            room -= count
            first += count


def _segments(
    parts: Sequence[_Part], duplicate: Callable[[HostFile], int], size: int
) -> list[Segment]:
    """For a worker, with descriptors for it."""
    return [
        Segment(
            duplicate(part.piece.source),
            part.piece.source_offset + part.first * size,
            part.host_offset,
            part.clusters * size,
            part.piece.source.direct,
            part.piece.source.read_flags,
        )
        for part in parts
    ]


def _unpin(pieces: list[_Piece]) -> None:
    for piece in pieces:
        piece.table.pins -= 1
    pieces.clear()
