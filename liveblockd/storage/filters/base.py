"""The base of filters: everything is handed on to one child.

Specification: QEMU's docs/interop/live-block-operations has filters in chains; ``driver.py`` the
methods. A subclass overrides what it does otherwise, and nothing else.

Runs on: the event loop. Invariants: the child is looked up for every request, for graph surgery
replaces it between two (an overlay, a filter of a job); a request that a subclass wants to see may
not pass it by, so one that overrides a coroutine overrides its ``_nowait`` twin, ``begin_write``
and ``host_file`` too. To a flat map a filter is a node to be asked (``BlockDriver.layer``).

Errors: those of the child.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, Self, cast

from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Done, Extent, HostFile
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment


class _Compressing(Protocol):
    async def write_compressed(self, offset: int, data: Buffer) -> None: ...


class FilterOptions(BlockdevOptions):
    """Members of a filter without any of its own."""

    file: BlockdevRef


class FilterDriver(BlockDriver):
    """Passes through; ``filtered`` is the role of the child that chain walks go on with."""

    is_filter = True
    child_roles: ClassVar[tuple[str, ...]] = ("file",)
    Options: ClassVar[type[BlockdevOptions]] = FilterOptions

    def __init__(self, children: dict[str, BlockIO], *, read_only: bool) -> None:
        self.children = children
        self.read_only = read_only

    @classmethod
    async def open(
        cls,
        options: BlockdevOptions,
        children: dict[str, BlockIO],
        environment: Environment,  # noqa: ARG003
    ) -> Self:
        """Nothing to look at."""
        return cls(children, read_only=bool(options.read_only))

    @property
    def child(self) -> BlockIO:
        """What is filtered."""
        return self.children[self.filtered]

    @property
    def length(self) -> int:
        """The child's."""
        return self.child.length

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """As the child."""
        return self.child.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As the child."""
        return self.child.write_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """As the child."""
        return self.child.begin_write(offset, data, done)

    async def read(self, offset: int, length: int) -> Buffer:
        """As the child."""
        return await self.child.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """As the child."""
        await self.child.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """As the child."""
        await self.child.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """As the child; OSError(ENOTSUP) where it has none."""
        if not hasattr(self.child, "write_compressed"):
            await super().write_compressed(offset, data)
        await cast(_Compressing, self.child).write_compressed(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        """As the child."""
        await self.child.discard(offset, length)

    async def flush(self) -> None:
        """As the child."""
        await self.child.flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """As the child."""
        return await self.child.map(offset, length)

    async def truncate(self, length: int) -> None:
        """As the child."""
        await self.child.truncate(length)

    def host_file(self) -> HostFile | None:
        """As the child's: the offsets are the same."""
        return self.child.host_file()

    @property
    def driver_below(self) -> BlockDriver | None:
        """The child's driver, for what ``BlockIO`` does not tell; None for what has none."""
        found = getattr(self.child, "driver", self.child)
        return found if isinstance(found, BlockDriver) else None

    @property
    def sees_reads(self) -> bool:
        """Whether a job may not read past this filter, with what its maps say."""
        return False

    def limits(self) -> dict[str, int]:
        """The child's."""
        below = self.driver_below
        return super().limits() if below is None else below.limits()
