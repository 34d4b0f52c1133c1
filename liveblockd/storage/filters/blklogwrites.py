"""The driver ``blklogwrites``: every write, flush and discard is kept in a log, in order.

Specification: qapi/block-core.json, BlockdevOptionsBlklogwrites; ``write_log`` for the format,
which the tools of dm-log-writes replay: what a disk held after any of its writes.

Runs on: the event loop. Invariants: a request is logged when the file has it, and answered when
both have; entries are written one after the other, so that the superblock never counts one that is
not there. Requests are whole sectors of the log (``whole_units``).

Errors: those of the file and of the log; BlockError from ``open``.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Self

from liveblockd.errors import BlockError
from liveblockd.qapi import UInt32, UInt64
from liveblockd.storage.driver import BlockIO, Buffer, Permission
from liveblockd.storage.filters.whole_units import WholeUnits
from liveblockd.storage.filters.write_log import (
    ENTRY_SIZE,
    NO_FLAGS,
    SUPERBLOCK_SIZE,
    Entry,
    EntryFlag,
    Superblock,
    check_sector_size,
)
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

SECTOR: Final = 512
#: entries after which the superblock is written without a flush
INTERVAL: Final = 4096
_STORAGE: Final = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE

log = logging.getLogger(__name__)


class BlklogwritesOptions(BlockdevOptions):
    """Members of ``blockdev-add``; bytes, and entries for the interval."""

    file: BlockdevRef
    log: BlockdevRef
    log_sector_size: UInt32 | None = None
    log_append: bool | None = None
    log_super_update_interval: UInt64 | None = None


@register_driver
class Blklogwrites(WholeUnits):
    """A filter over ``file`` that writes to ``log`` as well."""

    driver_name = "blklogwrites"
    child_roles = ("file", "log")
    Options = BlklogwritesOptions

    def __init__(
        self,
        children: dict[str, BlockIO],
        superblock: Superblock,
        position: int,
        *,
        interval: int = INTERVAL,
        read_only: bool = False,
    ) -> None:
        super().__init__(children, read_only=read_only)
        self._sector = superblock.sector_size
        self._entries = superblock.entries
        #: the next free sector of the log
        self._position = position
        self._interval = interval
        self._known = superblock.entries
        self._appending = asyncio.Lock()
        #: whether there are entries behind that of the last flush
        self._changed = False

    @classmethod
    async def open(
        cls,
        options: BlklogwritesOptions,  # type: ignore[override]
        children: dict[str, BlockIO],
        environment: Environment,  # noqa: ARG003
    ) -> Self:
        """Find the end of a log that is to be continued; BlockError."""
        given = options.log_sector_size
        interval = options.log_super_update_interval
        if interval == 0:
            raise BlockError("Invalid log superblock update interval 0")
        if options.log_append:
            if given is not None:
                raise BlockError("log-append and log-sector-size are mutually exclusive")
            superblock, position = await _find_end(children["log"])
        else:
            superblock, position = Superblock(0, SECTOR if given is None else given), 1
            check_sector_size(superblock.sector_size)
        return cls(
            children,
            superblock,
            position,
            interval=interval or INTERVAL,
            read_only=bool(options.read_only),
        )

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """The log is this driver's alone."""
        if role != "log":
            return used, shared
        needed = Permission.CONSISTENT_READ if options.read_only else _STORAGE
        return needed, Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED

    @property
    def unit(self) -> int:
        """A sector of the log."""
        return self._sector

    async def store(self, offset: int, data: Buffer) -> None:
        """To the file, then to the log."""
        await self.child.write(offset, data)
        await self._append(offset, len(data), data)

    async def zero(self, offset: int, length: int, may_unmap: bool, fast_only: bool) -> None:
        """To the file, then to the log: with zeros, for the log knows no other way."""
        await self.child.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        await self._append(offset, length, None)

    async def drop(self, offset: int, length: int) -> None:
        """To the file, then to the log."""
        await self.child.discard(offset, length)
        await self._append(offset, length, None, EntryFlag.DISCARD)

    async def flush(self) -> None:
        """The file, then the log with an entry of it, unless nothing came since the last one."""
        changed, self._changed = self._changed, False
        try:
            await self.child.flush()
            if changed and not self.read_only:
                await self._append(0, 0, None, EntryFlag.FLUSH)
        except BaseException:
            self._changed = changed or self._changed
            raise

    async def close(self) -> None:
        """Flush, with an entry of it, and let the superblock count all entries."""
        try:
            await super().close()
        finally:
            if self._known != self._entries:
                try:
                    await self._write_superblock()
                except OSError as error:
                    log.warning("the superblock of a log of writes was not written: %s", error)

    async def _append(
        self, offset: int, length: int, data: Buffer | None, flags: EntryFlag = NO_FLAGS
    ) -> None:
        size = self._sector
        entry = Entry(offset // size, -(-length // size), flags)
        async with self._appending:
            at = self._position * size
            if data is None:
                await self.children["log"].write(at, entry.pack(size))
                if entry.log_sectors > 1:
                    zeros = (entry.log_sectors - 1) * size
                    await self.children["log"].write_zeroes(at + size, zeros)
            else:
                padded = entry.pack(size) + bytes(data)
                padded = padded.ljust(entry.log_sectors * size, b"\0")
                await self.children["log"].write(at, padded)
            self._position += entry.log_sectors
            self._entries += 1
            self._changed |= not flags & EntryFlag.FLUSH
            if flags & EntryFlag.FLUSH or self._entries - self._known >= self._interval:
                await self._write_superblock()

    async def _write_superblock(self) -> None:
        entries = self._entries
        await self.children["log"].write(0, Superblock(entries, self._sector).pack())
        await self.children["log"].flush()
        self._known = entries


async def _find_end(file: BlockIO) -> tuple[Superblock, int]:
    """The superblock, and the sector behind the last entry."""
    if not file.length:
        return Superblock(0, SECTOR), 1
    try:
        superblock = Superblock.unpack(await _read(file, 0, SUPERBLOCK_SIZE))
    except OSError as error:
        raise BlockError.from_os_error("Could not read log superblock", error) from error
    position = 1
    for number in range(superblock.entries):
        try:
            data = await _read(file, position * superblock.sector_size, ENTRY_SIZE)
        except OSError as error:
            raise BlockError.from_os_error(f"Failed to read log entry {number}", error) from error
        position += Entry.unpack(data, number).log_sectors
    return superblock, position


async def _read(file: BlockIO, offset: int, length: int) -> bytes:
    if offset + length > file.length:
        raise OSError(5, "Input/output error")
    return bytes(await file.read(offset, length))
