"""Entries of L1, L2 and refcount tables: what they say, and what they may not say.

Specification: docs/interop/qcow2, "Cluster mapping", "Refcount table entry".

Runs on: pure. In memory a table is a numpy array of native uint64 and a memoryview on the same
bytes: the array for work on many entries, the view for one (it gives a Python int in 40 ns, the
array takes three times that). On disk entries are big endian.
Invariants: an entry that ``bad_l2_entries`` lets pass names a cluster-aligned host offset above
the header cluster, or none. Errors: none.
"""

from __future__ import annotations

from errno import EIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    SECTOR,
    ZERO,
    Geometry,
)

Entries = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

_U = np.uint64


def from_disk(data: bytes | bytearray | memoryview) -> Entries:
    """A table of native integers from big endian bytes (a copy, writable)."""
    return np.frombuffer(data, dtype=">u8").astype(np.uint64)


def to_disk(entries: Entries) -> bytes:
    """The big endian bytes."""
    return entries.astype(">u8").tobytes()


class CompressedRange(NamedTuple):
    """Where compressed data lies: bytes of the image file."""

    host_offset: int
    length: int


def compressed_range(entry: int, geometry: Geometry) -> CompressedRange:
    """The sectors that a compressed descriptor names (the data may end within the last)."""
    bits = geometry.compressed_offset_bits
    host_offset = entry & ((1 << bits) - 1)
    sectors = (entry >> bits & ((1 << (62 - bits)) - 1)) + 1
    return CompressedRange(host_offset, sectors * SECTOR - host_offset % SECTOR)


def compressed_entry(place: CompressedRange, geometry: Geometry) -> int:
    """The L2 entry for compressed data; the inverse of ``compressed_range``."""
    bits = geometry.compressed_offset_bits
    last = place.host_offset + place.length - 1
    sectors = last // SECTOR - place.host_offset // SECTOR
    assert place.host_offset < 1 << bits and sectors < 1 << (62 - bits)
    return COMPRESSED | sectors << bits | place.host_offset


def compressed_clusters(entries: Entries, geometry: Geometry) -> tuple[Entries, Entries]:
    """The first and last host cluster that each of these compressed descriptors names."""
    bits = geometry.compressed_offset_bits
    offsets = entries & _U((1 << bits) - 1)
    sectors = (entries >> _U(bits)) & _U((1 << (62 - bits)) - 1)
    ends = offsets // _U(SECTOR) + sectors  # the last sector
    return offsets >> _U(geometry.cluster_bits), ends * _U(SECTOR) >> _U(geometry.cluster_bits)


def bad_l1_entries(entries: Entries, geometry: Geometry) -> npt.NDArray[np.intp]:
    """Indices of L1 entries with reserved bits or an offset where no L2 table can be."""
    misaligned = OFFSET_MASK & (geometry.cluster_size - 1)
    return np.flatnonzero((entries & _U(L1_RESERVED | misaligned)) != 0)


def bad_refcount_table_entries(entries: Entries, geometry: Geometry) -> npt.NDArray[np.intp]:
    """Indices of refcount table entries that name no possible refcount block."""
    bad = (entries & _U(REFCOUNT_TABLE_RESERVED | (geometry.cluster_size - 1))) != 0
    bad |= entries >= _U(1 << 63)
    return np.flatnonzero(bad)


def flags_at(indices: npt.NDArray[np.intp], count: int) -> Flags:
    """``count`` flags of which those at the indices are set."""
    flags = np.zeros(count, np.bool_)
    flags[indices] = True
    return flags


def bad_l2_entries(entries: Entries, geometry: Geometry) -> Entries:
    """Indices of L2 entries that a sound image cannot have.

    Of a standard entry: reserved bits, an unaligned offset. Of a compressed one: COPIED, or an
    offset within the header cluster or beyond bit 55.
    """
    reserved = L2_RESERVED if geometry.has_zero_clusters else L2_RESERVED | ZERO
    offsets = entries & _U(OFFSET_MASK)
    standard = (entries & _U(reserved)) != 0
    standard |= (offsets & _U(geometry.cluster_size - 1)) != 0
    packed = entries & _U((1 << min(geometry.compressed_offset_bits, 62)) - 1)
    compressed = (packed < _U(geometry.cluster_size)) | (packed >= _U(1 << 56))
    compressed |= (entries & _U(COPIED)) != 0
    bad = np.where((entries & _U(COMPRESSED)) != 0, compressed, standard)
    return np.flatnonzero(bad).astype(np.uint64)


def drop_idle_flags(entries: Entries) -> None:
    """Take COPIED from standard entries without a host cluster, as QEMU reads them: in place.

    Not with an external data file, where offset 0 is a place.
    """
    places = np.flatnonzero(entries != 0)  # few, mostly
    idle = places[(entries[places] & _U(OFFSET_MASK | COMPRESSED | COPIED)) == _U(COPIED)]
    entries[idle] &= _U(~COPIED & (1 << 64) - 1)


def bad_data_file_entries(entries: Entries, geometry: Geometry, l1_index: int) -> Entries:
    """As ``bad_l2_entries`` where guest data lie in an external file, at their guest offsets.

    The entry of guest offset 0 names offset 0: COPIED alone tells that it is there.
    """
    offsets = entries & _U(OFFSET_MASK)
    there = (offsets != 0) | ((entries & _U(COPIED)) != 0)
    expected = np.arange(len(entries), dtype=np.uint64) << _U(geometry.cluster_bits)
    bad = there & (offsets != expected + _U(l1_index * geometry.span))
    bad |= (entries & _U(COMPRESSED)) != 0
    flagged = bad_l2_entries(entries & ~_U(COPIED), geometry)
    return np.union1d(np.flatnonzero(bad), flagged).astype(np.uint64)


def repeated(values: Entries) -> Flags:
    """Which of the values are there more than once."""
    order = np.sort(values)
    twice = order[1:][order[1:] == order[:-1]]
    if not len(twice):
        return np.zeros(len(values), np.bool_)
    found: Flags = np.isin(values, twice)
    return found


def host_offset(entry: int) -> int:
    """The host offset of a standard L2 or L1 entry; 0 without one."""
    return entry & OFFSET_MASK


def shown(number: int) -> str:
    """A number as QEMU shows it: hexadecimal, but a plain 0."""
    return f"{number:#x}" if number else "0"


class DamageError(OSError):
    """Metadata was found that a sound image cannot have (EIO); who meets it marks the image."""

    def __init__(self, message: str, *, offset: int | None = None, size: int | None = None) -> None:
        super().__init__(EIO, message)
        self.message = message
        self.offset = offset  # host offset in bytes
        self.size = size  # bytes


class UnsettledError(DamageError):
    """The disk has one of two states, both sound, and nobody knows which.

    Nothing is written until the image is opened again; it is not marked, for it needs no repair.
    """
