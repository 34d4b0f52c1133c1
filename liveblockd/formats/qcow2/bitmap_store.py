"""Persistent dirty bitmaps of an open image: read, marked as in use, stored.

Specification: docs/interop/qcow2, "Bitmaps extension", "Bitmaps".

Runs on: the event loop. The bits themselves live above, in the graph.

Invariants: before the first guest write every stored bitmap is marked as in use, durable; a crash
leaves that mark, which says that the bits are not to be believed. ``store`` writes bits, tables and
directory to new clusters, makes them and their refcounts durable, and then switches the header with
one sector; the old ones are freed after that.
Errors: ``BlockError`` for a directory that cannot be; OSError of reading and writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.bitmaps import (
    AUTO,
    IN_USE,
    BitmapEntry,
    DirectoryPlace,
    bad_table_entries,
    check_limits,
    data_entries,
    in_use,
    parse_directory,
    parse_extension,
    serialise_directory,
    serialise_extension,
    table_bytes,
)
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.header import Header, Rewrite, replace_extension
from liveblockd.formats.qcow2.layout import OFFSET_MASK, Autoclear, Extension
from liveblockd.formats.qcow2.metadata import Metadata, read_bytes
from liveblockd.formats.qcow2.tables import Entries, from_disk, to_disk
from liveblockd.storage.driver import StoredBitmap

#: bytes of bits that one image may bring into memory when it is opened
MAX_LOADED_BYTES = 1 << 30

#: Qcow2BitmapInfoFlags
_FLAGS: Final = ((IN_USE, "in-use"), (AUTO, "auto"))


class BitmapStore:
    """The bitmaps of one image; ``entries`` is what the directory on the disk has."""

    def __init__(self, metadata: Metadata, committer: Committer) -> None:
        self._metadata = metadata
        self._committer = committer
        self.entries: list[BitmapEntry] = []
        self.loaded: list[StoredBitmap] = []
        self._place: DirectoryPlace | None = None

    @property
    def autoclear(self) -> int:
        """The bit that says that the extension is kept true."""
        return int(Autoclear.BITMAPS) if self._place is not None else 0

    # -- reading

    async def read(self) -> None:
        """Directory and bits, as far as they may be believed; raises BlockError."""
        metadata = self._metadata
        header = metadata.header
        data = header.extension(Extension.BITMAPS)
        # Without the bit somebody wrote to the image who knows no bitmaps: they are nothing now.
        if data is None or not header.autoclear & Autoclear.BITMAPS:
            return
        place = parse_extension(data, metadata.geometry)
        try:
            directory = bytes(await self._read(place.host_offset, place.length))
            entries = parse_directory(directory, place, metadata.geometry, header.size)
            self._guard(place.host_offset, place.length)
            for entry in entries:
                self._guard(entry.table_offset, table_bytes(entry.table_entries))
            left = MAX_LOADED_BYTES
            for entry in entries:
                stored = await self._load(entry)
                left -= sum(len(piece) for _, piece in stored.pieces)
                if left < 0:
                    raise BlockError("The bitmaps of the image are too large")
                self.loaded.append(stored)
        except OSError as error:
            raise BlockError.from_os_error("Could not read bitmaps", error) from error
        self._place, self.entries = place, entries

    def describe(self) -> list[dict[str, Any]]:
        """Qcow2BitmapInfo of those on the disk."""
        return [
            {
                "flags": [name for bit, name in _FLAGS if entry.flags & bit],
                "name": entry.text,
                "granularity": 1 << entry.granularity_bits,
            }
            for entry in self.entries
        ]

    async def _read(self, host_offset: int, length: int) -> bytes:
        if host_offset + length > -(-self._metadata.file.length // 512) * 512:
            raise BlockError("A bitmap lies beyond the end of the file")
        return bytes(await read_bytes(self._metadata.file, host_offset, length))

    def _guard(self, host_offset: int, length: int) -> None:
        """These clusters hold metadata; BlockError if they are some other already."""
        metadata = self._metadata
        refcounts = metadata.refcounts
        first = host_offset >> metadata.geometry.cluster_bits
        clusters = metadata.geometry.clusters(length)
        if not refcounts.metadata.isdisjoint(range(first, first + clusters)):
            raise BlockError(f"Bitmap metadata overlaps with other metadata at {host_offset:#x}")
        refcounts.add_metadata(host_offset, clusters)

    async def _table(self, entry: BitmapEntry) -> Entries:
        data = await self._read(entry.table_offset, table_bytes(entry.table_entries))
        table = from_disk(data)
        geometry = self._metadata.geometry
        hosts = (table & np.uint64(OFFSET_MASK)) >> np.uint64(geometry.cluster_bits)
        overlaps = self._metadata.refcounts.metadata.overlaps(hosts, hosts)
        if bad_table_entries(table, geometry) or (overlaps & (hosts != 0)).any():
            raise BlockError(f"Bitmap '{entry.text}' has a damaged table")
        return table

    async def _load(self, entry: BitmapEntry) -> StoredBitmap:
        metadata = self._metadata
        size = metadata.geometry.cluster_size
        granularity = 1 << entry.granularity_bits
        if not entry.usable:
            return StoredBitmap(entry.text, granularity, False, True)
        table = await self._table(entry)
        table = table[: data_entries(entry, metadata.header.size, metadata.geometry)]
        pieces: list[tuple[int, bytes]] = []
        total = 0
        for index in np.flatnonzero(table).tolist():
            total += size
            if total > MAX_LOADED_BYTES:
                raise BlockError("The bitmaps of the image are too large")
            if host_offset := int(table[index]) & OFFSET_MASK:
                data = bytes(await read_bytes(metadata.file, host_offset, size))
            else:
                data = b"\xff" * size
            pieces.append((index * size, data))
        enabled = bool(entry.flags & AUTO)
        return StoredBitmap(entry.text, granularity, enabled, False, tuple(pieces))

    # -- writing

    async def mark_in_use(self) -> None:
        """Before the first guest write. Durable on return; each mark lies within one sector."""
        if self._place is None or all(entry.flags & IN_USE for entry in self.entries):
            return
        marked = in_use(self.entries)
        file = self._metadata.file
        await file.write(self._place.host_offset, serialise_directory(marked))
        await file.flush()
        self.entries = marked

    def check_new(self, name: str, granularity: int, others: int) -> None:
        """BlockError if such a bitmap cannot be stored."""
        header = self._metadata.header
        if header.version < 3:
            raise BlockError("Cannot store dirty bitmaps in qcow2 v2 files", errno=95)
        check_limits(name, granularity, header.size, others)
        if self._place is None:
            # Better refused now than lost when the image is closed.
            space = serialise_extension(DirectoryPlace(1, 0, 0))
            others = header.autoclear & ~int(Autoclear.BITMAPS)
            replace_extension(header, Extension.BITMAPS, space, autoclear=others)

    async def store(self, bitmaps: Sequence[StoredBitmap]) -> None:
        """Replace all that is stored; the inconsistent ones stay as they are.

        Durable on return. On an error the old directory, marked as in use, stays.
        """
        metadata = self._metadata
        if not bitmaps and self._place is None:
            return
        old = {entry.text: entry for entry in self.entries}
        kept = {b.name for b in bitmaps if b.inconsistent and b.name in old}
        gone = [entry for name, entry in old.items() if name not in kept]
        freed = [await self._places(entry) for entry in gone]
        taken: list[tuple[int, int]] = []
        try:
            entries = [
                old[b.name] if b.inconsistent else await self._write_bitmap(b, taken)
                for b in bitmaps
                if not b.inconsistent or b.name in kept
            ]
            place = await self._write_directory(entries, taken)
            await self._committer.flush()  # refcounts, and what was written
        except OSError:
            self._free(taken)
            raise
        # If this fails the disk may have either header: then what both name stays, and leaks.
        await self._switch(place)
        before = self._place
        self._place, self.entries = place, entries
        for places in freed:
            self._free(places)
        if before is not None:
            self._free([(before.host_offset, metadata.geometry.clusters(before.length))])

    async def _places(self, entry: BitmapEntry) -> list[tuple[int, int]]:
        """(host_offset, clusters) of all that a bitmap occupies."""
        metadata = self._metadata
        found = [(entry.table_offset, metadata.geometry.clusters(table_bytes(entry.table_entries)))]
        try:
            table = await self._table(entry)
        except BlockError:
            return []  # its clusters leak: better than to free what something else may use
        hosts = table & np.uint64(OFFSET_MASK)
        found += [(host_offset, 1) for host_offset in hosts[hosts != 0].tolist()]
        return found

    def _free(self, places: Sequence[tuple[int, int]]) -> None:
        for host_offset, clusters in places:
            self._metadata.quarantine.free(host_offset, clusters, unmap=False)
        if places:
            self._metadata.on_dirty()

    async def _allocate(self, clusters: int, taken: list[tuple[int, int]]) -> int:
        host_offset = await self._metadata.allocate_exactly(clusters)
        taken.append((host_offset, clusters))
        return host_offset

    async def _write_bitmap(
        self, bitmap: StoredBitmap, taken: list[tuple[int, int]]
    ) -> BitmapEntry:
        metadata = self._metadata
        geometry, size = metadata.geometry, metadata.geometry.cluster_size
        entry = BitmapEntry(
            bitmap.name.encode("utf-8", "surrogateescape"),
            0,
            0,
            AUTO if bitmap.enabled else 0,
            bitmap.granularity.bit_length() - 1,
        )
        clusters = data_entries(entry, metadata.header.size, geometry)
        table = np.zeros(clusters, np.uint64)
        for start, data in bitmap.pieces:
            assert start % size == 0
            for position in range(0, len(data), size):
                part = data[position : position + size]
                if not part.strip(b"\0"):
                    continue
                host_offset = await self._allocate(1, taken)
                await metadata.file.write(host_offset, part.ljust(size, b"\0"))
                table[(start + position) // size] = host_offset
        length = geometry.clusters(table_bytes(clusters))
        table_offset = await self._allocate(length, taken)
        await metadata.file.write(table_offset, to_disk(table).ljust(length * size, b"\0"))
        self._guard(table_offset, length * size)
        return replace(entry, table_offset=table_offset, table_entries=clusters)

    async def _write_directory(
        self, entries: list[BitmapEntry], taken: list[tuple[int, int]]
    ) -> DirectoryPlace | None:
        if not entries:
            return None
        geometry = self._metadata.geometry
        data = serialise_directory(entries)
        clusters = geometry.clusters(len(data))
        host_offset = await self._allocate(clusters, taken)
        await self._metadata.file.write(
            host_offset, data.ljust(clusters * geometry.cluster_size, b"\0")
        )
        self._guard(host_offset, len(data))
        return DirectoryPlace(len(entries), len(data), host_offset)

    async def _switch(self, place: DirectoryPlace | None) -> None:
        extension = None if place is None else serialise_extension(place)
        autoclear = 0 if place is None else int(Autoclear.BITMAPS)

        def rewrite() -> Rewrite:
            header: Header = self._metadata.header
            others = header.autoclear & ~int(Autoclear.BITMAPS)
            return replace_extension(
                header, Extension.BITMAPS, extension, autoclear=others | autoclear
            )

        await self._committer.rewrite_header(rewrite)

    async def remove(self, name: str) -> None:
        """Forget a stored bitmap; nothing if there is none. Durable on return."""
        entry = next((e for e in self.entries if e.text == name), None)
        if entry is None:
            return
        places = await self._places(entry)
        entries = [e for e in self.entries if e is not entry]
        taken: list[tuple[int, int]] = []
        try:
            place = await self._write_directory(entries, taken)
            await self._committer.flush()
        except OSError:
            self._free(taken)
            raise
        await self._switch(place)  # if this fails: as in ``store``
        before = self._place
        assert before is not None
        self._place, self.entries = place, entries
        self._free([*places, (before.host_offset, self._metadata.geometry.clusters(before.length))])
        await self._committer.flush()
