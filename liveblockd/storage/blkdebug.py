"""The driver ``blkdebug``: passes requests on to its ``image`` and lets chosen ones fail.

Specification: qapi/block-core.json, BlockdevOptionsBlkdebug; QEMU docs/devel/testing/blkdebug.

A rule waits for an event; when it comes the rule is active, and the next request of its type that
touches its sector fails. ``set-state`` rules change a number that other rules ask for. The events
are judged from the requests (``blkdebug_events``).

Runs on: the event loop. Invariants: with rules left no request is answered without passing them, so
``read_nowait``, ``write_nowait`` and ``host_file`` decline; without rules this is transparent.

Errors: ``OSError`` as told by the rules or by the image; ``BlockError`` from ``open``.
"""

from __future__ import annotations

import asyncio
import enum
import os
from dataclasses import dataclass
from errno import EIO
from typing import Self

from pydantic import Field

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel, parse
from liveblockd.storage import blkdebug_events
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Extent, HostFile
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

SECTOR = 512

# Names are values here; mypy knows the members from the one literal.
BlkdebugEvent = enum.StrEnum(
    "BlkdebugEvent",
    """
    l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update
    l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed
    write_aio write_compressed vmstate_load vmstate_save cow_read cow_write reftable_load
    reftable_grow reftable_update refblock_load refblock_update refblock_update_part refblock_alloc
    refblock_alloc_hookup refblock_alloc_write refblock_alloc_write_blocks
    refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes
    cluster_free flush_to_os flush_to_disk pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail
    pwritev_rmw_after_tail pwritev pwritev_zero pwritev_done empty_image_prepare
    l1_shrink_write_table l1_shrink_free_l2_clusters cor_write cluster_alloc_space none
    """,
)


class BlkdebugIOType(enum.StrEnum):
    """What a rule may be limited to."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


class BlockPermission(enum.StrEnum):
    """Accepted for take-child-perms and unshare-child-perms."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class BlkdebugInjectErrorOptions(QapiModel):
    """A rule that lets requests fail."""

    event: BlkdebugEvent
    state: int = 0
    iotype: BlkdebugIOType | None = None
    errno: int = EIO
    delay_ns: int = 0
    sector: int = -1
    once: bool = False
    immediately: bool = False


class BlkdebugSetStateOptions(QapiModel):
    """A rule that changes the state."""

    event: BlkdebugEvent
    state: int = 0
    new_state: int = Field(alias="new_state")  # QMP has it with the underscore


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


@dataclass(eq=False, slots=True)
class _Rules:
    """The rules that are left, the state, and which rules the last events made active."""

    inject: list[BlkdebugInjectErrorOptions]
    change: list[BlkdebugSetStateOptions]
    active: list[BlkdebugInjectErrorOptions]
    state: int = 1

    def event(self, name: str) -> None:
        """``name`` happened. Rules become active together; those of an earlier event end."""
        came = [r for r in self.inject if r.event == name and r.state in (0, self.state)]
        if came:
            self.active = came
        new_state = self.state
        for rule in self.change:
            if rule.event == name and rule.state in (0, self.state):
                new_state = rule.new_state
        self.state = new_state

    def check(
        self, iotype: BlkdebugIOType, offset: int, length: int
    ) -> BlkdebugInjectErrorOptions | None:
        """The rule that hits this request, taken out if it is for once."""
        for rule in self.active:
            if rule.iotype is None and iotype is BlkdebugIOType.BLOCK_STATUS:
                continue
            if rule.iotype not in (None, iotype):
                continue
            if rule.sector >= 0 and not offset <= rule.sector * SECTOR < offset + length:
                continue
            if rule.once:
                self.active = [r for r in self.active if r is not rule]
                self.inject = [r for r in self.inject if r is not rule]
            return rule
        return None


