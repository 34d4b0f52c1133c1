"""The driver ``qcow``: images of the format before qcow2, read-only.

Specification: what QEMU's documentation says of qcow, and what its images show: a header of 48
bytes, an L1 table, L2 tables, all big endian. An L2 entry is 0 (not here), the offset of a cluster,
or with bit 63 that of raw deflate data, whose length stands in the bits below.

Runs on: the event loop; workers inflate. Invariants: nothing is written; every offset is looked at
before it is used; no more than ``MAX_TABLES`` L2 tables are kept.
Errors: ``BlockError`` from ``open``, ``OSError`` EIO for damage.
"""

from __future__ import annotations

import asyncio
import struct
from collections import OrderedDict
from errno import EFBIG, EIO, ENOTSUP
from typing import ClassVar, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.compression import inflate
from liveblockd.formats.qcow2.layout import Compression
from liveblockd.formats.read_only import ReadOnlyFormat
from liveblockd.storage.driver import BlockIO, Buffer, Extent, ExtentKind
from liveblockd.storage.flatmap import read_padded
from liveblockd.storage.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from liveblockd.storage.registry import Environment, register_driver

MAX_TABLES: Final = 64
_MAX_L1_BYTES: Final = 32 << 20
_MAX_NAME: Final = 1023
_HEADER: Final = struct.Struct(">4sIQIIQBBHIQ")
_COMPRESSED: Final = 1 << 63
_SECTOR: Final = 512


class QcowOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    file: BlockdevRef
    backing: BlockdevRefOrNull = None


class QcowHeader(NamedTuple):
    """What the header says; bytes, and log2 of the bytes or entries of a cluster and a table."""

    size: int
    cluster_bits: int
    l2_bits: int
    l1_offset: int
    l1_entries: int
    backing_offset: int
    backing_length: int


