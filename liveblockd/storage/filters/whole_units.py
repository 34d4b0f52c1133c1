"""A filter below which only whole units (clusters, sectors) are written.

A write of parts of units is a read, a change and a write of them.

Runs on: the event loop. Invariant: between the read and the write of units nothing else is done to
them through this node (``storage.serialise``). Errors: those of the child; EPERM when read-only.
"""

from __future__ import annotations

import abc
import os
from errno import EPERM

from liveblockd.storage.driver import BlockIO, Buffer, Done
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.serialise import Serialiser


class WholeUnits(FilterDriver):
    """``store``, ``zero`` and ``drop`` of a subclass are given ranges of whole units.

    Only the last unit of a disk may be short.
    """

    def __init__(self, children: dict[str, BlockIO], *, read_only: bool) -> None:
        super().__init__(children, read_only=read_only)
        self._serialiser = Serialiser()

    @property
    @abc.abstractmethod
    def unit(self) -> int:
        """Bytes."""

    @abc.abstractmethod
    async def store(self, offset: int, data: Buffer) -> None:
        """Write units."""

    @abc.abstractmethod
    async def zero(self, offset: int, length: int, may_unmap: bool, fast_only: bool) -> None:
        """Make units read as zeros."""

    @abc.abstractmethod
    async def drop(self, offset: int, length: int) -> None:
        """Discard units."""

    def limits(self) -> dict[str, int]:
        """The child's, in whole units."""
        return super().limits() | {"request-alignment": self.unit}

    def write_nowait(self, offset: int, data: Buffer) -> bool:  # noqa: ARG002
        """Needs a coroutine."""
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:  # noqa: ARG002
        """Needs a coroutine."""
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        """See the module."""
        self._check_writable()
        length = len(data)
        start, end = self._around(offset, length)
        whole = start == offset and end == offset + length
        section = await self._serialiser.enter(start, end, exclusive=not whole)
        try:
            if not whole:
                units = bytearray(await self.child.read(start, end - start))
                units[offset - start : offset - start + length] = memoryview(data).cast("B")
                data = units
            await self.store(start, data)
        finally:
            self._serialiser.leave(section)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """As ``write``."""
        await self.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """See the module."""
        self._check_writable()
        first, last = self._inside(offset, length)
        if first >= last:
            await self.write(offset, bytes(length))
            return
        if first > offset:
            await self.write(offset, bytes(first - offset))
        section = await self._serialiser.enter(first, last, exclusive=False)
        try:
            await self.zero(first, last - first, may_unmap, fast_only)
        finally:
            self._serialiser.leave(section)
        if offset + length > last:
            await self.write(last, bytes(offset + length - last))

    async def discard(self, offset: int, length: int) -> None:
        """The whole units that lie inside."""
        self._check_writable()
        first, last = self._inside(offset, length)
        if first >= last:
            return
        section = await self._serialiser.enter(first, last, exclusive=False)
        try:
            await self.drop(first, last - first)
        finally:
            self._serialiser.leave(section)

    def host_file(self) -> None:
        """None: what is written there would pass by."""
        return

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        unit, end = self.unit, offset + length
        return offset - offset % unit, min(end + -end % unit, max(self.length, end))

    def _inside(self, offset: int, length: int) -> tuple[int, int]:
        unit, end = self.unit, offset + length
        return offset + -offset % unit, end if end >= self.length else end - end % unit

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
