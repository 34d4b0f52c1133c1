"""Disks in VMDK, VHDX, VDI and VHD files, read by the library dissect.hypervisor.

Specification: those of their makers, as the library reads them. The library is AGPL: it is an extra
(``pip install 'liveblockd[formats]'``) and is imported when the first such image is opened.

Runs on: a worker. The library believes what images say and expects small requests, so:

* headers are looked at here first: no table that it reads takes more than a few tens of MiB, and
  what it would misread (differencing VHD, VHDX and VDI, a VHDX log that is not played back) is
  refused; it opens no file by its name;
* a request never crosses the border of a block (its readers of VDI and VHDX go wrong there);
* compressed grains give at most a grain;
* fewer bytes than were asked for are an error, never zeros.

Invariants: nothing is ever written. One request at a time (``Disk`` has a lock).
Errors: ``BlockError`` from ``open_disk``, ``OSError`` from ``Disk.read``; no other exception.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from errno import EIO, ENOTSUP
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats import vmdk_descriptor
from liveblockd.formats.vmdk_descriptor import DescribedExtent, Descriptor

SECTOR: Final = 512
#: bytes of one table, or of one read of the library
MAX_TABLE: Final = 64 << 20
MAX_DISK: Final = 64 << 40
_MIB: Final = 1 << 20


class HostBytes:
    """A binary file for the library: its own position on a descriptor that others use too."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file; before the start is an error."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if not 0 <= base + offset < 1 << 63:
            raise OSError(EIO, "the image refers to a place outside the file")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def read(self, length: int = -1) -> bytes:
        """Up to ``length`` bytes; fewer at the end of the file only."""
        left = max(0, self.size - self._position)
        length = left if length < 0 else min(length, left)
        if length > MAX_TABLE:
            raise OSError(EIO, "a table of the image is too large")
        data = self.at(self._position, length)
        self._position += len(data)
        return data

    def at(self, offset: int, length: int) -> bytes:
        """Bytes at a place of their own."""
        parts = []
        while length > 0 and (part := os.pread(self._fd, length, offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """The descriptor belongs to somebody else."""


class Disk:
    """What is in an image; ``read_sectors(first, count)`` is asked for parts of one block."""

    #: of VMDK: the name of the parent, the numbers of this content and the parent's
    parent: str | None = None
    content_id = parent_content_id = vmdk_descriptor.NO_PARENT

    def __init__(
        self, size: int, block: int, sector: int, read_sectors: Callable[[int, int], bytes]
    ) -> None:
        if not 0 <= size <= MAX_DISK or size % SECTOR:
            raise BlockError(f"the size of the disk cannot be: {size}")
        if block < sector or block & (block - 1) or sector not in (512, 4096):
            raise BlockError(f"blocks of {block} bytes and sectors of {sector} cannot be")
        self.size = size  # bytes
        self._block = block
        self._sector = sector
        self._read_sectors = read_sectors
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes within the disk; raises OSError."""
        parts = []
        with self._lock:
            while length:
                part = min(length, self._block - offset % self._block)
                parts.append(self._read_part(offset, part))
                offset += part
                length -= part
        return b"".join(parts)

    def runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(bytes, whether this image has them and not its parent); of a part. Raises OSError."""
        del offset
        return [(length, True)]

    def _read_part(self, offset: int, length: int) -> bytes:
        first = offset // self._sector
        end = -(-(offset + length) // self._sector)
        try:
            data = self._read_sectors(first, end - first)
        except OSError:
            raise
        except Exception as error:  # whatever a library makes of a damaged image
            raise OSError(EIO, f"the image is damaged: {error}") from error
        skip = offset - first * self._sector
        if len(data) < skip + length:
            raise OSError(EIO, "the image is cut off")
        return bytes(data[skip : skip + length])


class JoinedDisk(Disk):
    """Disks one behind the other."""

    def __init__(self, parts: Sequence[Disk]) -> None:
        super().__init__(sum(part.size for part in parts), SECTOR, SECTOR, lambda *_: b"")
        self._parts = parts

    def _split(self, offset: int, length: int) -> list[tuple[Disk, int, int]]:
        found = []
        for part in self._parts:
            if offset < part.size and length:
                here = min(length, part.size - offset)
                found.append((part, offset, here))
                length -= here
                offset = part.size
            offset -= part.size
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes within the disk; raises OSError."""
        return b"".join(part.read(at, here) for part, at, here in self._split(offset, length))

    def runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See ``Disk``."""
        found: list[tuple[int, bool]] = []
        for part, at, here in self._split(offset, length):
            found += (runs := part.runs(at, here))
            if sum(run[0] for run in runs) < here:
                break
        return found


class GrainDisk(Disk):
    """A sparse VMDK file; ``disk`` is the library's."""

    def __init__(self, disk: Any, size: int, grain: int) -> None:
        super().__init__(size, grain, SECTOR, disk.read_sectors)
        self._disk = disk

    def runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See ``Disk``; of at most the first 1024 grains."""
        length = min(length, 1024 * self._block - offset % self._block)
        first, end = offset // SECTOR, -(-(offset + length) // SECTOR)
        with self._lock:
            try:
                found = self._disk.get_runs(first, end - first)
            except Exception as error:  # whatever a library makes of a damaged image
                raise OSError(EIO, f"the image is damaged: {error}") from error
        runs: list[tuple[int, bool]] = []
        position = first * SECTOR
        for kind, _, sectors, _ in found:
            start, position = position, position + sectors * SECTOR
            inside = min(position, offset + length) - max(start, offset)
            held = kind != 0
            if runs and runs[-1][1] is held:
                inside += runs.pop()[0]
            runs.append((inside, held))
        return runs


def open_disk(driver: str, fds: Mapping[str, int]) -> Disk:
    """The disk in the image at ``fds["file"]``; they stay open as long as the disk is used."""
    files = {role: HostBytes(fd) for role, fd in fds.items()}
    try:
        if driver == "vmdk":
            return _open_vmdk(files)
        return _OPENERS[driver](files["file"])
    except ImportError as error:
        raise BlockError(
            f"Driver '{driver}' needs the Python module 'dissect.hypervisor' "
            "(pip install 'liveblockd[formats]')",
            errno=ENOTSUP,
        ) from error
    except BlockError as error:
        message = f"Could not open {driver} image: {error.message}"
        raise BlockError(message, errno=error.errno) from error
    except Exception as error:  # whatever a library makes of a hostile image
        reason = str(error) or type(error).__name__
        raise BlockError(f"Could not open {driver} image: {reason}") from error


def _open_vmdk(files: Mapping[str, HostBytes]) -> Disk:
    file = files["file"]
    head = file.at(0, vmdk_descriptor.MAX_BYTES)
    if head[:4] in vmdk_descriptor.MAGICS:
        disk: Disk
        disk, text = _open_sparse_vmdk(file)
        if text is None:
            return disk
        described = vmdk_descriptor.parse(text, embedded=True)
    else:
        described = vmdk_descriptor.parse(head)
        extents = enumerate(described.extents)
        disk = JoinedDisk([_vmdk_extent(e, files.get(f"extents.{n}")) for n, e in extents])
    _relate(disk, described)
    return disk


def _relate(disk: Disk, described: Descriptor) -> None:
    disk.parent = described.parent
    disk.content_id = described.content_id
    disk.parent_content_id = described.parent_content_id


def _vmdk_extent(extent: DescribedExtent, file: HostBytes | None) -> Disk:
    size = extent.sectors * SECTOR
    if file is None:
        return Disk(size, _MIB, SECTOR, lambda _, count: bytes(count * SECTOR))
    start = extent.first_sector * SECTOR
    if extent.flat:
        if start + size > file.size:
            raise BlockError(f"the extent '{extent.filename}' is cut off")
        return Disk(
            size, _MIB, SECTOR, lambda first, n: file.at(start + first * SECTOR, n * SECTOR)
        )
    found, _ = _open_sparse_vmdk(file)
    if found.size < size:
        raise BlockError(f"the extent '{extent.filename}' is smaller than the descriptor says")
    found.size = size
    return found


def _open_sparse_vmdk(file: HostBytes) -> tuple[GrainDisk, bytes | None]:
    """The disk in one file, and the descriptor in it if there is one."""
    from dissect.hypervisor.disk.vmdk import SparseDisk

    grain, directory = _check_vmdk_header(file.at(0, SECTOR))
    if directory == (1 << 64) - 1:  # a stream: the header at the end counts
        grain, _ = _check_vmdk_header(file.at(max(0, file.size - 1024), SECTOR))
    disk = SparseDisk(file)
    disk._read_compressed_grain = _bounded_grains(file, grain, bool(disk.header.flags & 1 << 17))
    text = disk.descriptor.raw.encode() if disk.descriptor is not None else None
    return GrainDisk(disk, disk.size, grain), text


def _check_vmdk_header(head: bytes) -> tuple[int, int]:
    """(bytes of a grain, sector of the grain directory); raises BlockError."""
    magic, _, _, capacity, grain, _, descriptor, entries, _, directory = struct.unpack_from(
        "<4sIIQQQQIQQ", head
    )
    if magic == b"COWD":
        raise BlockError("disks of old versions of ESX (COWD) are not supported", errno=ENOTSUP)
    if magic != b"KDMV" or not 0 < grain <= 2 * _MIB // SECTOR or not 0 < entries <= 512:
        raise BlockError("the header is damaged")
    if capacity * SECTOR > MAX_DISK or capacity // (entries * grain) * 4 > MAX_TABLE // 16:
        raise BlockError("the grain directory is too large")
    if descriptor * SECTOR > _MIB:
        raise BlockError("the descriptor is too large")
    return grain * SECTOR, directory


def _bounded_grains(file: HostBytes, grain: int, markers: bool) -> Callable[[int], bytes]:
    """The reader of compressed grains: at most a grain comes out, whatever the data claims."""

    def read(sector: int) -> bytes:
        start = sector * SECTOR
        skip = 12 if markers else 4
        (length,) = struct.unpack_from("<I", file.at(start + skip - 4, 4))
        if length > 2 * grain + SECTOR:
            raise OSError(EIO, "a compressed grain is too long")
        return zlib.decompressobj().decompress(file.at(start + skip, length), grain)

    return read


def _open_vhdx(file: HostBytes) -> Disk:
    from dissect.hypervisor.disk.vhdx import VHDX

    headers = [file.at(offset, 4096) for offset in (64 << 10, 128 << 10)]
    newest = max(headers, key=lambda h: int.from_bytes(h[8:16], "little"))
    if newest[:4] != b"head":
        raise BlockError("the header is damaged")
    if any(newest[48:64]):
        raise BlockError(
            "its log was not played back: it was not closed cleanly (qemu-img check -r all)",
            errno=ENOTSUP,
        )
    for offset in (192 << 10, 256 << 10):
        if int.from_bytes(file.at(offset + 8, 4), "little") > 2047:
            raise BlockError("the region table is damaged")
    try:
        disk = VHDX(file)
    except AttributeError as error:  # it asks for the path, to look for the parent
        raise BlockError("it has a parent, which is not supported", errno=ENOTSUP) from error
    if disk.has_parent:
        raise BlockError("it has a parent, which is not supported", errno=ENOTSUP)
    return Disk(disk.size, disk.block_size, disk.sector_size, disk.read_sectors)


def _open_vdi(file: HostBytes) -> Disk:
    from dissect.hypervisor.disk.vdi import VDI

    image = VDI(file)
    if int(image.type) not in (1, 2):
        raise BlockError("it is no disk of its own (normal or fixed)", errno=ENOTSUP)
    block, blocks = int(image.block_size), int(image.number_of_blocks)
    if blocks * 4 > MAX_TABLE or blocks * block < image.size or block > 256 * _MIB:
        raise BlockError("the block map does not fit the size of the disk")
    stream = image.open()
    if len(stream.map) < blocks:
        raise BlockError("the block map is cut off")

    def read_sectors(first: int, count: int) -> bytes:
        data: bytes = stream._read(first * SECTOR, count * SECTOR)
        return data

    return Disk(-(-image.size // SECTOR) * SECTOR, block, SECTOR, read_sectors)


#: creators that mean the size they state; others mean cylinders, heads and sectors
_VHD_SIZE_COUNTS = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")


def _open_vpc(file: HostBytes) -> Disk:
    from dissect.hypervisor.disk.vhd import VHD

    footer = file.at(max(0, file.size - SECTOR), SECTOR)
    if footer[:8] != b"conectix":
        raise BlockError("it has no footer")
    size, cylinders, heads, sectors, kind = struct.unpack_from(">QHBBI", footer, 48)
    if footer[28:32] not in _VHD_SIZE_COUNTS and (cylinders, heads, sectors) != (65535, 16, 255):
        size = cylinders * heads * sectors * SECTOR
    if kind not in (2, 3):
        raise BlockError("it is neither a fixed nor a dynamic disk", errno=ENOTSUP)
    block = 2 * _MIB
    if kind == 3:
        (place,) = struct.unpack_from(">Q", footer, 16)
        header = file.at(min(place, file.size), 1024)
        if header[:8] != b"cxsparse":
            raise BlockError("the header of the dynamic disk is damaged")
        entries, block = struct.unpack_from(">II", header, 28)
        if not SECTOR <= block <= 256 * _MIB or entries * block < size:
            raise BlockError("the block table does not fit the size of the disk")
    elif size > file.size - SECTOR:
        raise BlockError("the image is cut off")
    return Disk(size, block, SECTOR, VHD(file).disk.read_sectors)


_OPENERS: Final[dict[str, Callable[[HostBytes], Disk]]] = {
    "vhdx": _open_vhdx,
    "vdi": _open_vdi,
    "vpc": _open_vpc,
}
