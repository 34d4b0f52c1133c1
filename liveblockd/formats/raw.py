"""The driver ``raw``: the bytes of its ``file`` child, all of them or a window.

Specification: qapi/block-core.json, BlockdevOptionsRaw. Runs on: the event loop.
Invariants: no request reaches bytes outside the window. Without ``offset`` and ``size`` requests go
to the child as they are. Errors: those of the child; ``BlockError`` from ``open``, ``truncate``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import ENOSPC, ENOTSUP, EPERM
from typing import ClassVar, Self

from liveblockd.errors import BlockError
from liveblockd.qapi import Size
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Done, Extent, HostFile
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver


class RawOptions(BlockdevOptions):
    """Members of ``blockdev-add``; bytes."""

    file: BlockdevRef
    offset: Size | None = None
    size: Size | None = None


@register_driver
class Raw(BlockDriver):
    """A window on the child."""

    driver_name = "raw"
    is_format = True
    child_roles = ("file",)
    Options: ClassVar[type[BlockdevOptions]] = RawOptions

    def __init__(self, children: dict[str, BlockIO], offset: int, size: int | None) -> None:
        self.children = children
        self._offset = offset
        self._size = size

    @classmethod
    async def open(
        cls, options: RawOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Check the window against the child; raises BlockError."""
        del environment
        offset, size = options.offset or 0, options.size
        available = children["file"].length
        if offset > available:
            raise BlockError(
                f"Offset ({offset}) cannot be greater than size of the containing file "
                f"({available})"
            )
        if size is not None:
            if size > available - offset:
                raise BlockError(
                    f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to "
                    f"the actual size of the containing file ({available})"
                )
            if size % 512:
                raise BlockError("Specified size is not multiple of 512")
        self = cls(children, offset, size)
        self.read_only = bool(options.read_only)
        return self

    @property
    def length(self) -> int:
        """Bytes of the window."""
        if self._size is not None:
            return self._size
        return max(0, self.children["file"].length - self._offset)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The child's."""
        return self.children["file"].read_nowait(self._offset + offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """The child's."""
        if self.read_only or (self._size is not None and offset + len(data) > self._size):
            return False
        return self.children["file"].write_nowait(self._offset + offset, data)

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """The child's."""
        start = self._offset
        places = [start + offset for offset in offsets] if start else offsets
        return self.children["file"].read_many_nowait(places, length)

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """The child's."""
        end = max(offsets) + len(parts[0])
        if self.read_only or (self._size is not None and end > self._size):
            return 0
        start = self._offset
        places = [start + offset for offset in offsets] if start else offsets
        return self.children["file"].write_many_nowait(places, parts)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """The child's."""
        if self.read_only or (self._size is not None and offset + len(data) > self._size):
            return False
        return self.children["file"].begin_write(self._offset + offset, data, done)

    async def read(self, offset: int, length: int) -> Buffer:
        """The child's."""
        return await self.children["file"].read(self._offset + offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """The child's; ENOSPC outside a window of fixed size."""
        self._check(offset, len(data))
        await self.children["file"].write(self._offset + offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """The child's."""
        self._check(offset, length)
        await self.children["file"].write_zeroes(
            self._offset + offset, length, may_unmap=may_unmap, fast_only=fast_only
        )

    async def discard(self, offset: int, length: int) -> None:
        """The child's."""
        self._check(offset, length)
        await self.children["file"].discard(self._offset + offset, length)

    def _check(self, offset: int, length: int) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
        if self._size is not None and offset + length > self._size:
            raise OSError(ENOSPC, os.strerror(ENOSPC))

    async def flush(self) -> None:
        """The child's."""
        if not self.read_only:
            await self.children["file"].flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """The child's; host offsets are those of the child."""
        return await self.children["file"].map(self._offset + offset, length)

    async def truncate(self, length: int) -> None:
        """The child's, unless the size of the window was given."""
        if self._size is not None:
            raise BlockError("Cannot resize fixed-size raw disks", errno=ENOTSUP)
        await self.children["file"].truncate(self._offset + length)

    def host_file(self) -> HostFile | None:
        """The child's, if both begin at the same byte."""
        return None if self._offset else self.children["file"].host_file()

    def actual_size(self) -> int | None:
        """Bytes of the file child in use."""
        file = self.children["file"]
        size = getattr(getattr(file, "driver", file), "actual_size", None)
        return None if size is None else size()

    def limits(self) -> dict[str, int]:
        """The child's."""
        file = self.children["file"]
        limits = getattr(getattr(file, "driver", file), "limits", None)
        return super().limits() if limits is None else limits()
