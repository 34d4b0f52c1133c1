"""Reads qcow2 images found after a crash: a second reading of the format, by whole tables.

Shares no code with the engine. ``Crashed`` looks at the bytes of one image: ``errors`` (what
qemu-img check calls corruptions), ``leaks``, ``view``, the guest's bytes, and ``snapshot_views``.
Versions 2 and 3, extended L2 entries, external data files, internal snapshots, bitmaps, zlib, zstd,
and data encrypted by AES in XTS mode, whose key is given.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
OFFSET = np.uint64(0x00FFFFFFFFFFFE00)
COPIED = np.uint64(1 << 63)
ONE = np.uint64(1)
BITMAPS, ENCRYPTION, DATA_FILE = 0x23852875, 0x0537BE77, 0x44415441
SUBCLUSTERS = np.arange(32, dtype=np.uint64)
HALF = np.uint64(32)


class NoImageError(Exception):
    """There is no header that could be read."""


class Flat:
    """A raw image: the bytes of the file are the disk's. Looked at as ``Crashed`` is."""

    leaks = 0
    backing = data_file = key = None
    raw = False

    def __init__(self, content: Bytes) -> None:
        self.content = content
        self.errors: list[str] = []
        self.bitmaps: dict[str, tuple[int, npt.NDArray[np.bool_]]] = {}

    def view(self, below: Bytes | None) -> Bytes:
        """All of the disk."""
        del below
        return self.content

    def raw_view(self) -> Bytes:
        """The same."""
        return self.content

    def snapshot_views(self, below: Bytes | None) -> dict[str, tuple[Bytes, Bytes]]:
        """There are none."""
        del below
        return {}


class Kept(NamedTuple):
    """An internal snapshot: its size in bytes and its L2 tables."""

    size: int
    tables: dict[int, Words]


