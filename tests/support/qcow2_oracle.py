"""A second reading of the qcow2 specification, for tests: slow, simple, shares no code with ours.

``Oracle(content)`` looks at the bytes of an image file: ``errors`` (what qemu-img check calls
corruptions), ``leaks``, and ``read``, the guest's view. Versions 2 and 3 without extended L2
entries; zlib.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter

import numpy as np


class Oracle:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.errors: list[str] = []
        self.leaks: list[int] = []
        self._tables: dict[int, list[int]] = {}
        (magic, self.version, backing_offset, backing_length, self.cluster_bits, self.size,
         _, l1_size, l1_offset, table_offset, table_clusters, snapshots, snapshots_offset,
         ) = struct.unpack(">4sIQIIQIIQQIIQ", self._bytes(0, 72))  # fmt: skip
        assert magic == b"QFI\xfb", "no qcow2 header"
        self.incompatible = self.autoclear = 0
        self.refcount_order, self.header_length = 4, 72
        if self.version == 3:
            (self.incompatible, _, self.autoclear, self.refcount_order, self.header_length) = (
                struct.unpack(">QQQII", self._bytes(72, 32))
            )
        self.cluster_size = 1 << self.cluster_bits
        self.backing = None
        if backing_offset:
            self.backing = self._bytes(backing_offset, backing_length).decode()
        self.extensions = self._extensions()
        self.l1 = self._entries(l1_offset, l1_size)
        self.extended = bool(self.incompatible >> 4 & 1)
        self.zstd = self.header_length > 104 and self._bytes(104, 1) == b"\x01"
        self.words = 2 if self.extended else 1  # of 8 bytes in an L2 entry
        self.l2_entries = self.cluster_size // 8 // self.words
        if l1_size * self.l2_entries * self.cluster_size < self.size:
            self.errors.append("L1 too small")
        self.references: Counter[int] = Counter()
        self._use(0, self.cluster_size)
        self._use(l1_offset, l1_size * 8)
        self._use(table_offset, table_clusters * self.cluster_size)
        self.table = self._entries(table_offset, table_clusters * self.cluster_size // 8)
        for entry in self.table:
            if entry:
                self._use(entry, self.cluster_size)
        self._counts = self._refcounts()
        #: (id, name, L1 table, size of the disk)
        self.snapshots: list[tuple[str, str, list[int], int]] = []
        self._snapshots(snapshots, snapshots_offset)
        self._walk(self.l1, active=True)
        #: (flags, granularity, bits) by name
        self.bitmaps: dict[str, tuple[int, int, bytes]] = {}
        self._bitmaps()
        self._compare()

    def _bytes(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length].ljust(length, b"\0")

    def _entries(self, offset: int, count: int) -> list[int]:
        return list(struct.unpack(f">{count}Q", self._bytes(offset, count * 8)))

    def _extensions(self) -> list[tuple[int, bytes]]:
        found, position = [], self.header_length
        while position + 8 <= self.cluster_size:
            kind, length = struct.unpack(">II", self._bytes(position, 8))
            if not kind:
                break
            if position + 8 + length > self.cluster_size:
                self.errors.append("extension too long")
                break
            found.append((kind, self._bytes(position + 8, length)))
            position += 8 + (length + 7) // 8 * 8
        return found

    def _use(self, offset: int, length: int) -> None:
        if length:
            first, last = offset >> self.cluster_bits, (offset + length - 1) >> self.cluster_bits
            for cluster in range(first, last + 1):
                self.references[cluster] += 1

    def _snapshots(self, count: int, offset: int) -> None:
        position = offset
        for _ in range(count):
            l1_offset, l1_size, id_length, name_length = struct.unpack(
                ">QIHH", self._bytes(position, 16)
            )
            (extra,) = struct.unpack(">I", self._bytes(position + 36, 4))
            size = self.size
            if extra >= 16:
                (size,) = struct.unpack(">Q", self._bytes(position + 48, 8))
            position += 40 + extra
            text = self._bytes(position, id_length + name_length).decode()
            position += id_length + name_length
            l1 = self._entries(l1_offset, l1_size)
            self.snapshots.append((text[:id_length], text[id_length:], l1, size))
            position = (position + 7) // 8 * 8
            self._use(l1_offset, l1_size * 8)
            self._walk(self._entries(l1_offset, l1_size), active=False)
        if count:
            self._use(offset, position - offset)

    def _bitmaps(self) -> None:
        data = dict(self.extensions).get(0x23852875)
        if data is None or not self.autoclear & 1:
            return
        count, _, length, offset = struct.unpack(">IIQQ", data)
        self._use(offset, length)
        position = offset
        for _ in range(count):
            table, entries, flags, kind, bits, name_length, extra = struct.unpack(
                ">QIIBBHI", self._bytes(position, 24)
            )
            name = self._bytes(position + 24 + extra, name_length).decode()
            position += (24 + extra + name_length + 7) // 8 * 8
            if kind != 1:
                self.errors.append(f"type of bitmap {name}")
            self._use(table, entries * 8)
            parts = []
            for entry in self._entries(table, entries):
                host = entry & 0x00FFFFFFFFFFFE00
                if host:
                    self._use(host, self.cluster_size)
                    parts.append(self._bytes(host, self.cluster_size))
                else:
                    parts.append((b"\xff" if entry & 1 else b"\0") * self.cluster_size)
            self.bitmaps[name] = (flags, 1 << bits, b"".join(parts))
        if position != offset + length:
            self.errors.append("bitmap directory")

    def _walk(self, l1: list[int], *, active: bool) -> None:
        for l1_entry in l1:
            l2_offset = l1_entry & 0x00FFFFFFFFFFFE00
            if not l2_offset:
                if l1_entry:
                    self.errors.append(f"L1 entry {l1_entry:#x}")
                continue
            if l2_offset % self.cluster_size or l1_entry & 0x7F000000000001FF:
                self.errors.append(f"L1 entry {l1_entry:#x}")
                continue
            self._use(l2_offset, self.cluster_size)
            if active and bool(l1_entry >> 63) != (self.refcount(l2_offset) == 1):
                self.errors.append(f"COPIED of L1 entry {l1_entry:#x}")
            words = self._entries(l2_offset, self.cluster_size // 8)
            if self.extended:
                for entry, bitmap in zip(words[::2], words[1::2], strict=True):
                    self._walk_bitmap(entry, bitmap)
            for entry in filter(None, words[:: self.words]):
                self._walk_entry(entry, active=active)

    def _walk_bitmap(self, entry: int, bitmap: int) -> None:
        allocated, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
        if entry >> 62 & 1:
            if bitmap:
                self.errors.append(f"bitmap {bitmap:#x} of a compressed cluster")
        elif allocated & zero:
            self.errors.append(f"bitmap {bitmap:#x}: zero and allocated")
        elif allocated and not entry & 0x00FFFFFFFFFFFE00:
            self.errors.append(f"bitmap {bitmap:#x}: allocated nowhere")
        elif entry & 1:
            self.errors.append(f"bit 0 of extended entry {entry:#x}")

    def _walk_entry(self, entry: int, *, active: bool) -> None:
        if entry >> 62 & 1:
            offset, length = self._compressed(entry)
            self._use(offset, length)
            if entry >> 63:
                self.errors.append(f"compressed and COPIED {entry:#x}")
            return
        offset = entry & 0x00FFFFFFFFFFFE00
        if entry & 0x3F000000000001FE or (self.version < 3 and entry & 1):
            self.errors.append(f"reserved bits of L2 entry {entry:#x}")
        if not offset:
            if entry != 1:
                self.errors.append(f"L2 entry {entry:#x}")
            return
        if offset % self.cluster_size:
            self.errors.append(f"L2 entry {entry:#x}")
            return
        self._use(offset, self.cluster_size)
        if active and bool(entry >> 63) != (self.refcount(offset) == 1):
            self.errors.append(f"COPIED of L2 entry {entry:#x}, refcount {self.refcount(offset)}")

    def _compressed(self, entry: int) -> tuple[int, int]:
        x = 62 - (self.cluster_bits - 8)
        offset = entry & (1 << x) - 1
        sectors = (entry & (1 << 62) - 1) >> x
        return offset, (sectors + 1) * 512 - offset % 512

    def refcount(self, offset: int) -> int:
        return self._counts.get(offset >> self.cluster_bits, 0)

    def _refcounts(self) -> dict[int, int]:
        """By cluster; those that are not 0."""
        per_block = self.cluster_size * 8 >> self.refcount_order
        bits, found = 1 << self.refcount_order, {}
        for index, entry in enumerate(self.table):
            if not entry:
                continue
            data = self._bytes(entry, self.cluster_size)
            if bits >= 8:
                block = np.frombuffer(data, f">u{bits // 8}")
            else:
                packed = np.frombuffer(data, np.uint8)
                block = (packed[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1).reshape(-1)
            used = np.flatnonzero(block)
            found.update(
                zip((used + index * per_block).tolist(), block[used].tolist(), strict=True)
            )
        return found

    def _compare(self) -> None:
        for cluster in sorted(self._counts.keys() | self.references.keys()):
            used, counted = self.references[cluster], self._counts.get(cluster, 0)
            if counted < used:
                self.errors.append(f"cluster {cluster}: refcount {counted}, {used} references")
            elif counted > used:
                self.leaks.append(cluster)

    def entry(self, offset: int, l1: list[int] | None = None, word: int = 0) -> int:
        """The L2 entry of a guest offset, 0 without a table; ``word`` 1 is the bitmap."""
        cluster = offset >> self.cluster_bits
        l1 = self.l1 if l1 is None else l1
        if cluster // self.l2_entries >= len(l1):
            return 0
        l2_offset = l1[cluster // self.l2_entries] & 0x00FFFFFFFFFFFE00
        if not l2_offset:
            return 0
        if l2_offset not in self._tables:
            self._tables[l2_offset] = self._entries(l2_offset, self.cluster_size // 8)
        return self._tables[l2_offset][cluster % self.l2_entries * self.words + word]

    def read_snapshot(self, number: int, below: bytes = b"") -> bytes:
        """The disk as a snapshot has kept it."""
        _, _, l1, size = self.snapshots[number]
        return self.read(below, l1, size)

    def read(
        self, below: bytes = b"", l1: list[int] | None = None, size: int | None = None
    ) -> bytes:
        """The disk; ``below`` is what the backing file has, if the header names one."""
        size = self.size if size is None else size
        if self.backing is None:
            below = b""
        parts = []
        for offset in range(0, size, self.cluster_size):
            entry = self.entry(offset, l1)
            if entry >> 62 & 1:
                place, length = self._compressed(entry)
                data = self._inflate(self._bytes(place, length))
            elif self.extended:
                data = self._read_subclusters(offset, entry, self.entry(offset, l1, 1), below)
            elif entry & 1:
                data = b""
            elif entry & 0x00FFFFFFFFFFFE00:
                data = self._bytes(entry & 0x00FFFFFFFFFFFE00, self.cluster_size)
            else:
                data = below[offset : offset + self.cluster_size]
            parts.append(data.ljust(self.cluster_size, b"\0"))
        return b"".join(parts)[:size]

    def _inflate(self, data: bytes) -> bytes:
        if self.zstd:
            from backports import zstd

            return zstd.ZstdDecompressor().decompress(data, self.cluster_size)
        return zlib.decompressobj(-12).decompress(data, self.cluster_size)

    def _read_subclusters(self, offset: int, entry: int, bitmap: int, below: bytes) -> bytes:
        size = self.cluster_size // 32
        parts = []
        for number in range(32):
            if bitmap >> number & 1:
                place = (entry & 0x00FFFFFFFFFFFE00) + number * size
                part = self._bytes(place, size)
            elif bitmap >> (32 + number) & 1:
                part = b""
            else:
                part = below[offset + number * size : offset + (number + 1) * size]
            parts.append(part.ljust(size, b"\0"))
        return b"".join(parts)
