"""The driver ``nbd``: a disk that an NBD server exports.

Specification: qapi/block-core.json, BlockdevOptionsNbd; NBD doc/proto.md. Runs on the event loop.

What becomes of a server that goes away, and comes back, is ``nbd_link``'s affair.
Requests that are not multiples of the server's smallest block are widened here.

Errors: BlockError from ``open``; OSError of the I/O.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from errno import EIO, ENOTSUP, EPERM
from os import strerror
from typing import Any, Final, Self

from liveblockd.errors import BlockError
from liveblockd.nbd.client import RemoteExport
from liveblockd.nbd.constants import (
    BASE_ALLOCATION,
    MAX_STRING,
    STATE_HOLE,
    STATE_ZERO,
    Command,
    CommandFlag,
    TransmissionFlag,
)
from liveblockd.qapi import UInt32
from liveblockd.qapi.sockets import InetSocketAddress, SocketAddress
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Extent, ExtentKind
from liveblockd.storage.nbd_connection import Answer, ClientTls, NbdConnection, connect
from liveblockd.storage.nbd_link import NbdLink
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver
from liveblockd.storage.serialise import Serialiser

#: bytes of one request without data
MOST: Final = 1 << 30
#: bytes of data in one request: several are under way at a time
DATA: Final = 2 << 20
#: seconds between two tries to connect
AGAIN: Final = 0.2
#: seconds for which a server may say nothing while the node is being closed
PATIENCE: Final = 10.0


class NbdOptions(BlockdevOptions):
    """Members of ``blockdev-add``; times in seconds."""

    server: SocketAddress
    export: str | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    x_dirty_bitmap: str | None = None
    reconnect_delay: UInt32 | None = None
    open_timeout: UInt32 | None = None


@register_driver
class NbdDriver(BlockDriver):
    """One export."""

    driver_name = "nbd"
    Options = NbdOptions

    def __init__(self, options: NbdOptions, link: NbdLink) -> None:
        export = link.export
        self.children: dict[str, BlockIO] = {}
        self.read_only = bool(options.read_only)
        self._link = link
        self._export: RemoteExport = export
        self._serialiser = Serialiser()
        self._unit = export.minimum_block
        self.request_alignment = self._unit
        self._data_unit = max(self._unit, min(DATA, export.maximum_payload))
        #: block status is that of another context than base:allocation
        self._shows_bitmap = options.x_dirty_bitmap is not None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        options: NbdOptions,
        children: dict[str, BlockIO],
        environment: Environment,
    ) -> Self:
        """Connect; raises BlockError."""
        assert not children
        bitmap = options.x_dirty_bitmap
        if bitmap is not None and len(bitmap.encode()) > MAX_STRING:
            raise BlockError(f"x-dirty-bitmap {bitmap} too long to send to server")
        address = options.server.plain()
        if isinstance(address, InetSocketAddress) and not address.port.isdecimal():
            raise BlockError(f"address resolution failed for port '{address.port}'")
        tls = None
        if options.tls_creds is not None:
            host = address.host if isinstance(address, InetSocketAddress) else ""
            name = options.tls_hostname or host
            context = environment.tls_client(options.tls_creds, bool(name))
            tls = ClientTls(context, name)

        def dial() -> Coroutine[Any, Any, tuple[NbdConnection, RemoteExport]]:
            return connect(address, options.export or "", tls, bitmap or BASE_ALLOCATION)

        deadline = asyncio.get_running_loop().time() + (options.open_timeout or 0)
        while True:
            try:
                connection, export = await dial()
            except BlockError:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
                await asyncio.sleep(AGAIN)
            else:
                break
        if bitmap is not None and export.allocation is None:
            await connection.close()
            raise BlockError(f"requested x-dirty-bitmap {bitmap} not found")
        if export.read_only and not options.read_only:
            if not options.auto_read_only:
                await connection.close()
                raise BlockError("request on denied for read-only export", errno=EPERM)
            options = options.model_copy(update={"read_only": True})
        return cls(options, NbdLink(connection, export, dial, delay=options.reconnect_delay or 0))

    @property
    def length(self) -> int:
        """What the server said."""
        return self._export.size

    # -- guest I/O

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes."""
        start, end = self._widened(offset, offset + length)
        data = await self._read(start, end - start)
        return (
            data if (start, end) == (offset, offset + length) else data[offset - start :][:length]
        )

    async def _read(self, offset: int, length: int) -> bytearray:
        parts = list(self._pieces(offset, length, self._data_unit))
        if len(parts) == 1:
            return (await self._link.request(Command.READ, offset, length)).data
        answers = await asyncio.gather(*(self._link.request(Command.READ, *part) for part in parts))
        return bytearray().join(answer.data for answer in answers)

    async def write(self, offset: int, data: Buffer) -> None:
        """Store; durable after ``flush``."""
        self._check_writable()
        end = offset + len(data)
        if offset % self._unit == 0 and (end % self._unit == 0 or end == self.length):
            section = await self._serialiser.enter(offset, end, exclusive=False)
            try:
                await self._write(offset, data)
            finally:
                self._serialiser.leave(section)
            return
        start, stop = self._widened(offset, end)
        section = await self._serialiser.enter(start, stop, exclusive=True)
        try:
            whole = await self._read(start, stop - start)
            whole[offset - start : end - start] = data
            await self._write(start, whole)
        finally:
            self._serialiser.leave(section)

    async def _write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        await _all(
            [
                self._link.request(
                    Command.WRITE, start, count, data=view[start - offset : start - offset + count]
                )
                for start, count in self._pieces(offset, len(data), self._data_unit)
            ]
        )

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """By the server where it can, else by writing zeros."""
        self._check_writable()
        can = self._export.flags & TransmissionFlag.SEND_WRITE_ZEROES
        can_fast = can and self._export.flags & TransmissionFlag.SEND_FAST_ZERO
        end = offset + length
        start = -(-offset // self._unit) * self._unit
        stop = end if end == self.length else end // self._unit * self._unit
        if fast_only and not can_fast:
            raise OSError(ENOTSUP, strerror(ENOTSUP))
        if not can or start >= stop:
            await self._write_zeros(offset, length)
            return
        flags = 0 if may_unmap else CommandFlag.NO_HOLE
        if fast_only:
            flags |= CommandFlag.FAST_ZERO
        section = await self._serialiser.enter(start, stop, exclusive=False)
        try:
            await _all(
                [
                    self._link.request(Command.WRITE_ZEROES, at, count, flags=flags)
                    for at, count in self._pieces(start, stop - start, MOST)
                ]
            )
        finally:
            self._serialiser.leave(section)
        await self._write_zeros(offset, start - offset)
        await self._write_zeros(stop, end - stop)

    async def _write_zeros(self, offset: int, length: int) -> None:
        for start, count in self._pieces(offset, length, self._data_unit):
            await self.write(start, bytes(count))

    async def discard(self, offset: int, length: int) -> None:
        """Whole blocks only, if the server takes it."""
        self._check_writable()
        if not self._export.flags & TransmissionFlag.SEND_TRIM:
            return
        start = -(-offset // self._unit) * self._unit
        stop = (offset + length) // self._unit * self._unit
        section = await self._serialiser.enter(start, max(start, stop), exclusive=False)
        try:
            for at, count in self._pieces(start, stop - start, MOST):
                await self._link.request(Command.TRIM, at, count)
        finally:
            self._serialiser.leave(section)

    async def flush(self) -> None:
        """What was written is durable, as far as the server knows."""
        if self._export.flags & TransmissionFlag.SEND_FLUSH and not self.read_only:
            await self._link.request(Command.FLUSH, 0, 0)

    async def map(self, offset: int, length: int) -> list[Extent]:
        """What the server says of base:allocation; all is data where it says nothing.

        With ``x-dirty-bitmap`` what is dirty is MARKED: jobs read it as they read all else.
        """
        if self._export.allocation is None or not length:
            return [Extent(length, ExtentKind.DATA, offset)]
        start, end = self._widened(offset, offset + min(length, MOST))
        answer = await self._link.request(Command.BLOCK_STATUS, start, end - start)
        extents: list[Extent] = []
        position, limit = start, min(end, offset + length)
        for count, state in answer.extents:
            # The last one may go on behind what was asked for.
            first, last = max(position, offset), min(position + count, limit)
            position += count
            if count <= 0 or first >= last:
                continue
            kind = ExtentKind.ZERO if state & STATE_ZERO else ExtentKind.DATA
            if self._shows_bitmap:
                kind = ExtentKind.MARKED if state & STATE_HOLE else ExtentKind.DATA
            host_offset = first if kind is ExtentKind.DATA else -1
            extents.append(Extent(last - first, kind, host_offset))
        return extents or [Extent(length, ExtentKind.DATA, offset)]

    # -- management

    async def truncate(self, length: int) -> None:
        """A server's affair."""
        if length != self.length:
            raise BlockError("Cannot resize NBD nodes", errno=ENOTSUP)

    async def set_read_only(self, read_only: bool) -> None:
        """Refused by a server that exports for reading only."""
        if not read_only and self._export.read_only:
            raise BlockError("request on denied for read-only export", errno=EPERM)
        if read_only:
            await self.flush()
        self.read_only = read_only

    async def close(self) -> None:
        """Flush and say goodbye."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._link.end_patience()
        try:
            if not self._link.lost:
                flush = asyncio.create_task(self.flush())
                while not (await asyncio.wait((flush,), timeout=AGAIN))[0]:
                    self._link.cut_off(PATIENCE)
                await flush
            elif self._link.dirty:
                raise OSError(EIO, "the NBD server is gone, with what it had not flushed")
        finally:
            await self._link.close()

    def silence(self) -> float:
        """Also of a server that is lost, while requests wait for it."""
        return self._link.silence()

    def stop_waiting(self, silence: float | None = None) -> None:
        """For a server that is gone, or does not answer."""
        self._link.stop_waiting()
        if silence is not None:
            self._link.cut_off(silence)

    # -- inside

    def _widened(self, start: int, end: int) -> tuple[int, int]:
        unit = self._unit
        return start // unit * unit, min(-(-end // unit) * unit, self.length)

    @staticmethod
    def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
        end = offset + length
        while offset < end:
            part = min(most, end - offset)
            yield offset, part
            offset += part

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, strerror(EPERM))


async def _all(requests: Sequence[Coroutine[Any, Any, Answer]]) -> None:
    """Await all to their ends, and raise the first error then: none is under way after that."""
    results = await asyncio.gather(*requests, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
