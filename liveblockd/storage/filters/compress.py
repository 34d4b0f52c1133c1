"""The driver ``compress``: all that is written is compressed where the format below can.

Specification: qapi/block-core.json, BlockdevOptionsGenericFormat (``compress``).

Formats compress whole clusters: a write of parts is a read, a change and a write of the clusters it
touches. A cluster that has bytes of its own in the file is written plainly: QEMU answers EIO there.

Runs on: the event loop. Invariant: between the read and the write of clusters nothing else is done
to them through this node (``storage.serialise``).

Errors: those of the child; BlockError from ``open`` where the driver below cannot compress.
"""

from __future__ import annotations

import os
from errno import ENOTSUP, EPERM
from typing import Self

from liveblockd.errors import BlockError
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Done
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver
from liveblockd.storage.serialise import Serialiser


@register_driver
class Compress(FilterDriver):
    """A filter over a format that compresses."""

    driver_name = "compress"

    def __init__(self, children: dict[str, BlockIO], *, read_only: bool) -> None:
        super().__init__(children, read_only=read_only)
        self._serialiser = Serialiser()

    @classmethod
    async def open(
        cls, options: BlockdevOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """BlockError where nothing can be compressed."""
        self = await super().open(options, children, environment)
        below = self.driver_below
        if below is None or type(below).write_compressed is BlockDriver.write_compressed:
            name = "none" if below is None else below.driver_name
            raise BlockError(
                f"Compression is not supported for underlying format: {name}", errno=ENOTSUP
            )
        return self

    @property
    def _cluster_size(self) -> int:
        below = self.driver_below
        while isinstance(below, FilterDriver):
            below = below.driver_below
        return 1 if below is None else below.cluster_size or 1

    def limits(self) -> dict[str, int]:
        """The child's, in whole clusters."""
        return super().limits() | {"request-alignment": self._cluster_size}

    def write_nowait(self, offset: int, data: Buffer) -> bool:  # noqa: ARG002
        """Compressing takes time."""
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:  # noqa: ARG002
        """Compressing needs a coroutine."""
        return False

    async def write(self, offset: int, data: Buffer) -> None:
        """Whole clusters, compressed."""
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
        size, length = self._cluster_size, len(data)
        start = offset - offset % size
        end = min(-(-(offset + length) // size) * size, max(self.length, offset + length))
        whole = start == offset and end == offset + length
        section = await self._serialiser.enter(start, end, exclusive=not whole)
        try:
            if not whole:
                clusters = bytearray(await self.child.read(start, end - start))
                clusters[offset - start : offset - start + length] = memoryview(data).cast("B")
                data = clusters
            await self._store(start, data)
        finally:
            self._serialiser.leave(section)

    async def _store(self, offset: int, data: Buffer) -> None:
        try:
            await super().write_compressed(offset, data)
        except OSError as error:
            if error.errno != ENOTSUP:  # an encrypted image or one with a data file
                raise
            await self.child.write(offset, data)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """As ``write``."""
        await self.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """As the child, but not while clusters of the range are rewritten."""
        section = await self._serialiser.enter(offset, offset + length, exclusive=False)
        try:
            await super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        finally:
            self._serialiser.leave(section)

    async def discard(self, offset: int, length: int) -> None:
        """As the child, but not while clusters of the range are rewritten."""
        section = await self._serialiser.enter(offset, offset + length, exclusive=False)
        try:
            await self.child.discard(offset, length)
        finally:
            self._serialiser.leave(section)

    def host_file(self) -> None:
        """None: what is written through it would not be compressed."""
        return
