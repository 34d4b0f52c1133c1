"""The host clusters of persistent dirty bitmaps, for a check.

Specification: docs/interop/qcow2, "Bitmaps extension", "Bitmap directory", "Bitmap table".

Runs on: the event loop. Invariants: memory is bounded by the limits below; without the autoclear
bit the bitmaps are nobody's, as the specification says. Errors: ``OSError`` (EINVAL for a
directory that cannot be).
"""

from __future__ import annotations

import struct
from errno import EINVAL
from typing import Final, Protocol

import numpy as np

from liveblockd.formats.qcow2.check import CheckResult
from liveblockd.formats.qcow2.header import Header
from liveblockd.formats.qcow2.layout import ENTRY_BYTES, OFFSET_MASK, Autoclear, Extension
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.formats.qcow2.tables import Entries, from_disk
from liveblockd.storage.driver import BlockIO

_EXTENSION: Final = struct.Struct(">IIQQ")  # bitmaps, reserved, directory size, directory offset
_ENTRY: Final = struct.Struct(">QIIBBHI")  # table offset, entries, flags, type, bits, name, extra
_MAX_BITMAPS: Final = 65535
_MAX_DIRECTORY: Final = 64 << 20  # bytes
_MAX_TABLE_ENTRIES: Final = 1 << 24
_RESERVED: Final = 0xFF00_0000_0000_01FE
_ALL_ONES: Final = 1

_U = np.uint64


class Counting(Protocol):
    """What counts references: ``References``, or ``LiveReferences``."""

    def add_range(self, offset: int, length: int) -> None:
        """One structure of ``length`` bytes."""

    def add(self, offsets: Entries, lengths: int) -> None:
        """Many of ``lengths`` bytes each."""


async def count_bitmaps(
    file: BlockIO, header: Header, references: Counting, result: CheckResult
) -> None:
    """Count directory, tables and data of all bitmaps."""
    data = header.extension(Extension.BITMAPS)
    if data is None or len(data) < _EXTENSION.size or not header.autoclear & Autoclear.BITMAPS:
        return
    count, _, length, offset = _EXTENSION.unpack_from(data)
    if not count:
        return
    references.add_range(offset, min(length, _MAX_DIRECTORY))
    tables = None
    if count <= _MAX_BITMAPS and length <= _MAX_DIRECTORY:
        directory = bytes(await read_bytes(file, offset, length))
        tables = _tables(directory, count)
    if tables is None:
        result.corrupt("the bitmap directory is corrupted")
        raise OSError(EINVAL, "Invalid argument")
    size = header.geometry.cluster_size
    for table_offset, entries in tables:
        references.add_range(table_offset, entries * ENTRY_BYTES)
        if entries > _MAX_TABLE_ENTRIES or table_offset % size:
            result.corrupt("a bitmap table is corrupted")
            raise OSError(EINVAL, "Invalid argument")
        table = from_disk(await read_bytes(file, table_offset, entries * ENTRY_BYTES))
        offsets = table & _U(OFFSET_MASK)
        bad = (table & _U(_RESERVED)) != 0
        named = offsets != 0
        bad |= named & ((table & _U(_ALL_ONES | (size - 1))) != 0)
        if bad.any():
            result.corrupt("bitmap table entries are corrupted", int(bad.sum()))
        references.add(offsets[named & ~bad], size)


def _tables(directory: bytes, count: int) -> list[tuple[int, int]] | None:
    """(offset in bytes, entries) of each bitmap's table; None for a directory that cannot be."""
    found = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory):
            return None
        offset, entries, _, _, _, name, extra = _ENTRY.unpack_from(directory, position)
        position += -(-(_ENTRY.size + name + extra) // 8) * 8
        if position > len(directory):
            return None
        found.append((offset, entries))
    return found
