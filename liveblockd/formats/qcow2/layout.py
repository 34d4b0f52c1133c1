"""Constants and derived sizes of a qcow2 image.

Specification: docs/interop/qcow2, "Header", "Host cluster management", "Cluster mapping".

Runs on: pure. Invariants: every bound that an image of a stranger is held to is a constant here;
a ``Geometry`` is valid by construction (``header.parse`` refuses what would not be).
Errors: none.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

MAGIC: Final = b"QFI\xfb"

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_REFCOUNT_ORDER: Final = 6

HEADER_LENGTH_V2: Final = 72
MIN_HEADER_LENGTH_V3: Final = 104
#: with compression_type and its padding: what is written for new images
HEADER_LENGTH_V3: Final = 112

#: Bytes. The limits that QEMU has as well: an image beyond them opens nowhere.
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_SNAPSHOTS: Final = 65536
MAX_SNAPSHOT_TABLE_BYTES: Final = 64 << 20
MAX_SNAPSHOT_EXTRA_BYTES: Final = 1024
MAX_BACKING_NAME: Final = 1023
MAX_BACKING_FORMAT: Final = 15

#: the largest disk that a request can address, in bytes (INT64_MAX rounded down to 1 GiB)
MAX_DISK_SIZE: Final = 9223372035781033984

#: unit of what a disk writes whole or not at all, in bytes
SECTOR: Final = 512

ENTRY_BYTES: Final = 8

# -- bits of L1, L2 and refcount table entries

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1 << 0
#: bits 9-55: a host offset in an L1 entry or a standard L2 entry
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
#: of a standard entry; ZERO is reserved too in version 2
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
REFCOUNT_TABLE_RESERVED: Final = 0x1FF
#: Set in memory only, never on disk: subclusters differ, look at the bitmap (``subclusters``)
MIXED: Final = 1 << 1
#: first host offset that no entry can name (bit 56)
MAX_HOST_OFFSET: Final = 1 << 56


class Incompatible(enum.IntFlag):
    """Bits of incompatible_features: who does not know one must not open the image."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION_TYPE = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(enum.IntFlag):
    """Bits of compatible_features: may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(enum.IntFlag):
    """Bits of autoclear_features: a writer clears those it does not keep true."""

    BITMAPS = 1 << 0
    RAW_DATA_FILE = 1 << 1


class Extension(enum.IntEnum):
    """Types of header extensions."""

    END = 0x00000000
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


class Crypt(enum.IntEnum):
    """Values of crypt_method."""

    NONE = 0
    AES = 1
    LUKS = 2


class Compression(enum.IntEnum):
    """Values of compression_type."""

    ZLIB = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes that follow from the header; offsets and sizes are bytes unless named otherwise."""

    version: int
    cluster_bits: int
    refcount_order: int
    extended_l2: bool = False

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def subcluster_size(self) -> int:
        """Bytes that are allocated together: a cluster, or a part of one with extended entries."""
        return 1 << (self.cluster_bits - 5 * self.extended_l2)

    @property
    def table_entries(self) -> int:
        """Entries of 8 bytes in a cluster of an L1 or refcount table."""
        return 1 << (self.cluster_bits - 3)

    @property
    def l2_entry_bytes(self) -> int:
        """Bytes of an L2 entry."""
        return ENTRY_BYTES << self.extended_l2

    @property
    def l2_bits(self) -> int:
        """Log2 of the entries in an L2 table."""
        return self.cluster_bits - 3 - self.extended_l2

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table."""
        return 1 << self.l2_bits

    @property
    def span(self) -> int:
        """Guest bytes that one L2 table maps."""
        return 1 << (self.cluster_bits + self.l2_bits)

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order

    @property
    def refcount_max(self) -> int:
        """The largest refcount."""
        return (1 << self.refcount_bits) - 1

    @property
    def refcounts_per_block(self) -> int:
        """Host clusters that one refcount block describes."""
        return 1 << (self.cluster_bits + 3 - self.refcount_order)

    @property
    def max_refcount_blocks(self) -> int:
        """Entries that the refcount table may grow to."""
        return MAX_REFCOUNT_TABLE_BYTES // ENTRY_BYTES

    @property
    def has_zero_clusters(self) -> bool:
        """Version 3 knows clusters that read as zeros."""
        return self.version >= 3

    @property
    def compressed_offset_bits(self) -> int:
        """Bits of a compressed descriptor that are the host offset."""
        return 62 - (self.cluster_bits - 8)

    def clusters(self, length: int) -> int:
        """Clusters that hold ``length`` bytes."""
        return -(-length // self.cluster_size)

    def l1_size(self, disk_size: int) -> int:
        """L1 entries that a disk of ``disk_size`` bytes needs."""
        return -(-disk_size // self.span)