@register_driver
class Blkdebug(BlockDriver):
    """A filter over ``image``."""

    driver_name = "blkdebug"
    is_filter = True
    child_roles = ("image",)
    filtered = "image"
    Options = BlkdebugOptions

    def __init__(self, options: BlkdebugOptions, image: BlockIO, rules: _Rules) -> None:
        self.children: dict[str, BlockIO] = {"image": image}
        self.read_only = bool(options.read_only)
        self.request_alignment = options.align or 1
        self._rules = rules
        rules.event("none")

    @classmethod
    async def open(
        cls, options: BlkdebugOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Read the rules; raises BlockError."""
        align = options.align or 0
        if align and (align < 0 or align >= 1 << 31 or align & (align - 1)):
            raise BlockError(f"Cannot meet constraints with align {align}")
        rules = _Rules(list(options.inject_error or ()), list(options.set_state or ()), [])
        if options.config:
            try:
                text = await environment.workers.run(_read_text, options.config)
            except OSError as error:
                raise BlockError.from_os_error(
                    "Could not read blkdebug config file", error
                ) from error
            inject, change = parse_config(text)
            rules.inject += inject
            rules.change += change
        return cls(options, children["image"], rules)

    @property
    def _image(self) -> BlockIO:
        return self.children["image"]

    @property
    def _armed(self) -> bool:
        return bool(self._rules.inject)

    @property
    def length(self) -> int:
        """That of the image."""
        return self._image.length

    # -- guest I/O

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The image's answer when there are no rules."""
        return None if self._armed else self._image.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """The image's answer when there are no rules."""
        return not self._armed and self._image.write_nowait(offset, data)

    async def read(self, offset: int, length: int) -> Buffer:
        """Events: read_aio, or those of the table that is read."""
        await self._request(BlkdebugIOType.READ, offset, length)
        return await self._image.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """Events: write_aio, or those of the table that is written."""
        await self._request(BlkdebugIOType.WRITE, offset, memoryview(data).nbytes)
        await self._image.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Events: write_aio, pwritev_zero."""
        await self._request(BlkdebugIOType.WRITE_ZEROES, offset, length, blkdebug_events.ZERO_WRITE)
        await self._image.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    async def discard(self, offset: int, length: int) -> None:
        """No event of its own."""
        await self._request(BlkdebugIOType.DISCARD, offset, length, ())
        await self._image.discard(offset, length)

    async def flush(self) -> None:
        """Events: flush_to_os, flush_to_disk."""
        await self._request(BlkdebugIOType.FLUSH, 0, 0, blkdebug_events.FLUSH)
        await self._image.flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Fails only by rules with iotype=block-status."""
        await self._request(BlkdebugIOType.BLOCK_STATUS, offset, length, ())
        return await self._image.map(offset, length)

    async def truncate(self, length: int) -> None:
        """Passed on."""
        await self._image.truncate(length)

    def host_file(self) -> HostFile | None:
        """None while there are rules, which a job that copies by descriptor would pass by."""
        return None if self._armed else self._image.host_file()

    async def _request(
        self,
        iotype: BlkdebugIOType,
        offset: int,
        length: int,
        events: tuple[str, ...] | None = None,
    ) -> None:
        """Let the events of a request happen, then raise what a rule says."""
        rules = self._rules
        if not rules.inject and not rules.change:
            return
        if events is None:
            found = await self._regions()
            events = blkdebug_events.events_of(
                found, offset, length, iotype is BlkdebugIOType.WRITE
            )
        for event in events:
            rules.event(event)
        rule = rules.check(iotype, offset, length)
        if rule is None:
            return
        if rule.delay_ns > 0:
            await asyncio.sleep(rule.delay_ns / 1e9)
        if rule.errno:
            raise OSError(rule.errno, os.strerror(rule.errno))

    async def _regions(self) -> tuple[blkdebug_events.Region, ...]:
        """Read anew each time: the tables grow and move, and speed is not what this is for."""
        image = self._image
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


def _read_text(filename: str) -> str:
    with open(filename, encoding="utf-8", errors="replace") as file:
        return file.read()


def parse_config(
    text: str,
) -> tuple[list[BlkdebugInjectErrorOptions], list[BlkdebugSetStateOptions]]:
    """Rules of a file of ``[inject-error]`` and ``[set-state]`` sections; raises BlockError."""
    sections: list[tuple[str, dict[str, str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            sections.append((line[1:-1].strip(), {}))
            continue
        key, equals, value = line.partition("=")
        if not equals or not sections:
            raise BlockError(f"Could not parse blkdebug config file: line {number}")
        sections[-1][1][key.strip()] = value.strip().strip('"')
    inject, change = [], []
    for name, members in sections:
        if name == "inject-error":
            inject.append(parse(BlkdebugInjectErrorOptions, members, keyval=True))
        elif name == "set-state":
            change.append(parse(BlkdebugSetStateOptions, members, keyval=True))
        else:
            raise BlockError(f"There is no option group '{name}'")
    return inject, change
