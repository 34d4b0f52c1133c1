"""Checks an image, table by table, and repairs it on request.

Specification: docs/interop/qcow2; ``qemu-img check`` for what is counted and what is repaired.

Runs on: the event loop, which it gives back between tables. The image is closed, or open here and
quiesced with all of its metadata on the disk. Memory: one counter for each host cluster of the
file, the offsets of the L2 tables, and a handful of tables; an image that names one table a
million times costs as much as one that names it once.

Invariants: without ``fix`` nothing is written. A repair raises a refcount before it relies on it,
and every step leaves an image that is less wrong than before (``repair``).

Errors: ``OSError`` where a table cannot be read or written, ``BlockError`` where there is no image
to check.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from errno import EFBIG, EIO
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2 import repair
from liveblockd.formats.qcow2.bitmap_references import count_bitmaps
from liveblockd.formats.qcow2.check import (
    CheckResult,
    Fix,
    L1Tables,
    L2Format,
    References,
    allocated,
    compare,
    copied_errors,
    examine_l1,
    examine_l2,
)
from liveblockd.formats.qcow2.header import Header
from liveblockd.formats.qcow2.layout import (
    ENTRY_BYTES,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Extension,
    Incompatible,
)
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.formats.qcow2.opening import read_header
from liveblockd.formats.qcow2.snapshots import Incomplete, Snapshot, parse_snapshots
from liveblockd.formats.qcow2.stored_refcounts import StoredRefcounts
from liveblockd.formats.qcow2.tables import Entries, from_disk
from liveblockd.storage.driver import BlockIO

#: as QEMU: more clusters than that are not checked
MAX_CLUSTERS: Final = (1 << 31) - 1
_YIELD_EVERY: Final = 16  # tables
#: what may be missing at the end of a file that was cut off: bytes beside twice the disk, clusters
_MORE_THAN_DISK: Final = 1 << 30
_MAX_MISSING: Final = 1 << 26

_U = np.uint64


async def check_image(file: BlockIO, *, fix: Fix = Fix.NONE) -> CheckResult:
    """The verdict on the image in ``file``; with ``fix`` what is left after the repair.

    Counts are those of ``qemu-img check``. Raises OSError (EIO also when leaks were to be repaired
    and clusters in use have no refcount) and BlockError.
    """
    header, _ = await read_header(file)
    return await _Check(file, header, fix).run()


async def repair_dirty(file: BlockIO) -> None:
    """A writer with lazy refcounts was interrupted: make the refcounts right; raises BlockError."""
    try:
        result = await check_image(file, fix=Fix.ALL)
    except OSError as error:
        raise BlockError.from_os_error("Could not repair dirty image", error) from error
    if result.check_errors:  # as QEMU: other damage is found when it is met
        raise BlockError("Could not repair dirty image: Input/output error", errno=EIO)


class L2Table(NamedTuple):
    """One L2 table that was read."""

    host_offset: int
    table: Entries
    total: int  # L1 entries that name it
    active: int  # of these, in the active L1 table


class _Check:
    """One run."""

    def __init__(self, file: BlockIO, header: Header, fix: Fix) -> None:
        self.file = file
        self.header = header
        self.geometry = header.geometry
        self.fix = fix
        self.form = L2Format(
            self.geometry,
            extended=bool(header.incompatible & Incompatible.EXTENDED_L2),
            data_file=bool(header.incompatible & Incompatible.DATA_FILE),
        )
        self.result = CheckResult()
        self.l1_tables = L1Tables()
        self.l1 = np.zeros(0, np.uint64)
        self.stored: StoredRefcounts
        self.references: References
        self.rebuild = False
        #: host offsets (first, end) in bytes of what no L2 table may lie in
        self.fixed: list[tuple[int, int]] = []
        #: (host offset of the L2 table, index of the entry): misaligned zero clusters
        self.to_zero: list[tuple[int, int]] = []

    async def run(self) -> CheckResult:
        """All of it."""
        header, geometry, result = self.header, self.geometry, self.result
        if geometry.clusters(self.file.length) > MAX_CLUSTERS:
            result.check_errors += 1
            raise OSError(EFBIG, "File too large")
        result.total_clusters = geometry.clusters(header.size)
        snapshots, snapshots_length = await self._snapshots()
        table = await self._entries(
            header.refcount_table_offset,
            header.refcount_table_clusters * geometry.cluster_size // ENTRY_BYTES,
        )
        self.stored = StoredRefcounts(self.file, geometry, table)
        near = min(2 * header.size + _MORE_THAN_DISK, _MAX_MISSING << geometry.cluster_bits)
        horizon = self.file.length + near
        self.references = References(geometry, self.file.length, result, horizon=horizon)
        await self._count(snapshots, snapshots_length)
        self._count_blocks()
        places = [place for place in self.to_zero if self._may_write_l2(place[0])]
        if places:
            await repair.zero_entries(self.file, self.form, places, result)
        await self._compare()
        if self.fix:
            await self._check_copied()
            await self._finish()
        return result

    # -- reading

    async def _entries(self, offset: int, count: int) -> Entries:
        return from_disk(await read_bytes(self.file, offset, count * ENTRY_BYTES))

    async def _snapshots(self) -> tuple[list[Snapshot], int]:
        header = self.header
        length = 65536
        while header.nb_snapshots:
            data = bytes(await read_bytes(self.file, header.snapshots_offset, length))
            try:
                found, length = parse_snapshots(
                    data, header.nb_snapshots, self.geometry, check_l1=False
                )
            except Incomplete:
                length *= 4
                if length > MAX_SNAPSHOT_TABLE_BYTES * 2:
                    raise BlockError("Snapshot table is too large", errno=EFBIG) from None
                continue
            for number, snapshot in enumerate(found):
                if header.version >= 3 and snapshot.disk_size is None:
                    self.result.corrupt(f"snapshot table entry {number} is incomplete")
            return found, length
        return [], 0

    # -- counting

    async def _count(self, snapshots: list[Snapshot], snapshots_length: int) -> None:
        """Everything but the refcount structures."""
        header, references = self.header, self.references
        self._add_fixed(0, self.geometry.cluster_size)
        self._add_fixed(header.l1_table_offset, header.l1_size * ENTRY_BYTES)
        self.l1 = await self._entries(header.l1_table_offset, header.l1_size)
        await self._count_l1(self.l1, active=True)
        if self.form.data_file and snapshots:
            self.result.corrupt("data file with snapshots")
        await self._count_snapshots(snapshots)
        self._add_fixed(header.snapshots_offset, snapshots_length)
        crypto = header.extension(Extension.ENCRYPTION)
        if crypto is not None and len(crypto) >= 16:
            offset, length = np.frombuffer(crypto[:16], ">u8").tolist()
            references.add_range(offset, min(length, 1 << 40))
        await count_bitmaps(self.file, header, references, self.result)
        async for found in self._l2_tables():
            await self._count_l2(found)

    def _add_fixed(self, offset: int, length: int) -> None:
        """One structure that is no L2 table."""
        self.references.add_range(offset, length)
        if length and self.fix:
            size = self.geometry.cluster_size
            self.fixed.append((offset // size * size, -(-(offset + length) // size) * size))

    async def _count_l1(self, entries: Entries, *, active: bool, times: int = 1) -> None:
        offsets = examine_l1(entries, self.geometry, self.result, times)
        self.references.add(offsets, self.geometry.cluster_size, times)
        # A table beyond the end has been counted as that; there is nothing in it.
        inside = offsets[offsets < _U(self.file.length)]
        if len(inside):
            self.l1_tables.add(inside, active=active, times=times)

    async def _count_snapshots(self, snapshots: list[Snapshot]) -> None:
        counted: dict[tuple[int, int], int] = {}
        for snapshot in snapshots:
            name = f"snapshot {snapshot.id} ({snapshot.name})"
            if snapshot.l1_table_offset % self.geometry.cluster_size:
                self.result.corrupt(
                    f"{name} l1_offset={snapshot.l1_table_offset:#x}: L1 table is not cluster "
                    "aligned; snapshot table entry corrupted"
                )
            elif snapshot.l1_size * ENTRY_BYTES > MAX_L1_BYTES:
                self.result.corrupt(
                    f"{name} l1_size={snapshot.l1_size:#x}: L1 table is too large; snapshot table "
                    "entry corrupted"
                )
            elif snapshot.l1_size:
                key = (snapshot.l1_table_offset, snapshot.l1_size)
                counted[key] = counted.get(key, 0) + 1
        for (offset, size), times in counted.items():
            for _ in range(times):
                self._add_fixed(offset, size * ENTRY_BYTES)
            await self._count_l1(await self._entries(offset, size), active=False, times=times)
            await asyncio.sleep(0)

    async def _l2_tables(self, *, active_only: bool = False) -> AsyncIterator[L2Table]:
        """Every L2 table, once."""
        tables = self.l1_tables
        size = self.geometry.cluster_size
        for number, offset in enumerate(tables.offsets.tolist()):
            active = int(tables.active[number])
            if not offset or (active_only and not active):
                continue
            table = from_disk(await read_bytes(self.file, offset, size))
            yield L2Table(offset, table, int(tables.total[number]), active)
            if number % _YIELD_EVERY == 0:
                await asyncio.sleep(0)

    async def _count_l2(self, found: L2Table) -> None:
        result = self.result
        zeroing = self.fix is Fix.ALL
        findings = examine_l2(found.table, self.form, result, found.total, zeroing=zeroing)
        self.to_zero += ((found.host_offset, index) for index in findings.to_zero)
        if not self.form.data_file:
            self.references.add(findings.clusters, self.geometry.cluster_size, found.total)
        self.references.add(findings.compressed, findings.compressed_lengths, found.total)
        if found.active:
            compressed = len(findings.compressed)
            result.compressed_clusters += compressed * found.active
            result.allocated_clusters += (len(findings.clusters) + compressed) * found.active
            result.fragmented_clusters += findings.fragmented * found.active

    def _count_blocks(self) -> None:
        """The refcount table and the blocks it names."""
        header, geometry, references = self.header, self.geometry, self.references
        size = geometry.cluster_size
        self._add_fixed(header.refcount_table_offset, header.refcount_table_clusters * size)
        table = self.stored.table
        end = geometry.clusters(self.file.length) * size
        for index in np.flatnonzero(table).tolist():
            entry = int(table[index])
            if entry & REFCOUNT_TABLE_RESERVED:
                problem = f"refcount table entry {index} has reserved bits set"
            elif entry % size:
                problem = (
                    f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif entry >= end:
                problem = f"refcount block {index} is outside image"
            else:
                self._add_fixed(entry, size)
                if (count := references.of(entry)) == 1:
                    continue
                problem = f"refcount block {index} refcount={count}"
            self.result.corrupt(problem)
            # A block outside the file stands in nobody's way until its refcounts are needed.
            self.rebuild |= entry % size != 0 or entry < end or self.fix is Fix.ALL

    # -- comparing

    async def _compare(self) -> None:
        result, fix = self.result, self.fix
        before = (result.corruptions, result.leaks, result.check_errors)
        changes = await self._compare_all()
        if not fix:
            async for found in self._l2_tables(active_only=True):
                await self._copied_of(found, repairing=False)
            await self._copied_of_l1(repairing=False)
            return
        if self.rebuild and fix is not Fix.ALL:
            result.say("ERROR need to rebuild refcount structures")
            raise OSError(EIO, "refcount structures have to be rebuilt")
        if self.rebuild:
            await self._rebuild(before[0])
        elif changes:
            result.corruptions, result.leaks, result.check_errors = before
            await self._compare_all(repairing=True)
            await self.file.flush()
            self.stored.forget()

    async def _compare_all(self, *, repairing: bool = False) -> bool:
        """Whether there is a mismatch."""
        counts = self.references.counts
        per_block = self.geometry.refcounts_per_block
        blocks = -(-len(counts) // per_block)
        # Where nothing is stored and nothing is referred to, there is nothing to look at.
        interesting = np.zeros(blocks, np.bool_)
        known = self.stored.table[:blocks] != 0
        interesting[: len(known)] = known
        whole = len(counts) // per_block * per_block
        interesting[: whole // per_block] |= counts[:whole].reshape(-1, per_block).any(axis=1)
        interesting[whole // per_block :] = True
        mismatch = False
        highest = 0
        for index in np.flatnonzero(interesting).tolist():
            last, differs = await self._compare_block(index, repairing=repairing)
            mismatch |= differs
            if last >= 0:
                highest = index * per_block + last
            await asyncio.sleep(0)
        self.result.image_end_offset = (highest + 1) * self.geometry.cluster_size
        return mismatch

    async def _compare_block(self, index: int, *, repairing: bool) -> tuple[int, bool]:
        per_block = self.geometry.refcounts_per_block
        expected = self.references.counts[index * per_block : (index + 1) * per_block]
        stored = await self.stored.block(index)
        result = self.result
        if stored is None:
            result.check_errors += len(expected)
            result.say(f"Can't get refcounts of refcount block {index}")
            return -1, False
        part = stored[: len(expected)]
        found = compare(part, expected)
        low, high = int(found.low.sum()), int(found.high.sum())
        self.rebuild |= found.rebuild
        if not (low or high):
            return found.highest, False
        fix_low, fix_high = repairing and self.fix is Fix.ALL, repairing
        for cluster in np.flatnonzero(found.low | found.high)[:64].tolist():
            is_low = bool(found.low[cluster])
            word = "ERROR" if is_low else "Leaked"
            if fix_low if is_low else fix_high:
                word = "Repairing"
            result.say(
                f"{word} cluster {index * per_block + cluster} refcount={part[cluster]} "
                f"reference={expected[cluster]}"
            )
        if not repairing:
            result.corruptions += low
            result.leaks += high
            return found.highest, True
        wrong = found.high | found.low if fix_low else found.high
        changed = stored.copy()
        changed[: len(expected)][wrong] = expected[wrong]
        await repair.write_block(self.file, self.geometry, self.stored.offset(index), changed)
        result.leaks_fixed += high
        if fix_low:
            result.corruptions_fixed += low
        else:
            result.corruptions += low
        return found.highest, True

    async def _rebuild(self, before: int) -> None:
        """New refcount structures; ``before``: corruptions found while counting."""
        result = self.result
        result.say("Rebuilding refcount structure")
        # Once more without the old structures: a count that was cut off cannot be taken back. What
        # was cut off the file is there again, as zeros, before anything else can get its place.
        again = _Check(self.file, self.header, Fix.NONE)
        again.references = References(self.geometry, self.references.reach, again.result)
        snapshots, length = await again._snapshots()
        await again._count(snapshots, length)
        self.header, self.stored.table = await repair.write_refcounts(
            self.file, self.header, again.references.counts
        )
        self.stored.forget()
        self.references = again.references
        # What was wrong beside the refcounts is still so.
        left = min(before, again.result.corruptions)
        result.corruptions_fixed += result.corruptions - left
        result.leaks_fixed += result.leaks
        result.corruptions, result.leaks, result.check_errors = left, 0, 0

    # -- COPIED flags

    async def _check_copied(self) -> None:
        result = self.result
        # Leaks alone are repaired without touching tables, unless their refcounts are right now.
        sound = not (result.check_errors or result.corruptions or result.leaks)
        repairing = self.fix is Fix.ALL or sound
        async for found in self._l2_tables(active_only=True):
            await self._copied_of(found, repairing=repairing)
        await self._copied_of_l1(repairing=repairing)
        await self.file.flush()

    async def _copied_of(self, found: L2Table, *, repairing: bool) -> None:
        named = allocated(found.table[:: self.form.words], self.form)
        indices = np.flatnonzero(named) * self.form.words
        entries = found.table[indices]
        if self.form.data_file:
            refcounts = np.ones(len(entries), np.int64)
        else:
            bits = _U(self.geometry.cluster_bits)
            refcounts = await self.stored.lookup((entries & _U(OFFSET_MASK)) >> bits)
        wrong = copied_errors(entries, refcounts)
        if not wrong.any():
            return
        self._say_copied("data cluster: l2_entry", entries[wrong], refcounts[wrong], repairing)
        count = int(wrong.sum())
        times = 1 if repairing else found.active
        if repairing and self._may_write_l2(found.host_offset):
            await repair.flip_copied(self.file, found.host_offset, found.table, indices[wrong])
            self.result.corruptions_fixed += count
        else:
            self.result.corruptions += count * times

    async def _copied_of_l1(self, *, repairing: bool) -> None:
        indices = np.flatnonzero((self.l1 & _U(OFFSET_MASK)) != 0)
        entries = self.l1[indices]
        bits = _U(self.geometry.cluster_bits)
        refcounts = await self.stored.lookup((entries & _U(OFFSET_MASK)) >> bits)
        wrong = copied_errors(entries, refcounts)
        if not wrong.any():
            return
        self._say_copied("L2 cluster: l1_entry", entries[wrong], refcounts[wrong], repairing)
        count = int(wrong.sum())
        if repairing and self._may_write_l1():
            await repair.flip_copied(
                self.file, self.header.l1_table_offset, self.l1, indices[wrong]
            )
            self.result.corruptions_fixed += count
        else:
            self.result.corruptions += count

    def _may_write_l2(self, host_offset: int) -> bool:
        """A table is not written where something else of the image lies as well."""
        end = host_offset + self.geometry.cluster_size
        overlap = any(first < end and host_offset < last for first, last in self.fixed)
        return not (overlap and self._refused("an L2 table", host_offset))

    def _may_write_l1(self) -> bool:
        """The same for the active L1 table."""
        start = self.header.l1_table_offset
        end = start + len(self.l1) * ENTRY_BYTES
        overlaps = sum(first < end and start < last for first, last in self.fixed) > 1
        size = _U(self.geometry.cluster_size)
        tables = self.l1_tables.offsets
        overlaps |= bool(((tables + size > _U(start)) & (tables < _U(end))).any())
        return not (overlaps and self._refused("the L1 table", start))

    def _refused(self, what: str, host_offset: int) -> bool:
        self.result.check_errors += 1
        self.result.say(f"ERROR: {what} overlaps with something else (offset {host_offset:#x})")
        return True

    def _say_copied(
        self, what: str, entries: Entries, refcounts: npt.NDArray[np.int64], repairing: bool
    ) -> None:
        word = "Repairing" if repairing else "ERROR"
        for entry, refcount in zip(entries[:64].tolist(), refcounts[:64].tolist(), strict=True):
            self.result.say(f"{word} OFLAG_COPIED {what}={entry:x} refcount={refcount}")

    async def _finish(self) -> None:
        """A sound image is neither dirty nor corrupt."""
        result = self.result
        if result.check_errors or result.corruptions:
            return
        marks = self.header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT)
        if marks:
            await self.file.flush()
            await repair.clear_marks(self.file, self.header, int(marks))
