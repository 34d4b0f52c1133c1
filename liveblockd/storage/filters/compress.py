"""The driver ``compress``: all that is written is compressed where the format below can.

Specification: qapi/block-core.json, BlockdevOptionsGenericFormat (``compress``).

Formats compress whole clusters: a write of parts is a read, a change and a write of the clusters it
touches (``whole_units``). A cluster that has bytes of its own in the file is written plainly: QEMU
answers EIO there.

Runs on: the event loop. Invariants: those of ``whole_units``.

Errors: those of the child; BlockError from ``open`` where the driver below cannot compress.
"""

from __future__ import annotations

from errno import ENOTSUP
from typing import Self

from liveblockd.errors import BlockError
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.filters.whole_units import WholeUnits
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver


@register_driver
class Compress(WholeUnits):
    """A filter over a format that compresses."""

    driver_name = "compress"

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
    def unit(self) -> int:
        """A cluster."""
        below = self.driver_below
        while isinstance(below, FilterDriver):
            below = below.driver_below
        return 1 if below is None else below.cluster_size or 1

    async def store(self, offset: int, data: Buffer) -> None:
        """Compressed; plainly in an encrypted image, or one with a data file."""
        try:
            await FilterDriver.write_compressed(self, offset, data)
        except OSError as error:
            if error.errno != ENOTSUP:
                raise
            await self.child.write(offset, data)

    async def zero(self, offset: int, length: int, may_unmap: bool, fast_only: bool) -> None:
        """As the child."""
        await self.child.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    async def drop(self, offset: int, length: int) -> None:
        """As the child."""
        await self.child.discard(offset, length)
