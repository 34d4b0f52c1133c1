"""The filter ``mirror_top``: stands above the source of a mirror, where the guests' writes pass.

In copy mode ``background`` it hands everything on: the source records what is written. In copy mode
``write-blocking`` it gives writes to the job, which answers when they are in both images.

Runs on the event loop. Not registered: blockdev-add cannot make one. Errors: those of the source;
an error of the target is the job's affair, never the guest's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from liveblockd.graph.filter import CopyOnRead
from liveblockd.graph.node import Node
from liveblockd.storage.driver import Buffer, Done, HostFile, Permission
from liveblockd.storage.options import BlockdevOptions

Apply = Callable[[], Awaitable[None]]


class WriteMirror(Protocol):
    """Who is given the writes."""

    @property
    def mirroring(self) -> bool:
        """Whether writes have to reach the target before they are answered."""

    async def mirror_write(
        self, offset: int, length: int, apply: Apply, data: Buffer | None
    ) -> None:
        """Do ``apply`` and the same to the target; without ``data`` the source is looked at.

        To its end, also when the caller is cancelled.
        """


class MirrorTop(CopyOnRead):
    """Set ``mirror`` to let it take part in writes."""

    driver_name = "mirror_top"
    link = "backing"
    mirror: WriteMirror | None = None

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As the source, unless the target has to be written too."""
        mirror = self.mirror
        if mirror is not None and mirror.mirroring:
            return False
        return self.child.write_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """As the source, unless the target has to be written too."""
        mirror = self.mirror
        if mirror is not None and mirror.mirroring:
            return False
        return self.child.begin_write(offset, data, done)

    async def write(self, offset: int, data: Buffer) -> None:
        """To the source, or to both."""
        await self._both(offset, len(data), lambda: self.child.write(offset, data), data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """To the source, or to both."""

        async def apply() -> None:
            await self.child.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

        await self._both(offset, length, apply, None)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """To the source, or to both; not compressed there."""
        passed_on = super().write_compressed
        await self._both(offset, len(data), lambda: passed_on(offset, data), data)

    async def discard(self, offset: int, length: int) -> None:
        """On the source; the target gets what is read there afterwards."""
        await self._both(offset, length, lambda: self.child.discard(offset, length), None)

    def host_file(self) -> HostFile | None:
        """None: nothing may pass by here."""
        return None

    async def _both(self, offset: int, length: int, apply: Apply, data: Buffer | None) -> None:
        mirror = self.mirror
        if mirror is None or not mirror.mirroring:
            await apply()
        else:
            await mirror.mirror_write(offset, length, apply, data)


class CommitMirrorTop(MirrorTop):
    """Of a commit of the active image, as ``filter.CommitTop``; guests may write through it."""

    @classmethod
    def child_permissions(
        cls,
        options: BlockdevOptions,  # noqa: ARG003
        role: str,  # noqa: ARG003
        used: Permission,
        shared: Permission,
    ) -> tuple[Permission, Permission]:
        """Writes are handed down; what is read is not asked of each layer by itself."""
        return used & ~Permission.CONSISTENT_READ, shared | Permission.WRITE


def where_guests_are(node: Node) -> Node:
    """The filter of a commit of ``node`` as the active image, where a guest of it belongs; or it.

    By the node itself nobody new may read: the layers that the commit takes away lie below it.
    """
    for edge in node.parents:
        above = edge.parent
        if isinstance(above, Node) and issubclass(above.driver_class, CommitMirrorTop):
            return above
    return node
