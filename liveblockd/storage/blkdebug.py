"""The driver ``blkdebug``: passes requests on to its ``image`` and lets chosen ones fail or stop.

Specification: qapi/block-core.json, BlockdevOptionsBlkdebug; QEMU docs/devel/testing/blkdebug.

A rule waits for an event; when it comes the rule is active, and the next request of its type that
touches its sector fails. ``set-state`` rules change a number that other rules ask for. A breakpoint
(``suspend``) stops the request at whose event it stands until ``resume``. The events are judged
from the requests (``blkdebug_events``).

Runs on: the event loop. Invariants: with rules or breakpoints left no request is answered without
passing them, so ``read_nowait``, ``write_nowait`` and ``host_file`` decline; without any this is
transparent. A drain lets go of suspended requests: nobody could resume them before it ends.

Errors: ``OSError`` as told by the rules or by the image, ENOENT for a breakpoint that is not there;
``BlockError`` from ``open``.
"""

from __future__ import annotations

import asyncio
import os
from errno import ENOENT
from typing import Self

from liveblockd.errors import BlockError
from liveblockd.storage import blkdebug_events
from liveblockd.storage.blkdebug_rules import (
    BlkdebugEvent,
    BlkdebugInjectErrorOptions,
    BlkdebugIOType,
    BlkdebugSetStateOptions,
    BlockPermission,
    Rules,
    parse_config,
    read_text,
)
from liveblockd.storage.driver import BlockIO, Buffer, Done, Extent, HostFile, Permission
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

_INT_MAX = (1 << 31) - 1


class BlkdebugOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    image: BlockdevRef
    config: str | None = None
    align: int | None = None
    max_transfer: int | None = None
    opt_write_zero: int | None = None
    max_write_zero: int | None = None
    opt_discard: int | None = None
    max_discard: int | None = None
    inject_error: list[BlkdebugInjectErrorOptions] | None = None
    set_state: list[BlkdebugSetStateOptions] | None = None
    take_child_perms: list[BlockPermission] | None = None
    unshare_child_perms: list[BlockPermission] | None = None


_CHANGES = (BlkdebugIOType.WRITE, BlkdebugIOType.WRITE_ZEROES, BlkdebugIOType.DISCARD)


