"""Reads qcow2 images found after a crash: a second reading of the format, by whole tables.

Shares no code with the engine. ``Crashed`` looks at the bytes of one image: ``errors`` (what
qemu-img check calls corruptions), ``leaks``, and ``view``, the guest's bytes. Versions 2 and 3,
internal snapshots, zlib; no extended L2 entries.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
OFFSET = np.uint64(0x00FFFFFFFFFFFE00)
ONE = np.uint64(1)
BACKING_FORMAT, BITMAPS = 0xE2792ACA, 0x23852875


class NoImageError(Exception):
    """There is no header that could be read."""


class Crashed:
    """One image file."""

    def __init__(self, content: Bytes) -> None:
        self.errors: list[str] = []
        self.leaks = 0
        #: granularity and bits of the bitmaps that may be believed
        self.bitmaps: dict[str, tuple[int, npt.NDArray[np.bool_]]] = {}
        if len(content) < 72 or bytes(content[:4]) != b"QFI\xfb":
            raise NoImageError("no qcow2 header")
        (self.version, backing_offset, backing_length, self.bits, self.size, _, self.l1_size,
         self.l1_offset, self.table_offset, self.table_clusters, self.snapshots,
         self.snapshots_offset) = struct.unpack(">IQIIQIIQQIIQ", bytes(content[4:72]))  # fmt: skip
        if self.version not in (2, 3) or not 9 <= self.bits <= 21:
            raise NoImageError("a header that cannot be")
        self.incompatible = self.autoclear = 0
        self.order, header_length = 4, 72
        if self.version == 3:
            self.incompatible, _, self.autoclear, self.order, header_length = struct.unpack(
                ">QQQII", bytes(content[72:104])
            )
        self.cluster = 1 << self.bits
        padding = -len(content) % self.cluster
        self.content = np.concatenate((content, np.zeros(padding, np.uint8)))
        self.clusters = len(self.content) >> self.bits
        self.backing = None
        if backing_offset:
            self.backing = bytes(self._bytes(backing_offset, backing_length)).decode()
        self.extensions = self._extensions(header_length, backing_offset or self.cluster)
        self.l1 = self._words(self.l1_offset, self.l1_size)
        self.entries_per_table = self.cluster // 8
        if self.l1_size * self.entries_per_table << self.bits < self.size:
            self.errors.append("the L1 table is too small")
        self.references = np.zeros(self.clusters + 1, np.int64)
        self.counts = self._refcounts()
        self.tables = self._tables(self.l1, active=True)
        self._fixed()
        self._snapshots()
        self._compare()

    def _bytes(self, offset: int, length: int) -> Bytes:
        part = self.content[offset : offset + length]
        if len(part) < length:
            part = np.concatenate((part, np.zeros(length - len(part), np.uint8)))
        return part

    def _words(self, offset: int, count: int) -> Words:
        raw = np.ascontiguousarray(self._bytes(offset, count * 8))
        return raw.view(np.dtype(">u8")).astype(np.uint64)

    def _extensions(self, position: int, end: int) -> dict[int, bytes]:
        found = {}
        while position + 8 <= end:
            kind, length = struct.unpack(">II", bytes(self._bytes(position, 8)))
            if not kind:
                break
            if position + 8 + length > self.cluster:
                self.errors.append("an extension is too long")
                break
            found[kind] = bytes(self._bytes(position + 8, length))
            position += 8 + (length + 7) // 8 * 8
        return found

    def _use(self, offset: int, length: int) -> None:
        if length:
            first, last = offset >> self.bits, (offset + length - 1) >> self.bits
            if last >= self.clusters:
                self.errors.append(f"metadata beyond the end of the file: {offset:#x}")
                last = min(last, self.clusters)
            self.references[first : last + 1] += 1

    def _use_all(self, offsets: Words, what: str) -> None:
        """Each of these clusters is used once more."""
        clusters = (offsets >> np.uint64(self.bits)).astype(np.int64)
        if len(clusters) and int(clusters.max()) >= self.clusters:
            self.errors.append(f"{what} beyond the end of the file")
            clusters = clusters[clusters < self.clusters]
        np.add.at(self.references, clusters, 1)

    def _refcounts(self) -> npt.NDArray[np.uint64]:
        """Of all clusters of the file; the blocks are noted as used."""
        entries = self._words(self.table_offset, self.table_clusters << self.bits >> 3)
        used = entries != 0
        if (entries[used] & np.uint64(self.cluster - 1)).any():
            self.errors.append("a refcount block is not aligned")
            entries = np.where(entries & np.uint64(self.cluster - 1), np.uint64(0), entries)
            used = entries != 0
        self._use_all(entries[used], "a refcount block")
        per_block = self.cluster * 8 >> self.order
        counts = np.zeros((-(-self.clusters // per_block) + 1) * per_block, np.uint64)
        for index in np.flatnonzero(used).tolist():
            start = index * per_block
            if start < len(counts):
                counts[start : start + per_block] = self._block(int(entries[index]))
        return counts[: self.clusters + 1]

    def _block(self, offset: int) -> Words:
        raw = np.ascontiguousarray(self._bytes(offset, self.cluster))
        if self.order >= 3:
            return raw.view(np.dtype(f">u{1 << self.order - 3}")).astype(np.uint64)
        bits = np.unpackbits(raw, bitorder="little").reshape(-1, 1 << self.order)
        weights = np.uint64(1) << np.arange(1 << self.order, dtype=np.uint64)
        return (bits.astype(np.uint64) * weights).sum(axis=1)

    def _fixed(self) -> None:
        self._use(0, self.cluster)
        self._use(self.l1_offset, self.l1_size * 8)
        self._use(self.table_offset, self.table_clusters << self.bits)
        bitmaps = self.extensions.get(BITMAPS)
        if bitmaps is not None and self.autoclear & 1:
            self._bitmaps(bitmaps)

    def _bitmaps(self, extension: bytes) -> None:
        count, _, size, offset = struct.unpack(">IIQQ", extension[:24])
        self._use(offset, size)
        position = offset
        for _ in range(count):
            table, entries, flags, _, bits, name_length, extra = struct.unpack(
                ">QIIBBHI", bytes(self._bytes(position, 24))
            )
            self._use(table, entries * 8)
            words = self._words(table, entries)
            data = words & OFFSET
            self._use_all(data[data != 0], "a bitmap")
            name = bytes(self._bytes(position + 24 + extra, name_length)).decode()
            if not flags & 1:  # in use: its bits are worth nothing
                self.bitmaps[name] = (1 << bits, self._bits(words))
            position += -(-(24 + extra + name_length) // 8) * 8

    def _bits(self, table: Words) -> npt.NDArray[np.bool_]:
        """The bits of a bitmap, all of its clusters."""
        parts = []
        for word in table.tolist():
            if word & int(OFFSET):
                parts.append(self._bytes(word & int(OFFSET), self.cluster))
            else:
                parts.append(np.full(self.cluster, 255 * (word & 1), np.uint8))
        joined = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        return np.unpackbits(joined, bitorder="little").astype(np.bool_)

    def _tables(self, l1: Words, *, active: bool) -> dict[int, Words]:
        """The L2 tables by L1 index; what they refer to is noted as used."""
        offsets = l1 & OFFSET
        bad = (l1 & np.uint64(0x7F000000000001FF)) != 0
        bad |= (offsets & np.uint64(self.cluster - 1)) != 0
        bad |= (l1 != 0) & (offsets == 0)
        if bad.any():
            self.errors.append(f"L1 entries {[hex(e) for e in l1[bad].tolist()]}")
        used = np.flatnonzero((offsets != 0) & ~bad)
        self._use_all(offsets[used], "an L2 table")
        if active:
            self._copied(l1[used], "L1")
        found: dict[int, Words] = {}
        for index in used.tolist():
            entries = self._words(int(offsets[index]), self.entries_per_table)
            found[index] = entries
            self._entries(entries, active=active)
        return found

    def _entries(self, entries: Words, *, active: bool) -> None:
        compressed = (entries >> np.uint64(62) & ONE) != 0
        for entry in entries[compressed].tolist():
            self._use(*self._compressed(entry))
            if entry >> 63:
                self.errors.append(f"compressed and COPIED {entry:#x}")
        standard = entries[~compressed & (entries != 0)]
        if not len(standard):
            return
        offsets = standard & OFFSET
        reserved = np.uint64(0x3F000000000001FE | (self.version < 3))
        bad = (standard & reserved) != 0
        bad |= (offsets & np.uint64(self.cluster - 1)) != 0
        bad |= (offsets == 0) & (standard != ONE)
        if bad.any():
            self.errors.append(f"L2 entries {[hex(e) for e in standard[bad].tolist()[:4]]}")
        held = standard[(offsets != 0) & ~bad]
        self._use_all(held & OFFSET, "a data cluster")
        if active:
            self._copied(held, "L2")

    def _copied(self, entries: Words, what: str) -> None:
        clusters = np.minimum((entries & OFFSET) >> np.uint64(self.bits), self.clusters)
        wrong = (entries >> np.uint64(63) != 0) != (self.counts[clusters.astype(np.int64)] == 1)
        if wrong.any():
            self.errors.append(
                f"COPIED of {what} entries {[hex(e) for e in entries[wrong].tolist()[:4]]}"
            )

    def _compressed(self, entry: int) -> tuple[int, int]:
        x = 62 - (self.bits - 8)
        offset = entry & (1 << x) - 1
        sectors = (entry & (1 << 62) - 1) >> x
        return offset, (sectors + 1) * 512 - offset % 512

    def _snapshots(self) -> None:
        position = self.snapshots_offset
        for _ in range(self.snapshots):
            l1_offset, l1_size, id_length, name_length = struct.unpack(
                ">QIHH", bytes(self._bytes(position, 16))
            )
            (extra,) = struct.unpack(">I", bytes(self._bytes(position + 36, 4)))
            position += 40 + extra + id_length + name_length
            position = (position + 7) // 8 * 8
            self._use(l1_offset, l1_size * 8)
            self._tables(self._words(l1_offset, l1_size), active=False)
        if self.snapshots:
            self._use(self.snapshots_offset, position - self.snapshots_offset)

    def _compare(self) -> None:
        references = self.references[: self.clusters]
        counts = self.counts[: self.clusters].astype(np.int64)
        low = np.flatnonzero(counts < references)
        # With the dirty bit a writer leaves the refcounts to be made good.
        if len(low) and not self.incompatible & 1:
            found = [f"{c:#x}: {counts[c]} < {references[c]}" for c in low.tolist()[:4]]
            self.errors.append(f"{len(low)} refcounts too low: {found}")
        if self.incompatible & 2:
            self.errors.append("marked corrupt")
        self.leaks = int((counts > references).sum())

    # -- the guest's view

    def view(self, below: Bytes | None) -> Bytes:
        """All of the disk; ``below`` is the view of the backing file."""
        clusters = -(-self.size >> self.bits)
        clusters = -(-self.size // self.cluster)
        result = np.zeros(clusters << self.bits, np.uint8)
        if below is not None:
            part = below[: self.size]
            result[: len(part)] = part
        grid = result.reshape(-1, self.cluster)
        blocks = self.content.reshape(-1, self.cluster)
        for index, entries in self.tables.items():
            first = index * self.entries_per_table
            part = grid[first : first + self.entries_per_table]
            here = entries[: len(part)]
            compressed = (here >> np.uint64(62) & ONE) != 0
            zero = ~compressed & ((here & ONE) != 0)
            data = ~compressed & ~zero & ((here & OFFSET) != 0)
            part[zero] = 0
            hosts = ((here[data] & OFFSET) >> np.uint64(self.bits)).astype(np.int64)
            part[data] = blocks[np.minimum(hosts, self.clusters - 1)]
            for number in np.flatnonzero(compressed).tolist():
                offset, length = self._compressed(int(here[number]))
                raw = zlib.decompressobj(-12).decompress(
                    bytes(self._bytes(offset, length)), self.cluster
                )
                part[number] = np.frombuffer(raw, np.uint8)
        return result[: self.size]


class Chains:
    """Chains of crashed images; what has not changed since the last cut is not read again."""

    def __init__(self, names: Mapping[str, int]) -> None:
        self.names = names
        self._images: dict[int, tuple[int, Crashed]] = {}
        self._views: dict[int, tuple[object, Bytes]] = {}

    def image(self, index: int, content: Bytes, version: int | None) -> Crashed:
        """The image of a disk; ``version`` None: draw nothing from an earlier one."""
        known = self._images.get(index)
        if known is not None and version is not None and known[0] == version:
            return known[1]
        image = Crashed(content)
        if version is not None:
            self._images[index] = (version, image)
        else:
            self._images.pop(index, None)
        return image

    def read(
        self, top: str, disks: list[Bytes], versions: list[int | None]
    ) -> tuple[list[tuple[str, Crashed]], list[Bytes]]:
        """The images that the headers lead to from ``top`` on, and what a guest sees of each."""
        found: list[tuple[str, Crashed]] = []
        name: str | None = top
        indices: list[int] = []
        while name is not None:
            index = self.names[name]
            found.append((name, self.image(index, disks[index], versions[index])))
            indices.append(index)
            assert len(found) < 20, "the chain has a loop"
            name = found[-1][1].backing
        view: Bytes | None = None
        views: list[Bytes] = []
        key: object = None
        for index, (_, image) in zip(reversed(indices), reversed(found), strict=True):
            key = (key, index, versions[index])
            known = self._views.get(index)
            if versions[index] is not None and known is not None and known[0] == key:
                view = known[1]
                views.append(view)
                continue
            view = image.view(view)
            views.append(view)
            if versions[index] is not None:
                self._views[index] = (key, view)
            else:
                self._views.pop(index, None)
                key = object()
        return found, views[::-1]
