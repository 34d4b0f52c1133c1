"""The directory of persistent dirty bitmaps and their tables: bytes to values and back.

Specification: docs/interop/qcow2, "Bitmaps extension", "Bitmaps".

Runs on: pure. Invariants: a ``BitmapEntry`` that ``parse_directory`` returned names tables within
the bounds that QEMU has too; unknown extra data survives ``serialise_directory``.
Errors: ``BlockError`` for what cannot be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.layout import ENTRY_BYTES, MAX_HOST_OFFSET, OFFSET_MASK, Geometry
from liveblockd.formats.qcow2.tables import Entries

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")

IN_USE: Final = 1 << 0
AUTO: Final = 1 << 1
EXTRA_COMPATIBLE: Final = 1 << 2
_FLAGS: Final = IN_USE | AUTO | EXTRA_COMPATIBLE
_DIRTY_TRACKING: Final = 1

#: the bounds that QEMU has as well; bytes where not a count
MAX_BITMAPS: Final = 65535
MAX_DIRECTORY_BYTES: Final = 64 << 20
MAX_TABLE_ENTRIES: Final = 0x800_0000
MAX_DATA_BYTES: Final = 0x2000_0000
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31
MAX_NAME: Final = 1023


class DirectoryPlace(NamedTuple):
    """What the header extension says; bytes."""

    bitmaps: int
    length: int
    host_offset: int


@dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One bitmap of the directory."""

    name: bytes
    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int
    extra: bytes = b""

    @property
    def usable(self) -> bool:
        """Whether its bits may be believed: it was stored, and nothing in it is unknown."""
        return not self.flags & IN_USE and (not self.extra or bool(self.flags & EXTRA_COMPATIBLE))

    @property
    def text(self) -> str:
        """The name."""
        return self.name.decode("utf-8", "surrogateescape")


def parse_extension(data: bytes, geometry: Geometry) -> DirectoryPlace:
    """Where the directory lies; raises BlockError."""
    if len(data) != _EXTENSION.size:
        raise BlockError("bitmaps_ext: Invalid extension length")
    bitmaps, reserved, length, host_offset = _EXTENSION.unpack(data)
    if reserved:
        raise BlockError("bitmaps_ext: Reserved field is not zero")
    if not 0 < bitmaps <= MAX_BITMAPS:
        raise BlockError(f"bitmaps_ext: image has {bitmaps} bitmaps, 1 to {MAX_BITMAPS} can be")
    if host_offset % geometry.cluster_size or not 0 < host_offset < MAX_HOST_OFFSET:
        raise BlockError("bitmaps_ext: invalid bitmap directory offset")
    if not bitmaps * _ENTRY.size < length <= MAX_DIRECTORY_BYTES:
        raise BlockError(f"bitmaps_ext: invalid bitmap directory size ({length})")
    return DirectoryPlace(bitmaps, length, host_offset)


def serialise_extension(place: DirectoryPlace) -> bytes:
    """The data of the extension."""
    return _EXTENSION.pack(place.bitmaps, 0, place.length, place.host_offset)


