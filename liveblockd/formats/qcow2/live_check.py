"""Checks an image while guests read and write it; gives leaked clusters back on request.

Specification: docs/interop/qcow2; the verdicts are those of ``qemu-img check`` (``check``).

Runs on: the event loop, in pieces of a few milliseconds; ``scan`` yields between them. How it can:

* What memory has is the truth. Every change of an entry is counted as it happens
  (``LiveReferences``), so that at any instant the counts are exact for the tables looked at.
* A refcount may exceed its references for a while: clusters that a request has allocated but not
  published, and those that were freed but whose refcount has not fallen yet. The latter are known
  (``Committer.pending``); for the former a block whose refcounts do not fit is looked at once more
  while no request is in flight: ``quiesced`` gives that, for a few milliseconds and without I/O.

Invariants: nothing is written but refcounts of leaked clusters, which memory and disk refer to less
often than that, by the engine's own commits; nothing at all once a corruption was found, or while
nobody knows which header the disk has. Whatever is no change of an entry (snapshots, bitmaps, a
resize) begins the check anew.
Errors: OSError, ``BlockError``; EAGAIN when the image changes all the time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from errno import EAGAIN, EBUSY, EIO
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.allocator import Counts, RefcountBlock, unpack_counts
from liveblockd.formats.qcow2.bitmap_references import count_bitmaps
from liveblockd.formats.qcow2.check import CheckResult, L1Tables, L2Format, examine_l1, examine_l2
from liveblockd.formats.qcow2.layout import (
    COPIED,
    ENTRY_BYTES,
    MAX_L1_BYTES,
    OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Extension,
)
from liveblockd.formats.qcow2.live_references import WINDOW, LiveReferences
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.formats.qcow2.tables import Entries, from_disk
from liveblockd.storage.driver import Quiesced

if TYPE_CHECKING:
    from liveblockd.formats.qcow2.image import Qcow2

_U = np.uint64
#: refcounts that are compared while no request is in flight: about 2 ms
_QUIESCED_CLUSTERS: Final = 1 << 18
_RESTARTS: Final = 5


class _ChangedError(Exception):
    """What was counted is no longer so."""


class LiveCheck:
    """One check of an open image; ``done`` and ``total`` in bytes of tables."""

    def __init__(
        self, image: Qcow2, quiesced: Quiesced, *, fix_leaks: bool, window: int = WINDOW
    ) -> None:
        self._image = image
        self._quiesced = quiesced
        self._fix_leaks = fix_leaks
        self._window = window
        self.result = CheckResult()
        self.done = self.total = 0

    async def scan(self) -> AsyncGenerator[int]:
        """All of it; yields after each piece how many bytes of tables it has looked at."""
        if self._image.being_checked:
            raise BlockError("The image is being checked already", errno=EBUSY)
        self._image.being_checked = True
        try:
            async with aclosing(self._attempts()) as attempts:
                async for count in attempts:
                    yield count
        finally:
            self._image.being_checked = False

    async def _attempts(self) -> AsyncGenerator[int]:
        for _ in range(_RESTARTS):
            self.result, self.done = CheckResult(), 0
            run = _Run(self._image, self._quiesced, self.result, fix_leaks=self._fix_leaks)
            try:
                async with aclosing(run.scan(self._window)) as pieces:
                    async for count in pieces:
                        self.total = run.total
                        self.done = min(self.total, self.done + count)
                        yield count
                return
            except _ChangedError:
                continue
            finally:
                run.end()
        raise OSError(EAGAIN, "The image changes too often to be checked")


class _Run:
    """One attempt."""

    def __init__(
        self, image: Qcow2, quiesced: Quiesced, result: CheckResult, *, fix_leaks: bool
    ) -> None:
        self.image = image
        self.metadata = metadata = image._metadata
        self.geometry = metadata.geometry
        self.committer = image._committer
        self.quiesced = quiesced
        self.result = result
        self.fix_leaks = fix_leaks
        self.form = L2Format(
            self.geometry, extended=self.geometry.extended_l2, data_file=metadata.has_data_file
        )
        self.fingerprint = self._fingerprint()
        self.end_cluster = self.geometry.clusters(self._limit())
        self.inactive = L1Tables()
        self.snapshot_l1s: list[tuple[int, int]] = []
        self.total = 0
        self.live: LiveReferences
        self._raw = np.zeros(0, np.uint64)

    def end(self) -> None:
        """Changes need not be told any more."""
        self.metadata.watch = None

    # -- whether it is still the same image

    def _fingerprint(self) -> tuple[Any, ...]:
        metadata = self.metadata
        header = metadata.header
        return (
            header.extensions, header.snapshots_offset, header.nb_snapshots, header.autoclear,
            header.refcount_order, header.version, metadata.l1_offset, len(metadata.l1),
        )  # fmt: skip

    def _check_same(self) -> None:
        image = self.image
        if image._closed:
            raise BlockError("The image was closed during the check")
        if image._damaged:
            raise OSError(EIO, "The image is corrupt")
        if image._metadata is not self.metadata or self._fingerprint() != self.fingerprint:
            raise _ChangedError

    def _limit(self) -> int:
        """Bytes that the file has, or will have when everything is written."""
        high = self.metadata.refcounts.high_water << self.geometry.cluster_bits
        return max(self.metadata.file.length, high)

    # -- the scan

    async def scan(self, window: int) -> AsyncGenerator[int]:
        """In windows of host clusters."""
        self._examine_once()
        await self._read_snapshots()
        size = self.geometry.cluster_size
        windows = range(0, self.end_cluster, window)
        blocks = -(-self.end_cluster // self.geometry.refcounts_per_block)
        tables = np.count_nonzero(self.metadata.l1 & _U(OFFSET_MASK)) + len(self.inactive.offsets)
        self.total = (len(windows) * int(tables) + blocks) * size
        for first in windows:
            yield 0
            self._begin_window(first, min(first + window, self.end_cluster))
            yield 0
            await self._count_fixed()
            yield 0
            async with aclosing(self._count_tables(first_time=first == 0)) as pieces:
                async for count in pieces:
                    yield count
            suspects: list[int] = []
            per_block = self.geometry.refcounts_per_block
            for index in range(first // per_block, -(-self.live.end // per_block)):
                if await self._is_suspect(index):
                    suspects.append(index)
                yield size
            async with aclosing(self._judge(suspects, fix=False)) as pieces:
                async for count in pieces:
                    yield count
            if self.fix_leaks and not (self.result.corruptions or self.result.check_errors):
                async with aclosing(self._judge(suspects, fix=True)) as pieces:
                    async for count in pieces:
                        yield count
        self._check_same()
        self.result.image_end_offset *= size
        self.result.total_clusters = self.geometry.clusters(self.metadata.header.size)

    def _begin_window(self, first: int, end: int) -> None:
        self._check_same()
        metadata = self.metadata
        # What all windows see is counted as an error by the first of them.
        result = self.result if first == 0 else CheckResult()
        self.live = LiveReferences(
            self.geometry, first, end, metadata.l1, data_file=metadata.has_data_file,
            result=result, limit=self._limit(),
        )  # fmt: skip
        metadata.watch = self.live

    def _examine_once(self) -> None:
        """L1 entries, and the refcount table: whether they can be."""
        examine_l1(self.metadata.l1, self.geometry, self.result)
        table = self.metadata.refcounts.table
        end = self.geometry.clusters(self._limit()) * self.geometry.cluster_size
        for index in np.flatnonzero(table).tolist():
            entry = int(table[index])
            if entry & REFCOUNT_TABLE_RESERVED:
                self.result.corrupt(f"refcount table entry {index} has reserved bits set")
            elif entry % self.geometry.cluster_size:
                self.result.corrupt(
                    f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif entry >= end:
                self.result.corrupt(f"refcount block {index} is outside image")

    async def _read_snapshots(self) -> None:
        """Their L1 tables: nothing changes those but what changes the header."""
        for snapshot in self.image._snapshots.snapshots:
            length = snapshot.l1_size * ENTRY_BYTES
            name = f"snapshot {snapshot.id} ({snapshot.name})"
            if self.metadata.header.version >= 3 and snapshot.disk_size is None:
                self.result.corrupt(f"{name}: snapshot table entry is incomplete")
            if snapshot.l1_table_offset % self.geometry.cluster_size or length > MAX_L1_BYTES:
                self.result.corrupt(f"{name}: L1 table cannot be; snapshot table entry corrupted")
            elif length:
                self.snapshot_l1s.append((snapshot.l1_table_offset, length))
                data = await read_bytes(self.metadata.file, snapshot.l1_table_offset, length)
                offsets = examine_l1(from_disk(data), self.geometry, self.result)
                self.inactive.add(offsets, active=False)

    async def _count_fixed(self) -> None:
        """What is neither an L2 table of the disk nor a refcount structure."""
        metadata, live, size = self.metadata, self.live, self.geometry.cluster_size
        header = metadata.header
        live.add_range(0, size)
        live.add_range(metadata.l1_offset, len(metadata.l1) * ENTRY_BYTES)
        live.add_range(header.snapshots_offset, self.image._snapshots._length)
        for offset, length in self.snapshot_l1s:
            live.add_range(offset, length)
        live.add_tables(self.inactive.offsets.repeat(self.inactive.total), 1)
        crypto = header.extension(Extension.ENCRYPTION)
        if crypto is not None and len(crypto) >= 16:
            offset, length = np.frombuffer(crypto[:16], ">u8").tolist()
            live.add_range(offset, min(length, 1 << 40))
        await count_bitmaps(metadata.file, header, live, live.result)
        self._check_same()

    async def _count_tables(self, *, first_time: bool) -> AsyncGenerator[int]:
        metadata, live = self.metadata, self.live
        for index in np.flatnonzero(~live.counted).tolist():
            words = await self._words(index)
            live.limit = self._limit()
            if words is not None:
                live.count_table(index, words)
                if first_time:
                    self._examine(words)
            self._check_same()
            yield self.geometry.cluster_size
        for offset, times in zip(self.inactive.offsets, self.inactive.total, strict=True):
            if offset < _U(self._limit()):
                data = await read_bytes(metadata.file, int(offset), self.geometry.cluster_size)
                raw = from_disk(data)
                live.count_inactive(raw[:: self.form.words], int(times))
                if first_time:
                    examine_l2(raw, self.form, self.result, int(times))
            self._check_same()
            yield self.geometry.cluster_size

    async def _words(self, l1_index: int) -> Entries | None:
        """The words of a table that name clusters, as they are at this instant."""
        metadata, live = self.metadata, self.live
        while True:
            table = metadata.tables.get(l1_index)
            if table is not None:
                self._raw = from_disk(table.to_disk(0, len(table.entries)))
                return self._raw[:: self.form.words]
            offset = metadata.l1_view[l1_index] & OFFSET_MASK
            if offset >= self._limit():
                return np.zeros(0, np.uint64)  # counted as beyond the end
            live.touched.discard(l1_index)
            data = await read_bytes(metadata.file, offset, self.geometry.cluster_size)
            self._check_same()
            if l1_index not in live.touched and l1_index not in metadata.tables:
                self._raw = from_disk(data)
                return self._raw[:: self.form.words]
            if live.counted[l1_index]:
                return None

    def _examine(self, words: Entries) -> None:
        result = self.result
        if not len(words):
            return
        findings = examine_l2(self._raw, self.form, result)
        compressed = len(findings.compressed)
        result.compressed_clusters += compressed
        result.allocated_clusters += len(findings.clusters) + compressed
        result.fragmented_clusters += findings.fragmented
        if self.form.data_file:
            named = (words & _U(OFFSET_MASK)) != 0
            if wrong := int((named & ((words & _U(COPIED)) == 0)).sum()):
                result.corrupt("OFLAG_COPIED is missing for clusters of the data file", wrong)

    # -- comparing

    async def _stored(self, index: int) -> Counts | None:
        """Refcounts of a block; None: it cannot be read."""
        refcounts = self.metadata.refcounts
        block = refcounts.blocks.get(index)
        if block is not None:
            return block.counts
        offset = int(refcounts.table[index]) if index < len(refcounts.table) else 0
        if offset % self.geometry.cluster_size:
            return None
        size = self.geometry.cluster_size
        data = await read_bytes(self.metadata.file, offset, size) if offset else bytes(size)
        self._check_same()
        block = refcounts.blocks.get(index)
        if block is not None:
            return block.counts
        return unpack_counts(data, self.geometry.refcount_order)

    async def _is_suspect(self, index: int) -> bool:
        """Whether the refcounts of a block do not fit at this instant."""
        stored = await self._stored(index)
        return stored is None or self._differences(index, stored, CheckResult()) is not None

    def _differences(
        self, index: int, stored: Counts, result: CheckResult
    ) -> tuple[int, Entries, Entries] | None:
        """(first cluster, refcounts, references) of a block, None where all of it is right.

        Counts what is wrong.
        """
        live, per_block = self.live, self.geometry.refcounts_per_block
        first = max(index * per_block, live.first)
        end = min((index + 1) * per_block, live.end)
        part = slice(first - live.first, end - live.first)
        base = index * per_block
        present = stored[first - base : end - base].astype(np.uint64)
        wanted = live.counts[part].astype(np.uint64)
        twice = self._add_structures(wanted, first, end)
        highest = np.flatnonzero(present | wanted)
        if len(highest):
            last = first + int(highest[-1]) + 1
            self.result.image_end_offset = max(self.result.image_end_offset, last)
        surplus = wanted - np.minimum(wanted, _U(self.geometry.refcount_max))
        self._add_pending(wanted, first, end)
        flags = int(live.flagged[part][present != 1].sum())
        flags += int(live.unflagged[part][present == 1].sum())
        if not (flags or twice or surplus.any() or (present != wanted).any()):
            return None
        wanted = np.minimum(wanted, _U(self.geometry.refcount_max))
        for cluster in np.flatnonzero(present != wanted)[:64].tolist():
            word = "ERROR" if present[cluster] < wanted[cluster] else "Leaked"
            result.say(
                f"{word} cluster {first + cluster} refcount={present[cluster]} "
                f"reference={wanted[cluster]}"
            )
        if flags:
            result.corrupt(f"OFLAG_COPIED: {flags} entries of refcount block {index}", flags)
        if twice:
            result.corrupt(f"refcount structures are referred to elsewhere: {twice}", twice)
        result.corruptions += int((present < wanted).sum()) + int(surplus.sum())
        result.leaks += int((present > wanted).sum())
        return first, present, wanted

    def _add_structures(self, wanted: Entries, first: int, end: int) -> int:
        """The refcount table and its blocks; how many of these are something else as well."""
        refcounts, bits = self.metadata.refcounts, self.geometry.cluster_bits
        low = max(first, refcounts.table_offset >> bits)
        high = min(end, (refcounts.table_offset >> bits) + refcounts.table_clusters)
        if low < high:
            wanted[low - first : high - first] += _U(1)
        table = refcounts.table
        entries = table[(table != 0) & ((table & _U(self.geometry.cluster_size - 1)) == 0)]
        blocks = entries >> _U(bits)
        places = (blocks[(blocks >= _U(first)) & (blocks < _U(end))] - _U(first)).astype(np.intp)
        np.add.at(wanted, places, _U(1))
        return int((wanted[places] != 1).sum())

    def _add_pending(self, wanted: Entries, first: int, end: int) -> None:
        """Clusters that nothing refers to any more; their refcounts fall later."""
        bits = self.geometry.cluster_bits
        for offset, clusters in self.committer.pending():
            low, high = max(first, offset >> bits), min(end, (offset >> bits) + clusters)
            if low < high:
                wanted[low - first : high - first] += _U(1)

    async def _judge(self, suspects: list[int], *, fix: bool) -> AsyncGenerator[int]:
        """Look at blocks again while nothing is in flight: what is wrong then is wrong."""
        span = min(self.geometry.refcounts_per_block, self.live.end - self.live.first)
        step = max(1, min(self.metadata.max_refcount_blocks, _QUIESCED_CLUSTERS // span))
        for start in range(0, len(suspects), step):
            part = suspects[start : start + step]
            pinned = await self._load(part)
            try:
                async with self.quiesced():
                    await self.image._settle()
                    self._check_same()
                    for index in part:
                        self._judge_block(index, fix=fix)
            finally:
                for block in pinned:
                    block.pins -= 1
            yield 0

    async def _load(self, indices: list[int]) -> list[RefcountBlock]:
        """Have blocks in memory, pinned, as far as they can be read."""
        metadata = self.metadata
        refcounts = metadata.refcounts
        pinned: list[RefcountBlock] = []
        try:
            for index in indices:
                if index < len(refcounts.table) and refcounts.table[index]:
                    while not refcounts.is_bad(index) and index not in refcounts.blocks:
                        await metadata.load_block(index)
                if (block := refcounts.blocks.get(index)) is not None:
                    block.pins += 1
                    pinned.append(block)
            self._check_same()
        except BaseException:
            for block in pinned:
                block.pins -= 1
            raise
        return pinned

    def _judge_block(self, index: int, *, fix: bool) -> None:
        refcounts = self.metadata.refcounts
        block = refcounts.blocks.get(index)
        if block is None and index < len(refcounts.table) and refcounts.table[index]:
            if not fix:
                self.result.check_errors += 1
                self.result.say(f"Can't get refcounts of refcount block {index}")
            return
        per_block = self.geometry.refcounts_per_block
        stored = block.counts if block is not None else np.zeros(per_block, np.uint64)
        found = self._differences(index, stored, CheckResult() if fix else self.result)
        if not fix or found is None or block is None:
            return
        if self.image.read_only or self.committer.header_uncertain:
            return
        first, present, wanted = found
        for place in np.flatnonzero(present > wanted).tolist():
            cluster, count = first + place, int(wanted[place])
            if not count and cluster in refcounts.metadata:
                continue  # it would be refused when it is handed out
            refcounts.lower(cluster, count)
            self.result.leaks -= 1
            self.result.leaks_fixed += 1
        self.metadata.on_dirty()