class Crashed:
    """One image file; ``data`` is its external data file, ``key`` that of encrypted data."""

    def __init__(self, content: Bytes, data: Bytes | None = None, key: bytes | None = None) -> None:
        self.errors: list[str] = []
        self.leaks = 0
        #: granularity and bits of the bitmaps that may be believed
        self.bitmaps: dict[str, tuple[int, npt.NDArray[np.bool_]]] = {}
        if len(content) < 72 or bytes(content[:4]) != b"QFI\xfb":
            raise NoImageError("no qcow2 header")
        (self.version, backing_offset, backing_length, self.bits, self.size, crypt, self.l1_size,
         self.l1_offset, self.table_offset, self.table_clusters, self.snapshots,
         self.snapshots_offset) = struct.unpack(">IQIIQIIQQIIQ", bytes(content[4:72]))  # fmt: skip
        if self.version not in (2, 3) or not 9 <= self.bits <= 21:
            raise NoImageError("a header that cannot be")
        self.incompatible = self.autoclear = self.compression = 0
        self.order, header_length = 4, 72
        if self.version == 3:
            self.incompatible, _, self.autoclear, self.order, header_length = struct.unpack(
                ">QQQII", bytes(content[72:104])
            )
            if header_length > 104:
                self.compression = int(content[104])
        self.extended = bool(self.incompatible & 16)
        self.key = key if crypt == 2 else None
        self.cluster = 1 << self.bits
        padding = -len(content) % self.cluster
        self.content = np.concatenate((content, np.zeros(padding, np.uint8)))
        self.clusters = len(self.content) >> self.bits
        self.backing: str | None = None
        if backing_offset:
            self.backing = plain_name(bytes(self._bytes(backing_offset, backing_length)).decode())
        self.extensions = self._extensions(header_length, backing_offset or self.cluster)
        self.data_file = None
        if self.incompatible & 4:
            self.data_file = self.extensions.get(DATA_FILE, b"").decode()
        self.raw = self.data_file is not None and bool(self.autoclear & 2)
        self.data = self.content
        if self.data_file is not None and data is not None:
            padding = -len(data) % self.cluster
            self.data = np.concatenate((data, np.zeros(padding, np.uint8)))
        self.kept: dict[str, Kept] = {}
        self.l1 = self._words(self.l1_offset, self.l1_size)
        self.words_per_entry = 2 if self.extended else 1
        self.entries_per_table = self.cluster // 8 // self.words_per_entry
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
        if ENCRYPTION in self.extensions:
            self._use(*struct.unpack(">QQ", self.extensions[ENCRYPTION]))
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
            words = self._words(int(offsets[index]), self.cluster // 8)
            found[index] = entries = words.reshape(-1, self.words_per_entry)
            if self.data_file is None:
                self._entries(entries, active=active)
            else:
                self._entries_of_data_file(entries, index)
        return found

    def _entries(self, pairs: Words, *, active: bool) -> None:
        entries = pairs[:, 0]
        compressed = (entries >> np.uint64(62) & ONE) != 0
        for entry in entries[compressed].tolist():
            self._use(*self._compressed(entry))
            if entry >> 63:
                self.errors.append(f"compressed and COPIED {entry:#x}")
        chosen = ~compressed & (entries != 0)
        standard = entries[chosen]
        if self.extended:
            self._bitmaps_of_subclusters(pairs[~compressed])
        if not len(standard):
            return
        offsets = standard & OFFSET
        reserved = np.uint64(0x3F000000000001FE | (self.version < 3 or self.extended))
        bad = (standard & reserved) != 0
        bad |= (offsets & np.uint64(self.cluster - 1)) != 0
        bad |= (offsets == 0) & (standard != ONE)
        if bad.any():
            self.errors.append(f"L2 entries {[hex(e) for e in standard[bad].tolist()[:4]]}")
        held = standard[(offsets != 0) & ~bad]
        self._use_all(held & OFFSET, "a data cluster")
        if active:
            self._copied(held, "L2")

    def _bitmaps_of_subclusters(self, pairs: Words) -> None:
        allocated, zero = pairs[:, 1] & np.uint64(0xFFFFFFFF), pairs[:, 1] >> HALF
        bad = (allocated & zero) != 0
        if self.data_file is None:
            bad |= (allocated != 0) & ((pairs[:, 0] & OFFSET) == 0)
        if bad.any():
            self.errors.append(f"bitmaps {[hex(e) for e in pairs[bad, 1].tolist()[:4]]}")

    def _entries_of_data_file(self, pairs: Words, l1_index: int) -> None:
        """Every cluster lies where the guest sees it, and is this image's alone."""
        entries = pairs[:, 0]
        there = (entries & (OFFSET | COPIED)) != 0
        numbers = np.arange(len(entries), dtype=np.uint64) + np.uint64(l1_index * len(entries))
        bad = there & ((entries & OFFSET) != numbers << np.uint64(self.bits))
        bad |= there & ((entries & COPIED) == 0)
        bad |= (entries & np.uint64(0x7F000000000001FE | self.extended)) != 0
        if bad.any():
            self.errors.append(f"of a data file: {[hex(e) for e in entries[bad].tolist()[:4]]}")
        if self.extended:
            self._bitmaps_of_subclusters(pairs)

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
            size = self.size
            if extra >= 16:
                (size,) = struct.unpack(">Q", bytes(self._bytes(position + 48, 8)))
            text = bytes(self._bytes(position + 40 + extra + id_length, name_length))
            position += 40 + extra + id_length + name_length
            position = (position + 7) // 8 * 8
            self._use(l1_offset, l1_size * 8)
            tables = self._tables(self._words(l1_offset, l1_size), active=False)
            self.kept[text.decode("utf-8", "replace")] = Kept(size, tables)
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
        return self._view(self.tables, self.size, below)

    def raw_view(self) -> Bytes:
        """What somebody sees who takes a raw data file for the disk."""
        found = np.zeros(self.size, np.uint8)
        part = self.data[: self.size]
        found[: len(part)] = part
        return found

    def snapshot_views(self, below: Bytes | None) -> dict[str, tuple[Bytes, Bytes]]:
        """By name: the bytes of an internal snapshot, and which of them are its own."""
        found = {}
        for name, kept in self.kept.items():
            parts = 32 if self.extended else 1
            own = np.zeros((-(-kept.size // self.cluster), parts), np.uint8)
            view = self._view(kept.tables, kept.size, below, own)
            found[name] = view, np.repeat(own.reshape(-1), self.cluster // parts)[: kept.size]
        return found

    def _view(
        self,
        tables: dict[int, Words],
        size: int,
        below: Bytes | None,
        own: Bytes | None = None,
    ) -> Bytes:
        """``own`` gets a 1 for every part of a cluster that is not from below."""
        parts = 32 if self.extended else 1
        clusters = -(-size // self.cluster)
        result = np.zeros(clusters << self.bits, np.uint8)
        if below is not None:
            part = below[:size]
            result[: len(part)] = part
        grid = result.reshape(clusters, parts, self.cluster // parts)
        for index, pairs in tables.items():
            first = index * self.entries_per_table
            here = grid[first : first + self.entries_per_table]
            pairs = pairs[: len(here)]
            entries = pairs[:, 0]
            compressed = (entries >> np.uint64(62) & ONE) != 0
            zero, data = self._kinds(pairs, compressed)
            here[zero] = 0
            some = np.flatnonzero(data.any(axis=1))
            hosts = ((entries[some] & OFFSET) >> np.uint64(self.bits)).astype(np.int64)
            found = self._clusters(hosts).reshape(-1, parts, self.cluster // parts)
            if parts == 1:
                here[some] = found
            else:
                here[some] = np.where(data[some][:, :, None], found, here[some])
            for number in np.flatnonzero(compressed).tolist():
                raw = np.frombuffer(self._unpack(int(entries[number])), np.uint8)
                here[number] = raw.reshape(parts, -1)
            if own is not None:
                held = own[first : first + self.entries_per_table]
                held[:] = zero | data | compressed[:, None]
        return result[:size]

    def _kinds(
        self, pairs: Words, compressed: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which subclusters (or clusters) read as zeros, and which have data of their own."""
        plain = ~compressed[:, None]
        if self.extended:
            bits = pairs[:, 1:] >> SUBCLUSTERS
            return plain & (bits >> HALF & ONE != 0), plain & (bits & ONE != 0)
        entries = pairs[:, :1]
        zero = plain & ((entries & ONE) != 0)
        held = OFFSET if self.data_file is None else OFFSET | COPIED
        return zero, plain & ~zero & ((entries & held) != 0)

    def _clusters(self, hosts: npt.NDArray[np.int64]) -> Bytes:
        """The contents of these host clusters."""
        blocks = self.data.reshape(-1, self.cluster)
        if not len(blocks):
            return np.zeros((len(hosts), self.cluster), np.uint8)
        found = blocks[np.minimum(hosts, len(blocks) - 1)]
        if self.data_file is not None:
            found[hosts >= len(blocks)] = 0
        if self.key is not None and len(hosts):
            per_cluster = self.cluster // 512
            sectors = hosts[:, None] * per_cluster + np.arange(per_cluster)
            found = decrypt(self.key, sectors.reshape(-1), found.reshape(-1, 512))
        return found.reshape(-1, self.cluster)

    def _unpack(self, entry: int) -> bytes:
        offset, length = self._compressed(entry)
        packed = bytes(self._bytes(offset, length))
        if self.compression == 1:
            from backports import zstd

            raw = zstd.ZstdDecompressor().decompress(packed, self.cluster)
        else:
            try:
                raw = zlib.decompressobj(-12).decompress(packed, self.cluster)
            except zlib.error:
                raw = b""
        return raw.ljust(self.cluster, b"\xee")  # what is not whole is wrong


def plain_name(name: str) -> str:
    """The file that a backing name leads to, which may be written as options."""
    if not name.startswith("json:"):
        return name
    options = json.loads(name.removeprefix("json:"))
    return str(options["file"]["filename"])


def decrypt(key: bytes, sectors: npt.NDArray[np.int64], data: Bytes) -> Bytes:
    """Sectors of 512 bytes, by AES-XTS with plain64: IEEE 1619, all of them at once."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    half = len(key) // 2
    first, second = (Cipher(algorithms.AES(k), modes.ECB()) for k in (key[:half], key[half:]))
    numbers = np.zeros((len(sectors), 2), "<u8")
    numbers[:, 0] = sectors
    start = second.encryptor().update(numbers.tobytes())
    low, high = np.frombuffer(start, "<u8").reshape(-1, 2).T.astype(np.uint64)
    tweaks = np.zeros((len(sectors), 32, 2), "<u8")
    for block in range(32):
        tweaks[:, block, 0], tweaks[:, block, 1] = low, high
        carry = high >> np.uint64(63)
        high = (high << ONE) | (low >> np.uint64(63))
        low = (low << ONE) ^ (carry * np.uint64(0x87))
    mask = tweaks.view(np.uint8).reshape(-1)
    plain = first.decryptor().update((np.ascontiguousarray(data).reshape(-1) ^ mask).tobytes())
    found: Bytes = np.frombuffer(plain, np.uint8) ^ mask
    return found.reshape(-1, 512)


Image: TypeAlias = Crashed | Flat


class Chains:
    """Chains of crashed images; what has not changed since the last cut is not read again."""

    def __init__(
        self, names: Mapping[str, int], key: bytes | None = None, raw: Collection[str] = ()
    ) -> None:
        self.names = names
        self.key = key
        self._raw = {names[name] for name in raw}
        self._images: dict[int, tuple[object, Image]] = {}
        self._views: dict[int, tuple[object, Bytes]] = {}

    def image(
        self, index: int, disks: list[Bytes], versions: list[int | None]
    ) -> tuple[Image, object]:
        """The image of a disk, and its version; None: draw nothing from an earlier one."""
        known = self._images.get(index)
        version: object = versions[index]
        if known is not None and version is not None:
            data = known[1].data_file
            other = 0 if data is None else versions[self.names[data]]
            version = None if other is None else (version, other)
            if version is not None and known[0] == version:
                return known[1], version
        image: Image = (
            Flat(disks[index]) if index in self._raw else Crashed(disks[index], key=self.key)
        )
        version = versions[index]
        if image.data_file is not None:
            number = self.names[image.data_file]
            image = Crashed(disks[index], disks[number], self.key)
            other = versions[number]
            version = None if version is None or other is None else (version, other)
        elif version is not None:
            version = (version, 0)
        if version is not None:
            self._images[index] = (version, image)
        else:
            self._images.pop(index, None)
        return image, version

    def read(
        self, top: str, disks: list[Bytes], versions: list[int | None]
    ) -> tuple[list[tuple[str, Image]], list[Bytes]]:
        """The images that the headers lead to from ``top`` on, and what a guest sees of each."""
        found: list[tuple[str, Image]] = []
        name: str | None = top
        indices: list[tuple[int, object]] = []
        while name is not None:
            index = self.names[name]
            image, version = self.image(index, disks, versions)
            found.append((name, image))
            indices.append((index, version))
            assert len(found) < 20, "the chain has a loop"
            name = found[-1][1].backing
        view: Bytes | None = None
        views: list[Bytes] = []
        key: object = None
        for (index, version), (_, image) in zip(reversed(indices), reversed(found), strict=True):
            key = (key, index, version)
            known = self._views.get(index)
            if version is not None and known is not None and known[0] == key:
                view = known[1]
                views.append(view)
                continue
            view = image.view(view)
            views.append(view)
            if version is not None:
                self._views[index] = (key, view)
            else:
                self._views.pop(index, None)
                key = object()
        return found, views[::-1]