def parse_directory(
    data: bytes, place: DirectoryPlace, geometry: Geometry, disk_size: int
) -> list[BitmapEntry]:
    """The bitmaps; raises BlockError."""
    found: list[BitmapEntry] = []
    position = 0
    while position < place.length:
        if position + _ENTRY.size > place.length:
            raise BlockError("Broken bitmap directory")
        (table_offset, entries, flags, kind, bits, name_length, extra_length) = _ENTRY.unpack_from(
            data, position
        )
        start = position + _ENTRY.size + extra_length
        end = start + name_length
        if -(-end // 8) * 8 > place.length:
            raise BlockError("Broken bitmap directory")
        entry = BitmapEntry(
            bytes(data[start:end]), table_offset, entries, flags, bits,
            bytes(data[position + _ENTRY.size : start]),
        )  # fmt: skip
        _check_entry(entry, kind, geometry, disk_size)
        found.append(entry)
        position = -(-end // 8) * 8
    if len(found) != place.bitmaps:
        raise BlockError("Less bitmaps found than specified in header extension")
    if len({entry.name for entry in found}) != len(found):
        raise BlockError("Two bitmaps have the same name")
    return found


def _check_entry(entry: BitmapEntry, kind: int, geometry: Geometry, disk_size: int) -> None:
    size = geometry.cluster_size
    data_bytes = entry.table_entries * size
    wrong = (
        not 0 < len(entry.name) <= MAX_NAME
        or kind != _DIRTY_TRACKING
        or entry.flags & ~_FLAGS
        or not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS
        or entry.table_offset % size
        or not 0 < entry.table_offset < MAX_HOST_OFFSET
        or not 0 < entry.table_entries <= MAX_TABLE_ENTRIES
        or data_bytes > MAX_DATA_BYTES + size
    )
    if wrong:
        raise BlockError(f"Bitmap '{entry.text}' doesn't satisfy the constraints")
    # Of a bitmap in use the disk may have got another size.
    if not entry.flags & IN_USE and data_entries(entry, disk_size, geometry) > entry.table_entries:
        raise BlockError(f"Bitmap '{entry.text}' is too short for the disk")


def data_entries(entry: BitmapEntry, disk_size: int, geometry: Geometry) -> int:
    """Clusters of bits that a disk of ``disk_size`` bytes needs."""
    granules = -(-disk_size // (1 << entry.granularity_bits))
    return max(1, geometry.clusters(-(-granules // 8)))


def serialise_directory(entries: Iterable[BitmapEntry]) -> bytes:
    """The directory."""
    parts = []
    for entry in entries:
        part = _ENTRY.pack(
            entry.table_offset, entry.table_entries, entry.flags, _DIRTY_TRACKING,
            entry.granularity_bits, len(entry.name), len(entry.extra),
        )  # fmt: skip
        part += entry.extra + entry.name
        parts.append(part.ljust(-(-len(part) // 8) * 8, b"\0"))
    return b"".join(parts)


def in_use(entries: Iterable[BitmapEntry]) -> list[BitmapEntry]:
    """The same, all marked: what the disk has is out of date from now on."""
    return [replace(entry, flags=entry.flags | IN_USE) for entry in entries]


def bad_table_entries(table: Entries, geometry: Geometry) -> bool:
    """Whether there is an entry that cannot be."""
    offsets = table & np.uint64(OFFSET_MASK)
    reserved = np.uint64(~(OFFSET_MASK | 1) & (1 << 64) - 1)
    bad = (table & reserved) != 0
    bad |= (offsets & np.uint64(geometry.cluster_size - 1)) != 0
    bad |= (offsets != 0) & ((table & np.uint64(1)) != 0)
    return bool(bad.any())


def check_limits(name: str, granularity: int, disk_size: int, others: int) -> None:
    """BlockError if an image cannot keep such a bitmap beside ``others`` more; sizes in bytes."""
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        raise BlockError(f"Name length exceeds maximum ({MAX_NAME} characters)")
    if granularity.bit_length() - 1 > MAX_GRANULARITY_BITS:
        raise BlockError(f"Granularity exceeds maximum ({1 << MAX_GRANULARITY_BITS} bytes)")
    if granularity.bit_length() - 1 < MIN_GRANULARITY_BITS:
        raise BlockError(f"Granularity is under minimum ({1 << MIN_GRANULARITY_BITS} bytes)")
    if -(-disk_size // granularity) > MAX_DATA_BYTES * 8:
        raise BlockError("Too much space will be occupied by the bitmap. Use larger granularity")
    if others >= MAX_BITMAPS:
        raise BlockError("Maximum number of persistent bitmaps is already reached")


def table_bytes(entries: int) -> int:
    """Bytes of a bitmap table."""
    return entries * ENTRY_BYTES
