"""The rules of ``blkdebug``: which requests fail, which stop, and how events change the state.

Specification: qapi/block-core.json, BlkdebugInjectErrorOptions, BlkdebugSetStateOptions; QEMU
docs/devel/testing/blkdebug for the configuration file.

Runs on: the event loop (a request that stands at a breakpoint is a future). Invariant: a breakpoint
stops one request, and is gone then; a suspended request that is cancelled leaves no trace.

Errors: BlockError from ``parse_config``.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from errno import EIO

from pydantic import Field

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel, parse

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


@dataclass(eq=False, slots=True)
class Rules:
    """The rules that are left, the state, and which rules the last events made active."""

    inject: list[BlkdebugInjectErrorOptions]
    change: list[BlkdebugSetStateOptions]
    active: list[BlkdebugInjectErrorOptions]
    state: int = 1
    #: (event, tag) of breakpoints that nothing has run into yet
    breaks: list[tuple[str, str]] = field(default_factory=list)
    #: requests that stand at a breakpoint: tag, and what wakes them
    suspended: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)

    @property
    def armed(self) -> bool:
        """Whether a request can be failed or stopped."""
        return bool(self.inject or self.breaks)

    @property
    def needed(self) -> bool:
        """Whether events make any difference."""
        return bool(self.inject or self.change or self.breaks)

    async def happen(self, name: str) -> None:
        """``name`` happened to a request; stands here if there is a breakpoint."""
        self.event(name)
        tags = [tag for event, tag in self.breaks if event == name]
        self.breaks = [found for found in self.breaks if found[0] != name]
        for tag in tags:
            entry = (tag, asyncio.get_running_loop().create_future())
            self.suspended.append(entry)
            try:
                await entry[1]
            finally:
                if entry in self.suspended:
                    self.suspended.remove(entry)

    def resume(self, tag: str, *, every: bool = False) -> bool:
        """Let the first (or ``every``) request that stands at ``tag`` go on; whether one did."""
        found = [entry for entry in self.suspended if entry[0] == tag]
        for entry in found if every else found[:1]:
            self.suspended.remove(entry)
            if not entry[1].done():
                entry[1].set_result(None)
        return bool(found)

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


def read_text(filename: str) -> str:
    """A configuration file; on a worker."""
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