@register_driver
class Blkdebug(FilterDriver):
    """A filter over ``image``."""

    driver_name = "blkdebug"
    child_roles = ("image",)
    filtered = "image"
    holds_requests = True
    Options = BlkdebugOptions

    def __init__(self, options: BlkdebugOptions, image: BlockIO, rules: Rules) -> None:
        super().__init__({"image": image}, read_only=bool(options.read_only))
        self.request_alignment = options.align or 1
        self._options = options
        self._rules = rules
        #: since the last flush that succeeded, while there were rules
        self._written = False
        rules.event("none")

    @classmethod
    async def open(
        cls,
        options: BlkdebugOptions,  # type: ignore[override]
        children: dict[str, BlockIO],
        environment: Environment,
    ) -> Self:
        """Read the rules; raises BlockError."""
        _check_constraints(options)
        rules = Rules(list(options.inject_error or ()), list(options.set_state or ()), [])
        if options.config:
            try:
                text = await environment.workers.run(read_text, options.config)
            except OSError as error:
                raise BlockError.from_os_error(
                    "Could not read blkdebug config file", error
                ) from error
            inject, change = parse_config(text)
            rules.inject += inject
            rules.change += change
        return cls(options, children["image"], rules)

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Those of the users, and what the options say."""
        del role
        assert isinstance(options, BlkdebugOptions)
        used |= _permissions(options.take_child_perms)
        return used, shared & ~_permissions(options.unshare_child_perms)

    @property
    def _armed(self) -> bool:
        return self._rules.armed or bool(self._options.max_transfer)

    # -- breakpoints

    def suspend(self, event: str, tag: str) -> None:
        """Stop the next request to which ``event`` happens; ENOENT for an unknown event."""
        if event not in BlkdebugEvent.__members__:
            raise OSError(ENOENT, os.strerror(ENOENT))
        self._rules.breaks.append((event, tag))

    def resume(self, tag: str) -> None:
        """Let a request that stands at the breakpoint ``tag`` go on; ENOENT if none does."""
        if not self._rules.resume(tag):
            raise OSError(ENOENT, os.strerror(ENOENT))

    def remove_break(self, tag: str) -> None:
        """Take a breakpoint away, and let all who stand there go on; ENOENT if there is none."""
        rules = self._rules
        known = any(found[1] == tag for found in rules.breaks)
        rules.breaks = [found for found in rules.breaks if found[1] != tag]
        if not rules.resume(tag, every=True) and not known:
            raise OSError(ENOENT, os.strerror(ENOENT))

    def is_suspended(self, tag: str) -> bool:
        """Whether a request stands at the breakpoint ``tag``."""
        return any(found[0] == tag for found in self._rules.suspended)

    def drain_begin(self) -> None:
        """All suspended requests go on."""
        for tag in {found[0] for found in self._rules.suspended}:
            self._rules.resume(tag, every=True)

    async def debug_event(self, name: str) -> None:
        """The driver above says that ``name`` happened; waits at a breakpoint."""
        if self._rules.needed:
            await self._rules.happen(name)

    # -- guest I/O

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The image's answer when there are no rules."""
        return None if self._armed else self.child.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """The image's answer when there are no rules."""
        return not self._armed and self.child.write_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """The image's answer when there are no rules."""
        return not self._armed and self.child.begin_write(offset, data, done)

    async def read(self, offset: int, length: int) -> Buffer:
        """Events: read_aio, or those of the table that is read."""
        most = self._options.max_transfer or length
        pieces = []
        for start in range(0, length, most) if length else (0,):
            part = min(most, length - start)
            await self._request(BlkdebugIOType.READ, offset + start, part)
            pieces.append(await self.child.read(offset + start, part))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def write(self, offset: int, data: Buffer) -> None:
        """Events: write_aio, or those of the table that is written; ``pwritev_rmw_*`` before it."""
        view = memoryview(data).cast("B")
        most = self._options.max_transfer or view.nbytes
        if (offset | view.nbytes) % self.request_alignment:
            await self._edges(offset, view.nbytes)
        if view.nbytes <= most:
            await self._request(BlkdebugIOType.WRITE, offset, view.nbytes)
            await self.child.write(offset, data)
            await self._done()
            return
        for start in range(0, view.nbytes, most):
            part = view[start : start + most]
            await self._request(BlkdebugIOType.WRITE, offset + start, part.nbytes)
            await self.child.write(offset + start, part)
            await self._done()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Events: pwritev_zero."""
        most = self._options.max_write_zero or length
        for start in range(0, length, most or 1):
            at, part = offset + start, min(most, length - start)
            await self._request(BlkdebugIOType.WRITE_ZEROES, at, part, blkdebug_events.ZERO_WRITE)
            await self.child.write_zeroes(at, part, may_unmap=may_unmap, fast_only=fast_only)
            await self._done()

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Events: write_compressed, write_aio."""
        events = ("write_compressed", "write_aio")
        await self._request(BlkdebugIOType.WRITE, offset, memoryview(data).nbytes, events)
        await super().write_compressed(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        """No event of its own."""
        most = self._options.max_discard or length
        for start in range(0, length, most or 1):
            part = min(most, length - start)
            await self._request(BlkdebugIOType.DISCARD, offset + start, part, ())
            await self.child.discard(offset + start, part)

    async def flush(self) -> None:
        """Events: flush_to_os; where something was written before also flush_to_disk, and fails."""
        if self._rules.needed and not self._written:
            await self._rules.happen(blkdebug_events.FLUSH[0])
        else:
            await self._request(BlkdebugIOType.FLUSH, 0, 0, blkdebug_events.FLUSH)
        self._written = False
        try:
            await self.child.flush()
        except BaseException:
            self._written = True
            raise

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Fails only by rules with iotype=block-status."""
        await self._request(BlkdebugIOType.BLOCK_STATUS, offset, length, ())
        return await self.child.map(offset, length)

    @property
    def sees_reads(self) -> bool:
        """While there are rules."""
        return self._armed

    def host_file(self) -> HostFile | None:
        """None while there are rules, which a job that copies by descriptor would pass by."""
        return None if self._armed else self.child.host_file()

    def limits(self) -> dict[str, int]:
        """The image's, and those of the options."""
        given = {
            "request-alignment": self._options.align,
            "max-transfer": self._options.max_transfer,
            "write-zeroes-alignment": self._options.opt_write_zero,
            "max-write-zeroes": self._options.max_write_zero,
            "discard-alignment": self._options.opt_discard,
            "max-discard": self._options.max_discard,
        }
        return super().limits() | {name: value for name, value in given.items() if value}

    async def _edges(self, offset: int, length: int) -> None:
        """Events and errors of reading what stands beside a write in its first and last block."""
        unit = self.request_alignment
        head, tail = offset % unit, -(offset + length) % unit
        names = [name for name, there in (("head", head), ("tail", tail)) if there]
        together = head + length + tail <= (2 * unit if head and tail else unit)
        start, size = offset - head, head + length + tail
        for part in [names] if together else [[name] for name in names]:
            for name in part:
                await self._rules.happen(f"pwritev_rmw_{name}")
            at = start + size - unit if part == ["tail"] and not together else start
            await self._request(BlkdebugIOType.READ, at, size if together else unit, ())
            for name in part:
                await self._rules.happen(f"pwritev_rmw_after_{name}")

    async def _done(self) -> None:
        if self._rules.needed:
            await self._rules.happen("pwritev_done")

    async def _request(
        self,
        iotype: BlkdebugIOType,
        offset: int,
        length: int,
        events: tuple[str, ...] | None = None,
    ) -> None:
        """Let the events of a request happen, then raise what a rule says."""
        rules = self._rules
        if not rules.needed:
            return
        if iotype in _CHANGES:
            self._written = True
        if events is None:
            found = await self._regions()
            events = blkdebug_events.events_of(
                found, offset, length, iotype is BlkdebugIOType.WRITE
            )
        for event in events:
            await rules.happen(event)
        rule = rules.check(iotype, offset, length)
        if rule is None:
            return
        if rule.delay_ns > 0:
            await asyncio.sleep(rule.delay_ns / 1e9)
        if rule.errno:
            raise OSError(rule.errno, os.strerror(rule.errno))

    async def _regions(self) -> tuple[blkdebug_events.Region, ...]:
        """Read anew each time: the tables grow and move, and speed is not what this is for."""
        image = self.child
        loaded: dict[tuple[int, int], bytes] = {}
        while True:
            # The pure function asks for one range after the other; each is fetched, then it is
            # asked again. Three or four rounds.
            wanted: list[tuple[int, int]] = []

            def read(offset: int, length: int, wanted: list[tuple[int, int]] = wanted) -> bytes:
                data = loaded.get((offset, length))
                if data is None:
                    wanted.append((offset, length))
                    return b""
                return data

            found = blkdebug_events.regions(read)
            if not wanted:
                return found
            for offset, length in wanted:
                end = min(offset + length, image.length)
                inside = max(end - offset, 0)
                loaded[offset, length] = bytes(await image.read(offset, inside)) if inside else b""


def _permissions(names: list[BlockPermission] | None) -> Permission:
    found = Permission.NONE
    for name in names or ():
        found |= Permission[name.name]
    return found


def _check_constraints(options: BlkdebugOptions) -> None:
    align = options.align or 0
    if align and (align < 0 or align >= _INT_MAX or align & (align - 1)):
        raise BlockError(f"Cannot meet constraints with align {align}")
    align = max(align, 1)
    for name, unit in (
        ("max-transfer", align),
        ("opt-write-zero", align),
        ("max-write-zero", max(align, options.opt_write_zero or 0)),
        ("opt-discard", align),
        ("max-discard", max(align, options.opt_discard or 0)),
    ):
        value = getattr(options, name.replace("-", "_")) or 0
        if value and (value < 0 or value >= _INT_MAX or value % unit):
            raise BlockError(f"Cannot meet constraints with {name} {value}")
