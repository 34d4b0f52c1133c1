"""The driver ``copy-on-read``: what is read of the backing chain is kept in the image on top.

Specification: qapi/block-core.json, BlockdevOptionsCor. With ``bottom`` only what layers down to
that one hold is copied, and the chain down to it cannot be changed meanwhile.

It is the guest's read that pays for the copy; the copy goes in below every guest write
(``BlockDriver.populate``), so it can undo none. An error of the copy is none of the read.

Runs on: the event loop. Invariant: no read that has something to copy is answered without it.

Errors: those of the child; BlockError from ``open``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final, Self

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.node import Edge, Node
from liveblockd.storage.cells import KIND_SHIFT, UNALLOCATED
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, ExtentKind, HostFile, Permission
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

#: bytes copied at a time
PIECE: Final = 4 << 20


class CopyOnReadOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    file: BlockdevRef
    bottom: str | None = None


@register_driver
class CopyingOnRead(FilterDriver):
    """A filter over an image with a backing chain."""

    driver_name = "copy-on-read"
    Options = CopyOnReadOptions

    def __init__(self, children: dict[str, BlockIO], *, read_only: bool) -> None:
        super().__init__(children, read_only=read_only)
        self.bottom: Node | None = None
        self._frozen: list[Edge] = []

    @classmethod
    async def open(
        cls, options: BlockdevOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Find ``bottom`` and freeze the chain down to it; BlockError if it cannot be."""
        assert isinstance(options, CopyOnReadOptions)
        self = await super().open(options, children, environment)
        if options.bottom is not None:
            self._freeze(options.bottom, environment)
        return self

    def _freeze(self, name: str, environment: Environment) -> None:
        bottom = environment.find_node(name)
        if not isinstance(bottom, Node):
            raise BlockError(f"Bottom node '{name}' not found")
        if bottom.is_filter:
            raise BlockError(f"Bottom node '{name}' is a filter")
        top = self.child
        assert isinstance(top, Node)
        if not chain.is_above(top, bottom):
            raise BlockError(f"Node '{name}' is not in a chain starting from '{top.name}'")
        own = [edge for edge in top.parents if edge.parent.name == environment.node_name]
        self._frozen = chain.freeze(top, bottom)
        for edge in own:
            edge.frozen += 1
        self._frozen += own
        self.bottom = bottom

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Copies are writes that change nothing."""
        del options, role
        return used | Permission.WRITE_UNCHANGED, shared

    async def close(self) -> None:
        """Flush, and let go of the chain."""
        try:
            await super().close()
        finally:
            chain.unfreeze(self._frozen)

    @property
    def _layer(self) -> BlockDriver | None:
        """The driver of the layer that is copied into; None if it has nothing below."""
        node = chain.skip_filters(self.child) if isinstance(self.child, Node) else None
        if node is None or node.backing is None or node.read_only:
            return None
        return node.driver

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The child's answer where the top layer has all of it."""
        if (layer := self._layer) is not None and not self._has(layer, offset, length):
            return None
        return self.child.read_nowait(offset, length)

    @staticmethod
    def _has(layer: BlockDriver, offset: int, length: int) -> bool:
        if layer.cell_unit is None:
            return False
        bits = layer.cell_unit[0]
        start, end = offset >> bits << bits, -(-(offset + length) >> bits << bits)
        cells = layer.cells_now(start, end - start, bits)
        return cells is not None and not bool((cells >> KIND_SHIFT & 3 == UNALLOCATED).any())

    async def read(self, offset: int, length: int) -> Buffer:
        """As the child's, after a copy of what the top layer does not have."""
        layer = self._layer
        if layer is not None and length:
            with suppress(OSError, BlockError):  # the read itself tells if it cannot be
                await self._copy(layer, offset, length)
        return await self.child.read(offset, length)

    async def _copy(self, layer: BlockDriver, offset: int, length: int) -> None:
        unit = layer.cluster_size or 1
        end = min(-(-(offset + length) // unit) * unit, layer.length)
        async for start, stop in self._missing(layer, offset // unit * unit, end):
            # Ends are those of runs; what is copied is whole clusters.
            first, last = start // unit * unit, min(-(-stop // unit) * unit, layer.length)
            for at in range(first, last, max(unit, PIECE // unit * unit)):
                part = min(max(unit, PIECE // unit * unit), last - at)
                await layer.populate(at, await self.child.read(at, part))

    async def _missing(
        self, layer: BlockDriver, start: int, end: int
    ) -> AsyncIterator[tuple[int, int]]:
        """Ranges that the top layer does not have, and layers down to ``bottom`` do."""
        while start < end:
            for extent in await layer.map(start, end - start):
                stop = start + extent.length
                if extent.kind is ExtentKind.UNALLOCATED:
                    async for found in self._held_below(start, stop):
                        yield found
                start = stop

    async def _held_below(self, start: int, stop: int) -> AsyncIterator[tuple[int, int]]:
        if self.bottom is None:
            yield start, stop
            return
        assert isinstance(self.child, Node)
        base = chain.layer_below(self.bottom)
        for run in await chain.allocated_above(self.child, base, start, stop - start):
            if run.layer is not None:
                yield start, start + run.length
            start += run.length

    def host_file(self) -> HostFile | None:
        """The child's where nothing is copied."""
        return self.child.host_file() if self._layer is None else None
