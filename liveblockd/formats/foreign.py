"""The drivers ``vhdx``, ``vdi`` and ``vpc``: disks of other hypervisors, read-only; ``vmdk`` too.

Specification: qapi/block-core.json, BlockdevOptionsGenericFormat, BlockdevOptionsGenericCOWFormat.
They serve as backing files and as sources of copies; who wants to write converts to qcow2.

A VMDK may be several files: those that its descriptor names are children of the node, locked like
any other, and lie beside it. It may have a parent, which is its backing node; as in QEMU nothing is
read through it if the parent was changed since (its content ID says so).

Runs on: the event loop; everything that touches the image is a job of a worker
(``foreign_disks``). Invariants: the children have descriptors of the host, and are only
read. Errors: ``BlockError`` from ``open``, also where the library is missing; ``OSError``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from errno import EINVAL, ENOTSUP
from typing import ClassVar, Self

from liveblockd.errors import BlockError
from liveblockd.formats import vmdk_descriptor
from liveblockd.formats.foreign_disks import Disk, open_disk
from liveblockd.formats.read_only import ReadOnlyFormat
from liveblockd.storage.driver import BlockIO, Buffer, Extent, ExtentKind
from liveblockd.storage.flatmap import read_padded
from liveblockd.storage.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from liveblockd.storage.registry import Environment, register_driver


class ForeignOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    file: BlockdevRef


class ForeignDriver(ReadOnlyFormat):
    """An image that a library reads."""

    Options: ClassVar[type[BlockdevOptions]] = ForeignOptions

    def __init__(
        self,
        children: dict[str, BlockIO],
        environment: Environment,
        disk: Disk,
        fds: Mapping[str, int],
    ) -> None:
        self.children = children
        self.read_only = True
        self._disk = disk
        self._fds = dict(fds)
        self._jobs = environment.workers.group()

    @classmethod
    async def open(
        cls, options: BlockdevOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Open the image; raises BlockError."""
        cls.check_read_only(options)
        fds: dict[str, int] = {}
        try:
            for role, child in children.items():
                if role == "backing":
                    continue
                host_file = child.host_file()
                if host_file is None or host_file.direct:
                    raise BlockError(
                        f"Driver '{cls.driver_name}' needs files of the host, opened without "
                        "cache.direct",
                        errno=ENOTSUP,
                    )
                fds[role] = os.dup(host_file.fd)
            job = environment.workers.submit(open_disk, cls.driver_name, fds)
        except BaseException:
            _close(fds)
            raise
        try:
            disk = await job
        except BaseException:
            if job.done():
                _close(fds)
            else:  # cancelled: the worker still reads
                job.add_done_callback(lambda _: _close(fds))
            raise
        return cls(children, environment, disk, fds)

    @property
    def length(self) -> int:
        """Bytes of the disk."""
        return self._disk.size

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes; raises OSError."""
        return await self._jobs.run(self._disk.read, offset, length)

    async def map(self, offset: int, length: int) -> list[Extent]:
        """All of it is data that only ``read`` gives."""
        del offset
        return [Extent(length, ExtentKind.COMPRESSED)]

    async def close(self) -> None:
        """Once nothing reads any more."""
        await self._jobs.idle()
        _close(self._fds)


def _close(fds: dict[str, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])


class VmdkOptions(ForeignOptions):
    """Members of ``blockdev-add``."""

    backing: BlockdevRefOrNull = None


@register_driver
class Vmdk(ForeignDriver):
    """VMware: one sparse or stream-optimised file, or a descriptor and the files it names."""

    driver_name = "vmdk"
    child_roles = ("file", "backing")
    Options = VmdkOptions

    @classmethod
    async def named_children(cls, children: Mapping[str, BlockIO]) -> dict[str, str]:
        """See ``BlockDriver``: the files that the descriptor names."""
        file = children["file"]
        head = bytes(await file.read(0, min(file.length, vmdk_descriptor.MAX_BYTES)))
        if head[:4] in vmdk_descriptor.MAGICS:
            return {}
        extents = vmdk_descriptor.parse(head).extents
        named = {f"extents.{n}": e.filename for n, e in enumerate(extents) if e.filename}
        return {role: name for role, name in named.items() if role not in children}

    @property
    def backing_file(self) -> str | None:
        """The parent that the descriptor names."""
        return self._disk.parent

    @property
    def backing_format(self) -> str | None:
        """That of the parent."""
        return None if self._disk.parent is None else "vmdk"

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes, of the parent too; raises OSError."""
        if self._disk.parent is None:
            return await super().read(offset, length)
        parts: list[Buffer] = []
        end = offset + length
        while offset < end:
            for extent in await self.map(offset, end - offset):
                held = extent.kind is not ExtentKind.UNALLOCATED
                read = super().read if held else self._read_parent
                parts.append(await read(offset, extent.length))
                offset += extent.length
        return b"".join(parts)

    async def _read_parent(self, offset: int, length: int) -> Buffer:
        backing = self.children.get("backing")
        if backing is None:
            return bytes(length)
        self._check_content_id(backing)
        return await read_padded(backing, offset, length)

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Data that only ``read`` gives, and what the parent has."""
        if self._disk.parent is None:
            return await super().map(offset, length)
        kinds = (ExtentKind.UNALLOCATED, ExtentKind.COMPRESSED)
        runs = await self._jobs.run(self._disk.runs, offset, length)
        return [Extent(length, kinds[held]) for length, held in runs]

    def _check_content_id(self, backing: BlockIO) -> None:
        """OSError(EINVAL), as in QEMU, where the parent was written to since."""
        driver = getattr(backing, "driver", backing)
        if isinstance(driver, Vmdk) and driver._disk.content_id != self._disk.parent_content_id:
            raise OSError(EINVAL, "the parent of the VMDK image is not what it was")


@register_driver
class Vhdx(ForeignDriver):
    """Hyper-V."""

    driver_name = "vhdx"


@register_driver
class Vdi(ForeignDriver):
    """VirtualBox."""

    driver_name = "vdi"


@register_driver
class Vpc(ForeignDriver):
    """Virtual PC and Hyper-V before VHDX: VHD."""

    driver_name = "vpc"
