"""The drivers ``vmdk``, ``vhdx``, ``vdi`` and ``vpc``: disks of other hypervisors, read-only.

Specification: qapi/block-core.json, BlockdevOptionsGenericFormat. They serve as backing files and
as sources of copies; who wants to write converts to qcow2.

Runs on: the event loop; everything that touches the image is a job of a worker
(``foreign_disks``). Invariants: the ``file`` child has a descriptor of the host, and it is only
read. Errors: ``BlockError`` from ``open``, also where the library is missing; ``OSError``.
"""

from __future__ import annotations

import os
from errno import ENOTSUP, EPERM
from typing import ClassVar, Self

from liveblockd.errors import BlockError
from liveblockd.formats.foreign_disks import Disk, open_disk
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Extent, ExtentKind
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver


class ForeignOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    file: BlockdevRef


class ForeignDriver(BlockDriver):
    """An image that a library reads."""

    is_format = True
    child_roles = ("file",)
    Options: ClassVar[type[BlockdevOptions]] = ForeignOptions

    def __init__(
        self, children: dict[str, BlockIO], environment: Environment, disk: Disk, fd: int
    ) -> None:
        self.children = children
        self.read_only = True
        self._disk = disk
        self._fd = fd
        self._jobs = environment.workers.group()

    @classmethod
    async def open(
        cls, options: ForeignOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Open the image; raises BlockError."""
        if not options.read_only:
            raise BlockError(
                f"Driver '{cls.driver_name}' can only be used for read-only devices", errno=ENOTSUP
            )
        host_file = children["file"].host_file()
        if host_file is None or host_file.direct:
            raise BlockError(
                f"Driver '{cls.driver_name}' needs a file of the host, opened without cache.direct",
                errno=ENOTSUP,
            )
        fd = os.dup(host_file.fd)
        job = environment.workers.submit(open_disk, cls.driver_name, fd)
        try:
            disk = await job
        except BaseException:
            if job.done():
                os.close(fd)
            else:  # cancelled: the worker still reads
                job.add_done_callback(lambda _: os.close(fd))
            raise
        return cls(children, environment, disk, fd)

    @property
    def length(self) -> int:
        """Bytes of the disk."""
        return self._disk.size

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes; raises OSError."""
        return await self._jobs.run(self._disk.read, offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """EPERM."""
        del offset, data
        raise OSError(EPERM, os.strerror(EPERM))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """EPERM."""
        del offset, length, may_unmap, fast_only
        raise OSError(EPERM, os.strerror(EPERM))

    async def discard(self, offset: int, length: int) -> None:
        """EPERM."""
        del offset, length
        raise OSError(EPERM, os.strerror(EPERM))

    async def flush(self) -> None:
        """There is nothing to flush."""

    async def map(self, offset: int, length: int) -> list[Extent]:
        """All of it is data that only ``read`` gives."""
        del offset
        return [Extent(length, ExtentKind.COMPRESSED)]

    async def set_read_only(self, read_only: bool) -> None:
        """Read-write is refused."""
        if not read_only:
            raise BlockError(
                f"Driver '{self.driver_name}' can only be used for read-only devices",
                errno=ENOTSUP,
            )

    async def close(self) -> None:
        """Once nothing reads any more."""
        await self._jobs.idle()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def actual_size(self) -> int | None:
        """Bytes of the file child in use."""
        file = self.children["file"]
        size = getattr(getattr(file, "driver", file), "actual_size", None)
        return None if size is None else size()


@register_driver
class Vmdk(ForeignDriver):
    """VMware: one sparse or stream-optimised file."""

    driver_name = "vmdk"


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
