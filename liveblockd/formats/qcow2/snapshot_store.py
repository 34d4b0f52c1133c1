"""Internal snapshots: create, delete, apply.

Specification: docs/interop/qcow2, "Snapshots".

A snapshot takes the L1 table and the L2 tables that the disk has; the disk goes on with copies of
them, in which no entry is COPIED. So the tables of a snapshot never change, and the new ones are
put in place by ``switch``, at one instant.

Runs on: the event loop, in a task of the engine, with no request in flight.
Invariants: a crash leaves the old state or the new one, without a leak of the other's clusters
beyond what was being written. Each L1 table counts one reference to all that it leads to.
Errors: OSError, ``DamageError``; ``BlockError`` for what cannot be done.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EFBIG, ENOENT, ENOTSUP

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    ENTRY_BYTES,
    MAX_L1_BYTES,
    OFFSET_MASK,
    Incompatible,
)
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.snapshots import Snapshot, next_id, serialise_snapshots
from liveblockd.formats.qcow2.switch import Switch, references, words
from liveblockd.formats.qcow2.tables import Entries, to_disk

_U = np.uint64
Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Taken:
    """When a snapshot was taken; nanoseconds (of the date: since the epoch)."""

    date_nsec: int
    vm_clock_nsec: int


class SnapshotStore:
    """The snapshots of one image; ``snapshots`` is the table on the disk."""

    def __init__(
        self,
        metadata: Metadata,
        committer: Committer,
        snapshots: list[Snapshot],
        table_length: int,
    ) -> None:
        self._metadata = metadata
        self._committer = committer
        self.snapshots = snapshots
        self._length = table_length

    def _switch(self) -> Switch:
        if self._metadata.header.incompatible & Incompatible.DATA_FILE:
            raise BlockError(
                "Internal snapshots are not supported with an external data file", errno=ENOTSUP
            )
        return Switch(self._metadata, self._committer)

    def find(self, snapshot_id: str) -> Snapshot:
        """By its id; raises BlockError."""
        for snapshot in self.snapshots:
            if snapshot.id == snapshot_id:
                return snapshot
        raise BlockError("Can't find the snapshot", errno=ENOENT)

    def check_downgrade(self) -> None:
        """BlockError if there is one that programs for version 2 would take for another.

        Its size, and the upper half of that of the state of the machine, are extra data to them.
        """
        size = self._metadata.header.size
        for snapshot in self.snapshots:
            if (snapshot.disk_size or size) != size or snapshot.vm_state_size >> 32:
                raise BlockError("Internal snapshots prevent downgrade of image", errno=ENOTSUP)

    # -- the three operations; each returns what became free: (host_offset, length)

    async def create(self, name: str, taken: Taken) -> Ranges:
        """Keep the disk as it is. Durable on return."""
        metadata = self._metadata
        await self._committer.close()
        async with self._committer.lock:
            switch = self._switch()
            switch.check_l1(metadata.l1)
            snapshot = Snapshot(
                raw_id=next_id(self.snapshots),
                raw_name=name.encode("utf-8", "surrogateescape"),
                l1_table_offset=metadata.l1_offset,
                l1_size=len(metadata.l1),
                date_sec=taken.date_nsec // 1_000_000_000,
                date_nsec=taken.date_nsec % 1_000_000_000,
                vm_clock_nsec=taken.vm_clock_nsec,
                vm_state_size=0,
                disk_size=metadata.header.size,
            )
            # What lies behind the disk (the state of a machine) is the snapshot's alone.
            used = metadata.geometry.l1_size(metadata.header.size)
            l1 = np.zeros(len(metadata.l1), np.uint64)
            l1[:used] = await self._fork(switch, metadata.l1[:used])
            return await self.commit(switch, l1, [*self.snapshots, snapshot])

    async def delete(self, snapshot: Snapshot) -> Ranges:
        """Forget a snapshot. Durable on return."""
        metadata = self._metadata
        await self._committer.close()
        async with self._committer.lock:
            switch = self._switch()
            l1 = await switch.read_l1(snapshot.l1_table_offset, snapshot.l1_size)
            await self._drop_tree(switch, l1)
            if snapshot.l1_size:
                await switch.drop_range(snapshot.l1_table_offset, snapshot.l1_size * ENTRY_BYTES)
            switch.check_l1(metadata.l1)
            active = await self.own_again(switch, metadata.l1)
            rest = [s for s in self.snapshots if s is not snapshot]
            if (active == metadata.l1).all():
                return await self.commit(switch, active, rest, l1_offset=metadata.l1_offset)
            await switch.drop_range(metadata.l1_offset, len(metadata.l1) * ENTRY_BYTES)
            return await self.commit(switch, active, rest)

    async def apply(self, snapshot: Snapshot) -> Ranges:
        """Make the disk what it was, its size included. Durable on return."""
        metadata = self._metadata
        size = metadata.header.size if snapshot.disk_size is None else snapshot.disk_size
        entries = max(snapshot.l1_size, metadata.geometry.l1_size(size))
        if size % 512 or entries * ENTRY_BYTES > MAX_L1_BYTES:
            raise BlockError("The size that the snapshot states cannot be", errno=EFBIG)
        await self._committer.close()
        async with self._committer.lock:
            switch = self._switch()
            switch.check_l1(metadata.l1)  # before anything is taken for the copies
            old = await switch.read_l1(snapshot.l1_table_offset, snapshot.l1_size)
            l1 = np.zeros(max(1, entries), np.uint64)
            l1[: len(old)] = await self._fork(switch, old)
            await self._drop_tree(switch, metadata.l1)
            await switch.drop_range(metadata.l1_offset, len(metadata.l1) * ENTRY_BYTES)
            return await self.commit(switch, l1, self.snapshots, size=size)

    async def empty(self) -> Ranges:
        """Let the disk hold nothing: its backing file shows everywhere. Durable on return."""
        metadata = self._metadata
        await self._committer.close()
        async with self._committer.lock:
            switch = Switch(metadata, self._committer)
            switch.check_l1(metadata.l1)
            await self._drop_tree(switch, metadata.l1)
            await switch.drop_range(metadata.l1_offset, len(metadata.l1) * ENTRY_BYTES)
            return await self.commit(switch, np.zeros_like(metadata.l1), self.snapshots)

    # -- inside

    async def _fork(self, switch: Switch, l1: Entries) -> Entries:
        """Copies of the L2 tables, for the disk; the originals and the data are shared."""
        copy = np.zeros(len(l1), np.uint64)
        for index in np.flatnonzero(l1 & _U(OFFSET_MASK)).tolist():
            raw = await switch.read_l2(int(l1[index]))
            entries = words(raw, switch.geometry)
            await switch.add(references(entries, switch.geometry))
            entries &= _U(~COPIED & (1 << 64) - 1)
            copy[index] = await switch.write(to_disk(raw)) | COPIED
        return copy

    async def _drop_tree(self, switch: Switch, l1: Entries) -> None:
        """One reference less to all that an L1 table leads to."""
        tables = l1 & _U(OFFSET_MASK)
        counted = not self._metadata.has_data_file  # in a data file nothing is
        for l1_entry in tables[tables != 0].tolist() if counted else ():
            raw = await switch.read_l2(l1_entry)
            await switch.drop(references(words(raw, switch.geometry), switch.geometry))
        await switch.drop(tables[tables != 0] >> _U(switch.geometry.cluster_bits))

    async def own_again(self, switch: Switch, l1: Entries) -> Entries:
        """The L1 table of the disk, in which that is COPIED which nobody shares any longer."""
        bits = _U(switch.geometry.cluster_bits)
        result = l1.copy()
        indices = np.flatnonzero(l1 & _U(OFFSET_MASK))
        shared = await switch.counts((l1[indices] & _U(OFFSET_MASK)) >> bits) > 1
        for index in indices[~shared].tolist():
            host_offset = int(l1[index]) & OFFSET_MASK
            result[index] = host_offset | COPIED
            raw = await switch.read_l2(host_offset)
            entries = words(raw, switch.geometry)
            hosts = entries & _U(OFFSET_MASK)
            plain = np.flatnonzero(((entries & _U(COMPRESSED)) == 0) & (hosts != 0))
            alone = await switch.counts(hosts[plain] >> bits) == 1
            wanted = entries[plain] & _U(~COPIED & (1 << 64) - 1)
            wanted[alone] |= _U(COPIED)
            if (wanted == entries[plain]).all():
                continue
            entries[plain] = wanted
            result[index] = await switch.write(to_disk(raw)) | COPIED
            await switch.drop_range(host_offset, switch.geometry.cluster_size)
        return result

    async def commit(
        self,
        switch: Switch,
        l1: Entries,
        snapshots: list[Snapshot],
        *,
        l1_offset: int | None = None,
        size: int | None = None,
    ) -> Ranges:
        """Write what is left, and switch; an L1 table without a place is written."""
        header = self._metadata.header
        data = serialise_snapshots(snapshots)
        table_offset = await switch.write(data) if snapshots else 0
        if self._length:
            await switch.drop_range(header.snapshots_offset, self._length)
        if l1_offset is None:
            l1_offset = await switch.write(to_disk(l1))
        freed = await switch.commit(
            l1,
            l1_table_offset=l1_offset,
            snapshots_offset=table_offset,
            nb_snapshots=len(snapshots),
            size=header.size if size is None else size,
        )
        self.snapshots = snapshots
        self._length = len(data) if snapshots else 0
        return freed
