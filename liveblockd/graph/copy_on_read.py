"""The driver ``copy-on-read``: what is read of the backing chain is kept in the image on top.

Specification: qapi/block-core.json, BlockdevOptionsCor. With ``bottom`` only what layers down to
that one hold is copied, and the chain down to it cannot be changed meanwhile.

It is the guest's read that pays for the copy; the copy goes in below every guest write
(``BlockDriver.populate``), so it can undo none. An error of the copy is none of the read.

Runs on: the event loop. Invariant: no read that has something to copy is answered without it.

Errors: those of the child; BlockError from ``open``.
"""

from __future__ import annotations

from typing import Self

from liveblockd.errors import BlockError
from liveblockd.graph import chain, populating
from liveblockd.graph.node import Edge, Node
from liveblockd.storage.driver import BlockIO, Buffer, HostFile, Permission
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver


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

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The child's answer where the top layer has all of it."""
        layer = populating.layer_of(self.child)
        if layer is not None and not populating.has(layer, offset, length):
            return None
        return self.child.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        """As the child's, after a copy of what the top layer does not have."""
        await populating.copy(self.child, offset, length, self.bottom)
        return await self.child.read(offset, length)

    def host_file(self) -> HostFile | None:
        """The child's where nothing is copied."""
        layer = populating.layer_of(self.child)
        return self.child.host_file() if layer is None else None
