"""The drivers ``null-co`` and ``null-aio``: a disk that forgets what is written to it.

Specification: qapi/block-core.json, BlockdevOptionsNull. They measure everything above them. Reads
give zeros also without ``read-zeroes``, which QEMU leaves undefined: no old memory for a guest.

Runs on: the event loop. No errors escape but ``BlockError`` from ``open``.
"""

from __future__ import annotations

import asyncio
import os
from errno import EPERM
from typing import Self

from liveblockd.errors import BlockError
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Extent, ExtentKind
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver

DEFAULT_SIZE = 1 << 30


class NullOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    size: int | None = None
    latency_ns: int | None = None
    read_zeroes: bool | None = None


@register_driver
class NullCo(BlockDriver):
    """Every request succeeds, after ``latency-ns`` if that is given."""

    driver_name = "null-co"
    Options = NullOptions

    def __init__(self, options: NullOptions) -> None:
        self.children: dict[str, BlockIO] = {}
        self.read_only = bool(options.read_only)
        self._length = DEFAULT_SIZE if options.size is None else options.size
        self._latency = (options.latency_ns or 0) / 1e9
        self._reads_zeroes = bool(options.read_zeroes)

    @classmethod
    async def open(
        cls,
        options: NullOptions,
        children: dict[str, BlockIO],
        environment: Environment,  # noqa: ARG003
    ) -> Self:
        """Nothing to open; BlockError for a size below zero."""
        assert not children
        if options.size is not None and options.size < 0:
            raise BlockError("Invalid parameter 'size'")
        if options.latency_ns is not None and options.latency_ns < 0:
            raise BlockError("latency-ns is invalid")
        return cls(options)

    @property
    def length(self) -> int:
        """The option ``size``."""
        return self._length

    def read_nowait(self, offset: int, length: int) -> Buffer | None:  # noqa: ARG002
        """Zeros."""
        return None if self._latency else bytes(length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:  # noqa: ARG002
        """Forgotten."""
        return not (self._latency or self.read_only)

    async def read(self, offset: int, length: int) -> Buffer:  # noqa: ARG002
        """Zeros."""
        await self._wait()
        return bytes(length)

    async def write(self, offset: int, data: Buffer) -> None:  # noqa: ARG002
        """Forgotten."""
        self._check_writable()
        await self._wait()

    async def write_zeroes(
        self,
        offset: int,  # noqa: ARG002
        length: int,  # noqa: ARG002
        *,
        may_unmap: bool = False,  # noqa: ARG002
        fast_only: bool = False,  # noqa: ARG002
    ) -> None:
        """Forgotten."""
        self._check_writable()
        await self._wait()

    async def discard(self, offset: int, length: int) -> None:  # noqa: ARG002
        """Forgotten."""
        self._check_writable()
        await self._wait()

    async def flush(self) -> None:
        """There is nothing to keep."""
        await self._wait()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Data, or zeros with ``read-zeroes``."""
        if self._reads_zeroes:
            return [Extent(length, ExtentKind.ZERO)]
        return [Extent(length, ExtentKind.DATA, offset)]

    def actual_size(self) -> int:
        """None of it is stored."""
        return 0

    async def _wait(self) -> None:
        if self._latency:
            await asyncio.sleep(self._latency)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))


@register_driver
class NullAio(NullCo):
    """The same; QEMU's differs in how it completes requests."""

    driver_name = "null-aio"
