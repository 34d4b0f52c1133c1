"""Extended L2 entries: clusters of which each 32nd part is allocated, or zero, by itself.

Specification: docs/interop/qcow2, "Extended L2 Entries".

Runs on: pure. In memory an extended table is two arrays: ``entries``, which read as those of a
plain table, and ``bitmaps``. An entry whose subclusters all say the same looks as in a plain table
(ZERO set where all are zeros); where they differ it has ``MIXED``, and only then anybody
looks at the bitmap. So the paths of plain images serve uniform clusters, at the same cost.

Invariants: ``entries == summaries(words, bitmaps)``; the bitmap is true for uniform clusters too,
and 0 for compressed ones. ZERO and MIXED never reach the disk in an extended table.
Errors: none; ``bad_bitmaps`` finds what cannot be.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, MIXED, OFFSET_MASK, ZERO
from liveblockd.storage.driver import ExtentKind

Entries = npt.NDArray[np.uint64]

SUBCLUSTERS: Final = 32
ALL: Final = (1 << SUBCLUSTERS) - 1
#: bitmaps: bit n says that subcluster n is allocated, bit 32 + n that it reads as zeros
ALL_ALLOCATED: Final = ALL
ALL_ZERO: Final = ALL << SUBCLUSTERS

_U = np.uint64
_NUMBERS = np.arange(SUBCLUSTERS, dtype=np.uint64)


# -- between disk and memory


def summaries(words: Entries, bitmaps: Entries) -> Entries:
    """The entries for first and second words of extended entries (see the module)."""
    compressed = (words & _U(COMPRESSED)) != 0
    # Bit 0 means nothing here: readers of extended entries do not look at it.
    words = np.where(compressed, words, words & ~_U(ZERO | MIXED))
    zero = ~compressed & (bitmaps == _U(ALL_ZERO))
    uniform = compressed | zero | (bitmaps == _U(ALL_ALLOCATED)) | ((bitmaps == 0) & (words == 0))
    return words | np.where(zero, _U(ZERO), _U(0)) | np.where(uniform, _U(0), _U(MIXED))


def bitmaps_of(entries: Entries) -> Entries:
    """The bitmaps of uniform entries."""
    zero = (entries & _U(COMPRESSED | ZERO)) == ZERO
    data = ~zero & ((entries & _U(COMPRESSED)) == 0) & (entries != 0)
    return np.where(zero, _U(ALL_ZERO), np.where(data, _U(ALL_ALLOCATED), _U(0)))


def to_disk(entries: Entries, bitmaps: Entries) -> bytes:
    """The big endian bytes of entries and their bitmaps."""
    data = np.empty((len(entries), 2), ">u8")
    plain = (entries & _U(COMPRESSED)) == 0
    data[:, 0] = np.where(plain, entries & ~_U(ZERO | MIXED), entries)
    data[:, 1] = bitmaps
    return data.tobytes()


def from_disk(data: bytes | bytearray | memoryview) -> tuple[Entries, Entries]:
    """First words and bitmaps of a table, as they are there."""
    pairs = np.frombuffer(data, dtype=">u8").reshape(-1, 2)
    return pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)


def bad_bitmaps(words: Entries, bitmaps: Entries) -> Entries:
    """Indices of entries whose bitmap cannot be: zero and allocated, or allocated nowhere."""
    both = (bitmaps & (bitmaps >> _U(SUBCLUSTERS))) != 0
    nowhere = ((words & _U(OFFSET_MASK | COPIED)) == 0) & ((bitmaps & _U(ALL)) != 0)
    plain = (words & _U(COMPRESSED)) == 0
    return np.flatnonzero(plain & (both | nowhere)).astype(np.uint64)


# -- what a bitmap says


def mask(first: int, end: int) -> int:
    """Bits of the subclusters ``first`` up to, not including, ``end``."""
    return (1 << end) - (1 << first)


def missing(bitmap: int) -> int:
    """The subclusters that are neither allocated nor zero."""
    return ~(bitmap | bitmap >> SUBCLUSTERS) & ALL


def lowest_run(bits: int) -> tuple[int, int]:
    """First and end of the lowest run of ones; ``bits`` is not 0."""
    first = lowest(bits)
    return first, first + lowest(~(bits >> first))


def lowest(bits: int) -> int:
    """The number of the lowest bit that is set; ``bits`` is not 0."""
    return (bits & -bits).bit_length() - 1


def allocated_length(bitmap: int, inside: int, cluster_bits: int) -> int:
    """How many bytes from ``inside`` the cluster on are allocated, in one piece."""
    bits = cluster_bits - 5
    first = inside >> bits
    there = (bitmap & ALL) >> first
    return ((first + lowest(~there)) << bits) - inside if there & 1 else 0


def expand(
    entries: Entries, bitmaps: Entries, cluster_bits: int
) -> tuple[npt.NDArray[np.uint8], Entries]:
    """``ExtentKind`` and host offset of every subcluster; of compressed ones: of the cluster."""
    bits = bitmaps[:, None] >> _NUMBERS
    kinds = np.zeros(bits.shape, np.uint8)
    kinds[(bits & _U(1)) != 0] = ExtentKind.DATA
    kinds[(bits >> _U(SUBCLUSTERS) & _U(1)) != 0] = ExtentKind.ZERO
    kinds[(entries & _U(COMPRESSED)) != 0] = ExtentKind.COMPRESSED
    size = _U(1 << (cluster_bits - 5))
    hosts = (entries & _U(OFFSET_MASK))[:, None] + _NUMBERS * size
    return kinds.reshape(-1), hosts.reshape(-1)


def has_mixed(entries: Entries) -> bool:
    """Whether a bitmap is needed for any of the entries."""
    return bool(((entries & _U(COMPRESSED | MIXED)) == MIXED).any())


def have_all(entries: Entries, bitmaps: Entries) -> npt.NDArray[np.bool_]:
    """Whether nothing is missing of each cluster."""
    held: npt.NDArray[np.bool_] = ((bitmaps | bitmaps >> _U(SUBCLUSTERS)) & _U(ALL)) == _U(ALL)
    held |= (entries & _U(COMPRESSED)) != 0
    return held