def parse_header(data: bytes) -> QcowHeader:
    """The header; raises BlockError."""
    if len(data) < _HEADER.size or data[:4] != b"QFI\xfb":
        raise BlockError("Image not in qcow format")
    (_, version, backing_offset, backing_length, _, size, cluster_bits, l2_bits, _, crypt,
     l1_offset) = _HEADER.unpack_from(data)  # fmt: skip
    if version != 1:
        hint = "\nTry the 'qcow2' driver instead." if version in (2, 3) else ""
        raise BlockError(f"qcow (v1) does not support qcow version {version}{hint}", errno=ENOTSUP)
    if size <= 1:
        raise BlockError("Image size is too small (must be at least 2 bytes)")
    if not 9 <= cluster_bits <= 16:
        raise BlockError("Cluster size must be between 512 and 64k")
    if not 6 <= l2_bits <= 13:
        raise BlockError("L2 table size must be between 512 and 64k")
    if crypt == 1:
        raise BlockError(
            "Use of AES-CBC encrypted qcow images is no longer supported in system emulators",
            errno=ENOTSUP,
        )
    if crypt:
        raise BlockError("invalid encryption method in qcow header")
    l1_entries = -(-size // (1 << (cluster_bits + l2_bits)))
    if l1_entries * 8 > _MAX_L1_BYTES or size > 1 << 62:
        raise BlockError("Image too large", errno=EFBIG)
    if backing_offset and backing_length > _MAX_NAME:
        raise BlockError("Backing file name too long")
    return QcowHeader(
        size, cluster_bits, l2_bits, l1_offset, l1_entries, backing_offset,
        backing_length if backing_offset else 0,
    )  # fmt: skip


@register_driver
class Qcow(ReadOnlyFormat):
    """An image of version 1."""

    driver_name = "qcow"
    child_roles = ("file", "backing")
    Options: ClassVar[type[BlockdevOptions]] = QcowOptions

    def __init__(
        self,
        children: dict[str, BlockIO],
        environment: Environment,
        header: QcowHeader,
        l1: npt.NDArray[np.uint64],
        backing_file: str | None,
    ) -> None:
        self.children = children
        self.cluster_size = 1 << header.cluster_bits
        self._workers = environment.workers
        self._header = header
        self._l1 = l1
        self._backing_file = backing_file
        self._tables: OrderedDict[int, npt.NDArray[np.uint64]] = OrderedDict()

    @classmethod
    async def open(
        cls, options: QcowOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Open the image; raises BlockError."""
        cls.check_read_only(options)
        file = children["file"]
        try:
            header = parse_header(bytes(await file.read(0, min(file.length, _HEADER.size))))
            table = await _read_table(file, header.l1_offset, header.l1_entries)
            name = None
            if header.backing_length:
                if header.backing_offset + header.backing_length > file.length:
                    raise OSError(EIO, "the backing file name lies outside the image")
                raw = await file.read(header.backing_offset, header.backing_length)
                name = bytes(raw).decode("utf-8", "surrogateescape")
        except OSError as error:
            raise BlockError.from_os_error("Could not open qcow image", error) from error
        return cls(children, environment, header, table, name)

    @property
    def length(self) -> int:
        """Bytes of the disk, whole sectors."""
        return self._header.size // _SECTOR * _SECTOR

    @property
    def backing_file(self) -> str | None:
        """As the header has it."""
        return self._backing_file

    async def map(self, offset: int, length: int) -> list[Extent]:
        """What the entries of one L2 table say; raises OSError."""
        header = self._header
        bits = header.cluster_bits
        index = offset >> (bits + header.l2_bits)
        end = min(offset + length, (index + 1) << (bits + header.l2_bits))
        table = await self._table(index)
        if table is None:
            return [Extent(end - offset, ExtentKind.UNALLOCATED)]
        found: list[Extent] = []
        while offset < end:
            stop = min(end, ((offset >> bits) + 1) << bits)
            entry = int(table[offset >> bits & ((1 << header.l2_bits) - 1)])
            extent = self._extent(entry, offset & ((1 << bits) - 1), stop - offset)
            last = found[-1] if found else None
            if last is not None and _follows(last, extent):
                found[-1] = Extent(last.length + extent.length, last.kind, last.host_offset)
            else:
                found.append(extent)
            offset = stop
        return found

    def _extent(self, entry: int, inside: int, length: int) -> Extent:
        if not entry:
            return Extent(length, ExtentKind.UNALLOCATED)
        if entry & _COMPRESSED:
            return Extent(length, ExtentKind.COMPRESSED)
        end = self.children["file"].length
        if entry % _SECTOR or entry >= end:
            raise OSError(EIO, f"an L2 entry of the qcow image cannot be: {entry:#x}")
        if entry + inside + length > end:  # the file ends within the cluster
            return Extent(length, ExtentKind.COMPRESSED)
        return Extent(length, ExtentKind.DATA, entry + inside)

    async def _table(self, index: int) -> npt.NDArray[np.uint64] | None:
        place = int(self._l1[index])
        if not place:
            return None
        table = self._tables.get(index)
        if table is None:
            table = await _read_table(self.children["file"], place, 1 << self._header.l2_bits)
            self._tables[index] = table
            if len(self._tables) > MAX_TABLES:
                self._tables.popitem(last=False)
        return table

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes, of the backing file too; raises OSError."""
        parts: list[Buffer] = []
        end = offset + length
        file, backing = self.children["file"], self.children.get("backing")
        while offset < end:
            for extent in await self.map(offset, end - offset):
                if extent.kind is ExtentKind.DATA:
                    parts.append(await file.read(extent.host_offset, extent.length))
                elif extent.kind is ExtentKind.COMPRESSED:
                    parts.append(await self._read_clusters(offset, extent.length))
                elif backing is None:
                    parts.append(bytes(extent.length))
                else:
                    parts.append(await read_padded(backing, offset, extent.length))
                offset += extent.length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_clusters(self, offset: int, length: int) -> bytes:
        """Compressed clusters and such that the file ends in, of one L2 table."""
        bits = self._header.cluster_bits
        first, last = offset >> bits, (offset + length - 1) >> bits
        clusters = await asyncio.gather(*(self._cluster(n) for n in range(first, last + 1)))
        start = offset - (first << bits)
        return b"".join(bytes(c) for c in clusters)[start : start + length]

    async def _cluster(self, number: int) -> Buffer:
        header, file = self._header, self.children["file"]
        size = 1 << header.cluster_bits
        table = await self._table(number >> header.l2_bits)
        entry = 0 if table is None else int(table[number & ((1 << header.l2_bits) - 1)])
        if not entry & _COMPRESSED:
            return await read_padded(file, entry, size)
        shift = 63 - header.cluster_bits
        place, packed = entry & ((1 << shift) - 1), entry >> shift & (size - 1)
        if place + packed > file.length:
            raise OSError(EIO, "a compressed cluster lies outside the qcow image")
        data = await file.read(place, packed)
        return await self._workers.run(inflate, data, size, Compression.ZLIB)


def _follows(last: Extent, extent: Extent) -> bool:
    if last.kind is not extent.kind:
        return False
    return last.kind is not ExtentKind.DATA or (
        last.host_offset + last.length == extent.host_offset
    )


async def _read_table(file: BlockIO, offset: int, entries: int) -> npt.NDArray[np.uint64]:
    if not offset or offset + entries * 8 > -(-file.length // _SECTOR) * _SECTOR:
        raise OSError(EIO, "a table lies outside the image")
    data = await read_padded(file, offset, entries * 8)
    return np.frombuffer(data, ">u8").astype(np.uint64)
