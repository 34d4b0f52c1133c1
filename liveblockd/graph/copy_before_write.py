"""The driver ``copy-before-write``: what a guest overwrites is copied to a target first.

Specification: qapi/block-core.json (BlockdevOptionsCbw). A backup puts one above its source, and a
client can by blockdev-add; ``snapshot-access`` above it reads the disk as it was when the node was
opened. How that is kept: ``before_write``.

Runs on the event loop. Invariants: requests reach the ``file`` child only after ``BeforeWrite`` has
let them go on, the ``_nowait`` ones and ``begin_write`` at once or not at all; there is no
``host_file``, so that nobody writes by a descriptor.

Errors: those of the child; OSError of the target with ``on-cbw-error=break-guest-write``.
BlockError from ``open``.
"""

from __future__ import annotations

from errno import ENOENT
from typing import ClassVar, Final, Self

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.before_write import BeforeWrite, OnCbwError
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.graph.node import Node
from liveblockd.qapi import QapiModel, Size, UInt32
from liveblockd.storage.driver import (
    BlockDriver,
    BlockIO,
    Buffer,
    Done,
    Extent,
    ExtentKind,
    HostFile,
    Permission,
)
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

#: bytes that are copied at a time at least
LEAST_CLUSTER: Final = 64 * 1024


class BlockDirtyBitmap(QapiModel):
    """A dirty bitmap by node and name."""

    node: str
    name: str


class CbwOptions(BlockdevOptions):
    """Members of ``blockdev-add``; the timeout in seconds, the size in bytes."""

    file: BlockdevRef
    target: BlockdevRef
    bitmap: BlockDirtyBitmap | None = None
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    cbw_timeout: UInt32 = 0
    min_cluster_size: Size | None = None


def cluster_size(target: BlockDriver | None, least: int | None) -> int:
    """Bytes that are copied at a time: the target's clusters, 64 KiB at least; BlockError."""
    if least and least & (least - 1):
        raise BlockError("min-cluster-size needs to be a power of 2")
    own = None if target is None else target.cluster_size
    return max(LEAST_CLUSTER, own or 0, least or 0)


def driver_of(node: BlockIO) -> BlockDriver | None:
    """The driver that answers for a node: of the first layer below filters."""
    layer = chain.skip_filters(node) if isinstance(node, Node) else None
    return getattr(layer or node, "driver", None)


