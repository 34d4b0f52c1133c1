"""The driver ``preallocate``: a file that grows by small steps is given space in large ones.

Specification: qapi/block-core.json, BlockdevOptionsPreallocate.

It stands between a format and its file. A write beyond the end of the file lets the file system
allocate ``prealloc-size`` more, rounded up to ``prealloc-align``; the format sees the end of what
it has written. What is left over goes when the last user with the right to write and resize does.

Runs on: the event loop; a worker allocates. Invariants: zeros are only put beyond the end of the
file, while no write goes there, to the end even if who asked is gone; what is cut off at the end
was never written. No descriptor is given away by which a write would be missed.

Errors: those of the child; what cannot be preallocated is not. BlockError from ``open``.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Self

from liveblockd.errors import BlockError
from liveblockd.qapi import Size
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage import hostcalls
from liveblockd.storage.driver import BlockIO, Buffer, Done, HostFile, Permission
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

log = logging.getLogger(__name__)

ALIGNMENT = 1 << 20
SIZE = 128 << 20
SECTOR = 512
_NEEDED = Permission.WRITE | Permission.RESIZE


class PreallocateOptions(BlockdevOptions):
    """Members of ``blockdev-add``; bytes."""

    file: BlockdevRef
    prealloc_align: Size | None = None
    prealloc_size: Size | None = None


@register_driver
class Preallocate(FilterDriver):
    """A filter over a protocol node."""

    driver_name = "preallocate"
    Options = PreallocateOptions
    changeable = frozenset(("prealloc-align", "prealloc-size"))

    def __init__(
        self,
        children: dict[str, BlockIO],
        workers: WorkerPool,
        *,
        alignment: int = ALIGNMENT,
        size: int = SIZE,
        read_only: bool = False,
    ) -> None:
        super().__init__(children, read_only=read_only)
        self._workers = workers
        self._alignment = alignment
        self._size = size
        #: end of what was written; None while nobody above may write and resize
        self._data_end: int | None = None
        #: end of the file with what was allocated beyond
        self._file_end = 0
        self._growing = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        options: PreallocateOptions,  # type: ignore[override]
        children: dict[str, BlockIO],
        environment: Environment,
    ) -> Self:
        """BlockError for an alignment that is none."""
        alignment, size = _steps(options)
        return cls(
            children,
            environment.workers,
            alignment=alignment,
            size=size,
            read_only=bool(options.read_only),
        )

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Nobody else writes beyond the end of a file that is being grown."""
        del options, role
        return used, shared & ~_NEEDED if used & _NEEDED == _NEEDED else shared

    async def set_permissions(self, used: Permission, shared: Permission) -> None:
        """Begin, or end and cut off what was allocated for nothing."""
        del shared
        if used & _NEEDED == _NEEDED and not self.read_only:
            if self._data_end is None:
                self._data_end = self._file_end = self.child.length
        else:
            await self._cut_off()

    async def set_read_only(self, read_only: bool) -> None:
        """Read-only: cut off while the file below can be written yet."""
        if read_only:
            await self._cut_off()
        await super().set_read_only(read_only)

    async def _cut_off(self) -> None:
        end, self._data_end = self._data_end, None
        if end is None or self.child.length <= end:
            return
        try:
            await self.child.truncate(end)
        except (OSError, BlockError) as error:  # zeros stay at the end: nothing is lost
            log.warning("what was preallocated cannot be cut off: %s", error)

    @property
    def length(self) -> int:
        """The end of what was written."""
        return self.child.length if self._data_end is None else self._data_end

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As the child, inside of what was written."""
        return offset + len(data) <= self.length and self.child.write_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """As the child, inside of what was written."""
        return offset + len(data) <= self.length and self.child.begin_write(offset, data, done)

    async def write(self, offset: int, data: Buffer) -> None:
        """As the child, with space for more."""
        end = offset + len(data)
        await self._reserve(end)
        await self.child.write(offset, data)
        self._wrote(end)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """As the child, with space for more."""
        await self._reserve(offset + length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        self._wrote(offset + length)

    async def truncate(self, length: int) -> None:
        """As the child; what was allocated beyond goes."""
        async with self._growing:
            await self.child.truncate(length)
            if self._data_end is not None:
                self._data_end = self._file_end = length

    def host_file(self) -> HostFile | None:
        """The child's while nothing can be written."""
        return self.child.host_file() if self.read_only else None

    def change_options(self, options: BlockdevOptions, environment: Environment) -> None:
        """Other steps from now on."""
        del environment
        assert isinstance(options, PreallocateOptions)
        self._alignment, self._size = _steps(options)

    async def close(self) -> None:
        """Cut off what was allocated for nothing, and flush."""
        await self._cut_off()
        await super().close()

    def _wrote(self, end: int) -> None:
        if self._data_end is not None:
            self._data_end = max(self._data_end, end)
            self._file_end = max(self._file_end, end)

    async def _reserve(self, end: int) -> None:
        if self._data_end is not None and end > self._file_end:
            await asyncio.shield(asyncio.ensure_future(self._grow(end)))

    async def _grow(self, end: int) -> None:
        async with self._growing:
            if self._data_end is None or end <= self._file_end:
                return
            start = max(self._file_end, self.child.length)
            wanted = end + self._size
            wanted += -wanted % self._alignment
            try:
                await self._allocate(start, wanted - start)
            except OSError:
                return  # no space, or no such call: the write itself will tell
            self._file_end = wanted

    async def _allocate(self, offset: int, length: int) -> None:
        file = self.child.host_file()
        if file is None:
            await self.child.write_zeroes(offset, length, fast_only=True)
        else:
            await self._workers.run(hostcalls.fallocate, file.fd, 0, offset, length)


def _steps(options: PreallocateOptions) -> tuple[int, int]:
    """Alignment and size; BlockError for an alignment that is none."""
    alignment = ALIGNMENT if options.prealloc_align is None else options.prealloc_align
    if not alignment or alignment % SECTOR:
        raise BlockError(
            f"prealloc-align parameter of preallocate filter is not aligned to {SECTOR}"
        )
    return alignment, SIZE if options.prealloc_size is None else options.prealloc_size
