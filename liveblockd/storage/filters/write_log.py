"""The log of writes that dm-log-writes of Linux and ``blklogwrites`` of QEMU share.

Specification: Linux Documentation/admin-guide/device-mapper/log-writes: sector 0 of the log is the
superblock; each entry is a sector of its own and the sectors of its data. Numbers are
little-endian.

PURE. Errors: BlockError from ``Superblock.unpack`` and ``Entry.unpack``, in QEMU's words.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, Self

from liveblockd.errors import BlockError

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
_SUPERBLOCK: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
SUPERBLOCK_SIZE: Final = _SUPERBLOCK.size
ENTRY_SIZE: Final = _ENTRY.size


class EntryFlag(enum.IntFlag):
    """What kind of write it was."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8


NO_FLAGS: Final = EntryFlag(0)
_KNOWN: Final = EntryFlag.FLUSH | EntryFlag.FUA | EntryFlag.DISCARD | EntryFlag.MARK


def check_sector_size(size: int) -> None:
    """BlockError unless it is a power of two below 16 MiB."""
    if not ENTRY_SIZE <= size < 1 << 24 or size & (size - 1):
        raise BlockError(f"Invalid log sector size {size}")


@dataclass(frozen=True, slots=True)
class Superblock:
    """How many entries are complete."""

    entries: int
    sector_size: int

    def pack(self) -> bytes:
        """A whole sector."""
        found = _SUPERBLOCK.pack(MAGIC, VERSION, self.entries, self.sector_size)
        return found.ljust(self.sector_size, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From its first ``SUPERBLOCK_SIZE`` bytes."""
        magic, version, entries, sector_size = _SUPERBLOCK.unpack_from(data)
        if magic != MAGIC:
            raise BlockError("Invalid log superblock magic")
        if version != VERSION:
            raise BlockError(f"Unsupported log version {version}")
        check_sector_size(sector_size)
        return cls(entries, sector_size)


@dataclass(frozen=True, slots=True)
class Entry:
    """A write; counted in sectors."""

    sector: int
    sectors: int
    flags: EntryFlag = NO_FLAGS

    @property
    def log_sectors(self) -> int:
        """What it takes of the log."""
        return 1 if self.flags & EntryFlag.DISCARD else 1 + self.sectors

    def pack(self, sector_size: int) -> bytes:
        """A whole sector."""
        found = _ENTRY.pack(self.sector, self.sectors, int(self.flags), 0)
        return found.ljust(sector_size, b"\0")

    @classmethod
    def unpack(cls, data: bytes, number: int) -> Self:
        """From its first ``ENTRY_SIZE`` bytes; ``number`` is for the message."""
        sector, sectors, flags, _ = _ENTRY.unpack_from(data)
        if flags & ~int(_KNOWN):
            raise BlockError(f"Invalid flags 0x{flags:x} in log entry {number}")
        return cls(sector, sectors, EntryFlag(flags))
