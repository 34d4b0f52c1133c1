"""The driver ``snapshot-access``: the disk as it was when the filter below it was opened.

Specification: qapi/block-core.json; image fleecing as backup products do it: this node is exported
over NBD while the guest goes on above the ``copy-before-write`` node that is its ``file``.

Runs on the event loop. Invariants: nothing is written, a discard says that a range was read and
need not be kept any longer; the length is that of the instant, whatever becomes of the disk's.

Errors: OSError(EACCES) for what was not kept; BlockError from ``open``.
"""

from __future__ import annotations

import os
from errno import ENOTSUP, EPERM
from typing import Self

from liveblockd.errors import BlockError
from liveblockd.graph.copy_before_write import CopyBeforeWrite
from liveblockd.graph.node import Node
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Extent, Permission
from liveblockd.storage.filters.base import FilterOptions
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver


@register_driver
class SnapshotAccess(BlockDriver):
    """Reads through ``CopyBeforeWrite``."""

    driver_name = "snapshot-access"
    child_roles = ("file",)
    Options = FilterOptions

    def __init__(self, children: dict[str, BlockIO], *, read_only: bool) -> None:
        self.children = children
        self.read_only = read_only
        self._length = 0

    @classmethod
    async def open(
        cls, options: BlockdevOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """BlockError unless the child keeps old contents."""
        del environment
        self = cls(children, read_only=bool(options.read_only))
        found = self._find()
        if found is None:
            raise BlockError("snapshot-access needs a copy-before-write node as its file child")
        self._length = found.core.length
        return self

    def _find(self) -> CopyBeforeWrite | None:
        """The filter; a job may have put another one above it."""
        node = self.children["file"]
        found = None
        while isinstance(node, Node):
            if isinstance(node.driver, CopyBeforeWrite):
                found = node.driver
                if not node.job_filter:
                    return found
            if not node.is_filter or node.file is None:
                return found
            node = node.file
        return found

    @property
    def _before_write(self) -> CopyBeforeWrite:
        found = self._find()
        if found is None:
            raise OSError(ENOTSUP, os.strerror(ENOTSUP))
        return found

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """None are needed: the filter has them."""
        del options, role, used, shared
        return Permission.NONE, Permission.ALL

    @property
    def length(self) -> int:
        """The disk's when the filter below was opened."""
        return self._length

    async def read(self, offset: int, length: int) -> Buffer:
        """As it was."""
        return await self._before_write.read_snapshot(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """Never."""
        del offset, data
        raise OSError(ENOTSUP, os.strerror(ENOTSUP))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Never."""
        del offset, length, may_unmap, fast_only
        raise OSError(ENOTSUP, os.strerror(ENOTSUP))

    async def discard(self, offset: int, length: int) -> None:
        """The range need not be kept any longer."""
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
        await self._before_write.discard_snapshot(offset, length)

    async def flush(self) -> None:
        """Nothing to do."""

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Data or zeros, as it was."""
        return await self._before_write.map_snapshot(offset, length)
