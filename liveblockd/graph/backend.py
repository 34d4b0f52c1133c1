"""A user of a node: an export, a drive or a job (QEMU's BlockBackend).

Runs on the event loop. What it adds to the node below it:

* it follows: a snapshot puts its new overlay under every backend that stood on the old node;
* *quiesce*: while the graph is changed, ``x_nowait`` answers None or False and coroutines wait;
  ``in_flight`` counts what was begun before, so that a drain can wait for it;
* bounds, read-only, ``detect-zeroes``, writethrough, statistics and BLOCK_IO_ERROR of drives.

The fast path costs one call: a single comparison with ``_read_end`` or ``_write_end`` says at once
that the request lies inside the disk, that nothing is quiesced and that it may be written.

Invariants: no request reaches a node between ``quiesce()`` returning with ``in_flight == 0`` and
``resume()``. Whoever runs a request here does not cancel it: its worker would go on writing
after the drain believed it gone.

Errors: OSError (EIO for a request beyond the end, ENOSPC for such a write, EPERM for a write
without the permission) and those of the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from errno import EINVAL, EIO, ENOMEDIUM, ENOSPC, EPERM, ESHUTDOWN
from functools import partial
from os import strerror
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from liveblockd.errors import NO_SPACE
from liveblockd.events import BlockIoError
from liveblockd.formats.probe import PROBE_BYTES, probe_format
from liveblockd.graph import chain, populating
from liveblockd.graph.node import Edge, Node
from liveblockd.graph.permissions import describe
from liveblockd.graph.statistics import Statistics
from liveblockd.storage.copy_engine import is_zero
from liveblockd.storage.driver import Buffer, Done, Extent, HostFile, Permission
from liveblockd.storage.filters.throttle_group import Member, ThrottleGroup
from liveblockd.storage.options import BlockdevDetectZeroesOptions

if TYPE_CHECKING:
    from liveblockd.graph.graph import Graph

T = TypeVar("T")

#: runs in one answer of ``block_status``
STATUS_LIMIT = 16384


class StatusRun(NamedTuple):
    """A run of equal block status over the whole chain, as NBD's meta contexts need it."""

    length: int  # bytes
    zero: bool  # reads as zeros
    hole: bool  # no layer has bytes for it
    depth: int  # 1: the top layer says so, 2: its backing node, ...; 0: nobody has it


