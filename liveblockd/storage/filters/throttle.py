"""The driver ``throttle``: requests wait until the limits of a group allow them.

Specification: qapi/block-core.json, BlockdevOptionsThrottle; QEMU docs/throttle. Reads, writes,
zero writes and discards are counted, the last two as writes; flushes and resizes are not.

Runs on: the event loop. Invariants: with limits set nobody passes them by: jobs get no descriptor.
While the node is drained nothing waits, so that a slow limit does not hold up a snapshot.

Errors: those of the child; BlockError from ``open`` for a group that is not there.
"""

from __future__ import annotations

from typing import Self

from liveblockd.storage.driver import BlockIO, Buffer, Done, HostFile
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver


class ThrottleOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    throttle_group: str
    file: BlockdevRef


@register_driver
class Throttle(FilterDriver):
    """A member of a group."""

    driver_name = "throttle"
    holds_requests = True
    changeable = frozenset(("throttle-group",))
    Options = ThrottleOptions

    def __init__(
        self, children: dict[str, BlockIO], group: ThrottleGroup, *, read_only: bool
    ) -> None:
        super().__init__(children, read_only=read_only)
        self._member = group.join()

    @classmethod
    async def open(
        cls,
        options: ThrottleOptions,  # type: ignore[override]
        children: dict[str, BlockIO],
        environment: Environment,
    ) -> Self:
        """Join the group; BlockError if there is none of that name."""
        group = environment.throttle_group(options.throttle_group)
        return cls(children, group, read_only=bool(options.read_only))

    @property
    def group(self) -> ThrottleGroup:
        """With whom the limits are shared."""
        return self._member.group

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The child's answer, if the limits allow it at once."""
        if not self._member.passes(False, length):
            return None
        data = self.child.read_nowait(offset, length)
        if data is not None:
            self._member.account(False, length)
        return data

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """The child's answer, if the limits allow it at once."""
        length = len(data)
        if self._member.passes(True, length) and self.child.write_nowait(offset, data):
            self._member.account(True, length)
            return True
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """The child's answer, if the limits allow it at once."""
        length = len(data)
        if self._member.passes(True, length) and self.child.begin_write(offset, data, done):
            self._member.account(True, length)
            return True
        return False

    async def read(self, offset: int, length: int) -> Buffer:
        """When it may."""
        await self._member.acquire(False, length)
        return await self.child.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """When it may."""
        await self._member.acquire(True, len(data))
        await self.child.write(offset, data)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """When it may."""
        await self._member.acquire(True, len(data))
        await super().write_compressed(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """When it may."""
        await self._member.acquire(True, length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    async def discard(self, offset: int, length: int) -> None:
        """When it may."""
        await self._member.acquire(True, length)
        await self.child.discard(offset, length)

    def host_file(self) -> HostFile | None:
        """None while there are limits, which a copy by descriptor would pass by."""
        return self.child.host_file() if self.group.limits.unlimited else None

    @property
    def sees_reads(self) -> bool:
        """While there are limits."""
        return not self.group.limits.unlimited

    def drain_begin(self) -> None:
        """Nothing waits any more."""
        self._member.drain_begin()

    def drain_end(self) -> None:
        """Limits are kept again."""
        self._member.drain_end()

    def change_options(self, options: BlockdevOptions, environment: Environment) -> None:
        """Join another group (blockdev-reopen)."""
        assert isinstance(options, ThrottleOptions)
        group = environment.throttle_group(options.throttle_group)
        if group is not self.group:
            before, self._member = self._member, group.join()
            self._member.free = before.free  # it is being drained
            before.group.leave(before)

    async def close(self) -> None:
        """Leave the group, all that was written being durable."""
        try:
            await super().close()
        finally:
            self.group.leave(self._member)