@register_driver
class CopyBeforeWrite(FilterDriver):
    """``core`` knows what is kept already."""

    driver_name = "copy-before-write"
    child_roles: ClassVar[tuple[str, ...]] = ("file", "target")
    Options = CbwOptions

    def __init__(
        self, children: dict[str, BlockIO], core: BeforeWrite, *, read_only: bool = False
    ) -> None:
        super().__init__(children, read_only=read_only)
        self.core = core

    @classmethod
    async def open(
        cls, options: BlockdevOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """From now on all is kept that was there; BlockError."""
        assert isinstance(options, CbwOptions)
        source, target = children["file"], children["target"]
        if target.length < source.length:
            raise BlockError(
                f"The target ({target.length} bytes) is smaller than the source "
                f"({source.length} bytes)"
            )
        size = cluster_size(driver_of(target), options.min_cluster_size)
        todo = DirtyBitmap(source.length, size)
        if options.bitmap is None:
            todo.set(0, source.length)
        else:
            bitmap = _find_bitmap(environment, options.bitmap)
            bitmap.check()
            todo.merge(bitmap)
        core = BeforeWrite(todo)
        core.on_error, core.timeout = options.on_cbw_error, options.cbw_timeout
        return cls(children, core, read_only=bool(options.read_only))

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Nobody else writes to the disk; others may write to the target, or read it."""
        del options
        if role == "target":
            return Permission.WRITE, Permission.ALL & ~Permission.RESIZE
        if used & Permission.WRITE:
            used |= Permission.CONSISTENT_READ
        if used:
            shared &= ~(Permission.WRITE | Permission.RESIZE)
        return used, shared

    # -- guest I/O

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As the child, if the old contents are kept or not wanted."""
        if not self.core.free(offset, len(data)):
            return False
        return self.child.write_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """As the child, if the old contents are kept or not wanted."""
        if not self.core.free(offset, len(data)):
            return False
        return self.child.begin_write(offset, data, done)

    async def _before(self, offset: int, length: int) -> None:
        if self.core.free(offset, length):
            return
        source, target = self.child, self.children["target"]
        await self.core.before(source, target, offset, length)
        if isinstance(source, Node) and isinstance(target, Node) and chain.is_above(target, source):
            await self._let_readers_finish(target)

    async def _let_readers_finish(self, target: Node) -> None:
        """Who reads the target, and through it the disk, gets there before the disk changes.

        Reads that begin now find the old contents on the target. The users of this node are let
        alone: the write that waits here is theirs.
        """
        users, pending, seen = [], [target], {target}
        while pending:
            for edge in pending.pop().parents:
                parent = edge.parent
                if not isinstance(parent, Node):
                    users.append(parent)
                elif parent not in seen and not (parent.opened and parent.driver is self):
                    seen.add(parent)
                    pending.append(parent)
        for user in users:
            if not user.in_flight:
                continue
            user.quiesce()
            try:
                await user.idle()
            finally:
                user.resume()

    async def write(self, offset: int, data: Buffer) -> None:
        """Old contents first."""
        await self._before(offset, len(data))
        await self.child.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Old contents first."""
        await self._before(offset, length)
        await self.child.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Old contents first."""
        await self._before(offset, len(data))
        await super().write_compressed(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        """Old contents first."""
        await self._before(offset, length)
        await self.child.discard(offset, length)

    async def truncate(self, length: int) -> None:
        """Old contents of what is cut off first; what is added was never there."""
        if length < self.core.length:
            await self._before(length, self.core.length - length)
        await self.child.truncate(length)

    def host_file(self) -> HostFile | None:
        """None: nobody may write past this node."""
        return None

    async def close(self) -> None:
        """Copies that nobody waits for end first; what the disk was given is durable then."""
        await self.core.idle()
        await super().close()

    # -- the disk as it was

    async def read_snapshot(self, offset: int, length: int) -> Buffer:
        """OSError(EACCES) for what was not kept."""
        return await self.core.read(self.child, self.children["target"], offset, length)

    async def map_snapshot(self, offset: int, length: int) -> list[Extent]:
        """Data or zeros, for a non-empty prefix of the range; OSError(EACCES) as for reads."""
        core = self.core
        core.check_accessible(offset, offset + length)
        kept, length = core.where(offset, offset + length)
        if kept:
            return await _status(self.children["target"], offset, length)
        with core.reading(offset, offset + length):
            return await _status(self.child, offset, length)

    async def discard_snapshot(self, offset: int, length: int) -> None:
        """Keep the range no longer."""
        start, length = self.core.forget(offset, length)
        if length:
            await self.children["target"].discard(start, length)


def _find_bitmap(environment: Environment, wanted: BlockDirtyBitmap) -> DirtyBitmap:
    node = environment.find_node(wanted.node)
    if not isinstance(node, Node):
        raise BlockError(f"Node '{wanted.node}' not found", errno=ENOENT)
    bitmap = node.find_bitmap(wanted.name)
    if bitmap is None:
        raise BlockError(f"Dirty bitmap '{wanted.name}' not found", errno=ENOENT)
    return bitmap


async def _status(node: BlockIO, offset: int, length: int) -> list[Extent]:
    assert isinstance(node, Node)
    found: list[Extent] = []
    async for run in chain.resolve(node, None, offset, length):
        kind = ExtentKind.ZERO if run.zero else ExtentKind.COMPRESSED
        if found and found[-1].kind is kind:
            found[-1] = Extent(found[-1].length + run.length, kind)
        else:
            found.append(Extent(run.length, kind))
    return found
