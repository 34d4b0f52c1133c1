"""The filter that a stream puts above its top: shown as ``copy-on-read``, passes all requests on.

QEMU's stream copies what guests read while it runs; ours copies below the guest's writes and needs
no help of the reads, so that this node is there for clients that look for it by its name only.

Runs on the event loop. Not registered: blockdev-add cannot make one. Errors: those of the child.
"""

from __future__ import annotations

from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Done, Extent, HostFile


class CopyOnRead(BlockDriver):
    """Hands everything on to its ``file`` child, which graph surgery never replaces."""

    driver_name = "copy-on-read"
    is_filter = True
    child_roles = ("file",)

    def __init__(self, child: BlockIO, *, read_only: bool) -> None:
        self.children: dict[str, BlockIO] = {"file": child}
        self.read_only = read_only
        self._child = child
        # A node binds what it finds here: no call in between on the request path. Writes are looked
        # up each time: the child may get a dirty bitmap meanwhile.
        self.read_nowait = child.read_nowait  # type: ignore[method-assign]

    @property
    def length(self) -> int:
        """Bytes."""
        return self._child.length

    def layer(self) -> tuple[BlockIO, BlockDriver] | None:
        """As the child."""
        layer = getattr(self._child, "layer", None)
        return None if layer is None else layer()

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As the child."""
        return self._child.write_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """As the child."""
        return self._child.begin_write(offset, data, done)

    async def read(self, offset: int, length: int) -> Buffer:
        """As the child."""
        return await self._child.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """As the child."""
        await self._child.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """As the child."""
        await self._child.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """As the child; OSError(ENOTSUP) where it has none."""
        write = getattr(self._child, "write_compressed", super().write_compressed)
        await write(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        """As the child."""
        await self._child.discard(offset, length)

    async def flush(self) -> None:
        """As the child."""
        await self._child.flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """As the child."""
        return await self._child.map(offset, length)

    async def truncate(self, length: int) -> None:
        """As the child."""
        await self._child.truncate(length)

    def host_file(self) -> HostFile | None:
        """As the child's: the offsets are the same."""
        return self._child.host_file()