class Backend:
    """Made by ``Graph.attach``, ended by ``Graph.detach``."""

    def __init__(
        self, graph: Graph, node: Node, *, name: str = "", user: str | None = None
    ) -> None:
        self.graph = graph
        self.name = name
        #: how messages call it: ``block device 'drive0'``, ``block device 'exp'``
        self.user = user
        self.edge = Edge(self, "root", node)
        #: it may write, and stand on a node that is not active: it waits until that is
        self.allow_inactive = False
        #: permissions that it has when its node is active again; None: it has them
        self.suspended: tuple[Permission, Permission] | None = None
        self.statistics = Statistics()
        self.in_flight = 0
        #: every write is durable when it returns (cache=writethrough)
        self.writethrough = False
        #: what it reads of the chain is kept in the image on top
        self.copy_on_read = False
        #: the limits it keeps to, the name of their group, and the drive that they are those of
        self.throttle: Member | None = None
        self.throttle_name = ""
        self.guest_of: Backend | None = None
        #: called after the node below is another, or has another size
        self.on_change: list[Callable[[], None]] = []
        self._quiesced = 0
        self._ended = False
        self._resumed: asyncio.Event = asyncio.Event()
        self._resumed.set()
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._read_end = self._write_end = -1
        self.rebind()

    @property
    def node(self) -> Node:
        """What it stands on now."""
        return self.edge.child

    @property
    def length(self) -> int:
        """Bytes that can be read."""
        return self.edge.child.driver.length

    @property
    def read_only(self) -> bool:
        """Whether writes are refused: without the permission, or because the node is."""
        used = self.edge.used if self.suspended is None else self.suspended[0]
        return self.edge.child.read_only or not used & (
            Permission.WRITE | Permission.WRITE_UNCHANGED
        )

    @property
    def active(self) -> bool:
        """Whether its node is; else what is read may be old, and nothing is written."""
        return self.edge.child.active

    @property
    def may_rest(self) -> bool:
        """Whether its node may become inactive: it does not write, or does not mind."""
        used = self.edge.used if self.suspended is None else self.suspended[0]
        return bool(self.name) or self.allow_inactive or not used & ~Permission.CONSISTENT_READ

    def claim(self, used: Permission, shared: Permission) -> None:
        """Want these permissions of the node; ``Graph.refresh_permissions`` is to follow.

        On an inactive node they come into force when it becomes active. BlockError for a user who
        cannot wait for that.
        """
        before = self.suspended
        if self.edge.child.active:
            self.suspended = None
            self.edge.used, self.edge.shared = used, shared
            return
        self.suspended = (used, shared)
        if not self.may_rest:
            self.suspended = before
            self.edge.child.check_active(describe(used))
        self.edge.used, self.edge.shared = Permission.NONE, Permission.ALL

    def rest(self) -> None:
        """The node is no longer active; ``claim`` what was suspended when it is."""
        if self.suspended is None:
            self.suspended = (self.edge.used, self.edge.shared)
        self.edge.used, self.edge.shared = Permission.NONE, Permission.ALL

    def host_file(self) -> HostFile | None:
        """As the node's."""
        return self.edge.child.host_file()

    def __repr__(self) -> str:
        return f"<Backend {self.user or self.name!r} on {self.edge.child.name!r}>"

    # -- quiesce

    def quiesce(self) -> None:
        """Let no new request through; nests."""
        self._quiesced += 1
        self._resumed.clear()
        self._read_end = self._write_end = -1

    def resume(self) -> None:
        """End one ``quiesce``; after the last one the waiting requests go on."""
        assert self._quiesced > 0
        self._quiesced -= 1
        if not self._quiesced:
            self.rebind()
            self._resumed.set()

    def end(self) -> None:
        """Quiesce for good: who waits for the end of a quiesce, or comes later, is refused."""
        self.quiesce()
        self._ended = True
        self._resumed.set()
        self.join(None)
        for guest in self.graph.backends if self.name else ():
            if guest.guest_of is self:
                guest.guest_of = None
                guest.copy_on_read = False
                guest.join(None)
                guest.rebind()

    def join(self, group: ThrottleGroup | None) -> None:
        """Keep to the limits of this group from now on; who waits for those before goes."""
        before = self.throttle
        if group is (None if before is None else before.group):
            return
        self.throttle = None if group is None else group.join()
        if before is not None:
            before.group.leave(before)
        self.rebind()

    async def idle(self) -> None:
        """Return when nothing is in flight; a cancelled waiter leaves no trace."""
        while self.in_flight:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._idle_waiters:
                    self._idle_waiters.remove(waiter)

    def rebind(self) -> None:
        """Look at the node again: it is another, or its size or permissions have changed."""
        node = self.edge.child
        self._read = node.read_nowait
        self._write = node.write_nowait
        self._begin = node.begin_write
        self._read_many = node.read_many_nowait
        self._write_many = node.write_many_nowait
        plain = not (
            self.writethrough
            or node.probed
            or node.write_threshold
            or self.read_only
            or not node.active
            or node.detect_zeroes is not BlockdevDetectZeroesOptions.OFF
        )
        self._read_end = self._write_end = -1
        if not self._quiesced and self.throttle is None:
            # Without a size (a dead file server) each request asks again and gets the error: it
            # must not come from here, where others are still to be let go on.
            with suppress(OSError):
                length = node.driver.length
                self._read_end = length if not self.copy_on_read else -1
                self._write_end = length if plain else -1
        for callback in tuple(self.on_change):
            callback()

    # -- requests that do not wait

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they are at hand, else None (also while quiesced or out of bounds)."""
        if offset < 0 or offset + length > self._read_end:
            return None
        data = self._read(offset, length)
        if data is not None:
            statistics = self.statistics
            statistics.rd_operations += 1
            statistics.rd_bytes += length
        return data

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Whether the write is done; False while quiesced, out of bounds or not simple."""
        length = len(data)
        if offset < 0 or offset + length > self._write_end:
            return False
        if self._write(offset, data):
            statistics = self.statistics
            statistics.wr_operations += 1
            statistics.wr_bytes += length
            end = offset + length
            if end > statistics.wr_highest_offset:
                statistics.wr_highest_offset = end
            return True
        return False

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """Ranges of one length: those that are at hand, from the first one on, see above."""
        if not offsets or min(offsets) < 0 or max(offsets) + length > self._read_end:
            return []
        found = self._read_many(offsets, length)
        statistics = self.statistics
        statistics.rd_operations += len(found)
        statistics.rd_bytes += len(found) * length
        return found

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """Parts of one length: how many, from the first one on, are stored; see above."""
        if not offsets or min(offsets) < 0:
            return 0
        length, last = len(parts[0]), max(offsets)
        if last + length > self._write_end:
            return 0
        done = self._write_many(offsets, parts)
        statistics = self.statistics
        statistics.wr_operations += done
        statistics.wr_bytes += done * length
        if last + length > statistics.wr_highest_offset and done:
            if done < len(offsets):
                last = max(offsets[:done])
            statistics.wr_highest_offset = max(statistics.wr_highest_offset, last + length)
        return done

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """See ``BlockDriver``; False while quiesced, out of bounds or not simple."""
        length = len(data)
        if offset < 0 or offset + length > self._write_end:
            return False
        self.in_flight += 1
        ended = partial(self._written, offset, length, perf_counter_ns(), done)
        if self._begin(offset, data, ended):
            return True
        self._one_less()
        return False

    def _written(
        self, offset: int, length: int, begun: int, done: Done, error: OSError | None
    ) -> None:
        self._one_less()
        statistics = self.statistics
        if error is None:
            statistics.wr_operations += 1
            statistics.wr_bytes += length
            statistics.wr_total_time_ns += perf_counter_ns() - begun
            if offset + length > statistics.wr_highest_offset:
                statistics.wr_highest_offset = offset + length
        else:
            statistics.wr_failed += 1
            self._report("wr", error)
        done(error)

    # -- requests that may wait

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes."""
        await self._enter("rd", offset, length)
        if self.throttle is not None:
            await self._take_turn("rd", offset, length)
        if self.copy_on_read:
            return await self._run("rd", length, self._copy_and_read(offset, length))
        return await self._run("rd", length, self.edge.child.read(offset, length))

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Store ``data``; with ``fua`` (or writethrough) it is durable on return."""
        length = len(data)
        await self._enter("wr", offset, length)
        if self.throttle is not None:
            await self._take_turn("wr", offset, length)
        await self._run("wr", length, self._store(offset, data, fua))
        if offset + length > self.statistics.wr_highest_offset:
            self.statistics.wr_highest_offset = offset + length

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """``write`` of whole clusters, compressed where the format can; see ``BlockDriver``."""
        length = len(data)
        await self._enter("wr", offset, length)
        if self.throttle is not None:
            await self._take_turn("wr", offset, length)
        await self._run("wr", length, self._store_compressed(offset, data))
        if offset + length > self.statistics.wr_highest_offset:
            self.statistics.wr_highest_offset = offset + length

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = False,
        fast_only: bool = False,
        fua: bool = False,
    ) -> None:
        """Make the range read as zeros; OSError(ENOTSUP) if only slowly and ``fast_only``."""
        await self._enter("wr", offset, length)
        if self.throttle is not None:
            await self._take_turn("wr", offset, length)
        await self._run("wr", length, self._store_zeroes(offset, length, may_unmap, fast_only, fua))

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Give space back where the node may."""
        await self._enter("unmap", offset, length)
        if self.throttle is not None:
            await self._take_turn("unmap", offset, length)
        await self._run("unmap", length, self._discard(offset, length, fua))

    async def flush(self) -> None:
        """Make every write that returned before durable."""
        await self._enter("flush", 0, 0)
        await self._run("flush", 0, self.edge.child.flush())

    async def map(self, offset: int, length: int) -> list[Extent]:
        """As the node's."""
        await self._enter("rd", offset, length)
        return await self._counted(self.edge.child.map(offset, length))

    async def truncate(self, length: int) -> None:  # noqa: ARG002
        """Not for users: a resize goes through ``Graph.resize``."""
        raise OSError(EPERM, strerror(EPERM))

    async def block_status(
        self, offset: int, length: int, *, limit: int = STATUS_LIMIT
    ) -> list[StatusRun]:
        """At most ``limit`` runs for a non-empty prefix of the range, over the whole chain."""
        await self._enter("rd", offset, length)
        return await self._counted(self._block_status(offset, length, limit))

    # -- inside

    async def _enter(self, kind: str, offset: int, length: int) -> None:
        """Wait for the end of a quiesce; refuse what cannot be. No await follows the check."""
        while self._quiesced:
            if self._ended:
                raise OSError(ESHUTDOWN, strerror(ESHUTDOWN))
            await self._resumed.wait()
        if offset < 0 or length < 0:
            self._refuse(kind, EINVAL)
        if kind in ("wr", "unmap") and (self.read_only or not self.active):
            self._refuse(kind, EPERM)
        if offset + length > self.edge.child.driver.length:
            self._refuse(kind, ENOSPC if kind == "wr" else EIO)

    async def _take_turn(self, kind: str, offset: int, length: int) -> None:
        """Wait until the limits allow it, and enter again: much may have happened."""
        assert self.throttle is not None
        await self.throttle.acquire(kind != "rd", length)
        await self._enter(kind, offset, length)

    def count_invalid(self, kind: str) -> None:
        """A request (``rd``, ``wr``, ``flush`` or ``unmap``) that nobody should have made."""
        name = f"{kind}_invalid"
        setattr(self.statistics, name, getattr(self.statistics, name) + 1)

    def _refuse(self, kind: str, errno: int) -> None:
        self.count_invalid(kind)
        raise OSError(errno, strerror(errno))

    async def _counted(self, request: Awaitable[T]) -> T:
        self.in_flight += 1
        try:
            return await request
        finally:
            self._one_less()

    def _one_less(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and self._idle_waiters:
            for waiter in self._idle_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle_waiters.clear()

    async def _run(self, kind: str, length: int, request: Awaitable[T]) -> T:
        start = perf_counter_ns()
        self.in_flight += 1
        try:
            result = await request
        except OSError as error:
            name = f"{kind}_failed"
            setattr(self.statistics, name, getattr(self.statistics, name) + 1)
            self._report(kind, error)
            raise
        finally:
            self._one_less()
        self.statistics.finished(kind, length, perf_counter_ns() - start)
        return result

    def _report(self, kind: str, error: OSError) -> None:
        """BLOCK_IO_ERROR, for drives: an export tells its client, a job has its own policy."""
        if not self.name or error.errno in (EPERM, ENOMEDIUM):
            return
        self.graph.publisher.publish(
            BlockIoError(
                qom_path="",
                device=self.name,
                node_name=self.edge.child.name,
                operation="read" if kind == "rd" else "write",
                action="report",
                nospace=error.errno in NO_SPACE,
                reason=error.strerror or str(error),
            )
        )

    async def _copy_and_read(self, offset: int, length: int) -> Buffer:
        node = self.edge.child
        if not self.read_only and self.active:
            await populating.copy(node, offset, length)
        return await node.read(offset, length)

    async def _store(self, offset: int, data: Buffer, fua: bool) -> None:
        node = self.edge.child
        if node.probed and offset < PROBE_BYTES:
            await self._guard_probed(node, offset, data)
        detect = node.detect_zeroes
        if detect is not BlockdevDetectZeroesOptions.OFF and is_zero(data):
            unmap = detect is BlockdevDetectZeroesOptions.UNMAP
            await node.write_zeroes(offset, len(data), may_unmap=unmap)
        else:
            await node.write(offset, data)
        if node.write_threshold:
            self.graph.check_write_threshold(node, offset + len(data))
        if fua or self.writethrough:
            await node.flush()

    async def _store_compressed(self, offset: int, data: Buffer) -> None:
        node = self.edge.child
        await node.write_compressed(offset, data)
        if node.write_threshold:
            self.graph.check_write_threshold(node, offset + len(data))
        if self.writethrough:
            await node.flush()

    async def _store_zeroes(
        self, offset: int, length: int, may_unmap: bool, fast_only: bool, fua: bool
    ) -> None:
        node = self.edge.child
        await node.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        if node.write_threshold:
            self.graph.check_write_threshold(node, offset + length)
        if fua or self.writethrough:
            await node.flush()

    async def _discard(self, offset: int, length: int, fua: bool) -> None:
        node = self.edge.child
        await node.discard(offset, length)
        if fua or self.writethrough:
            await node.flush()

    @staticmethod
    async def _guard_probed(node: Node, offset: int, data: Buffer) -> None:
        """Nobody said this image is raw: a guest must not turn it into another format."""
        size = min(PROBE_BYTES, node.driver.length)
        head = bytearray(await node.read(0, size))
        part = bytes(memoryview(data)[: max(0, size - offset)])
        head[offset : offset + len(part)] = part
        if probe_format(bytes(head)) != "raw":
            raise OSError(EPERM, strerror(EPERM))

    async def _block_status(self, offset: int, length: int, limit: int) -> list[StatusRun]:
        runs: list[StatusRun] = []
        async with aclosing(
            chain.resolve(self.edge.child, None, offset, length, shown=True)
        ) as found:
            async for run in found:
                new = StatusRun(run.length, run.zero, run.hole, run.depth)
                if runs and runs[-1][1:] == new[1:]:
                    runs[-1] = runs[-1]._replace(length=runs[-1].length + new.length)
                elif len(runs) >= limit:
                    break
                else:
                    runs.append(new)
        return runs
