"""A connection to an NBD server: requests go out as they come, replies come back in any order.

Specification: NBD doc/proto.md, "Transmission". Runs on the event loop. Invariants:

* Every request gets one answer: that of the server, or ``ConnectionLostError`` when the connection
  has ended; ``nbd_link`` knows what can be done then.
* Nothing a server sends is believed: lengths and offsets lie inside the request they answer.

Errors: OSError of ``request``; BlockError from ``connect``.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from errno import EIO
from os import strerror
from typing import Final, NamedTuple, cast

from liveblockd.errors import BlockError
from liveblockd.nbd.client import ClientNegotiation, RefusedError, RemoteExport
from liveblockd.nbd.constants import BASE_ALLOCATION, ChunkType, Command
from liveblockd.nbd.errno import host_errno
from liveblockd.nbd.transmission import (
    Chunk,
    ProtocolError,
    Request,
    SimpleReply,
    parse_reply,
)
from liveblockd.qapi.sockets import InetSocketAddress, PlainAddress, UnixSocketAddress
from liveblockd.storage.driver import Buffer

#: bytes that may wait to be sent before requests wait
HIGH_WATER: Final = 8 << 20
#: seconds to connect and to negotiate
CONNECT_TIMEOUT: Final = 30.0


class Answer:
    """A request that waits, and what came of it."""

    __slots__ = ("command", "data", "error", "extents", "future", "length", "lost", "offset")

    def __init__(self, command: int, offset: int, length: int) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.data = bytearray(length) if command == Command.READ else bytearray()
        self.extents: list[tuple[int, int]] = []
        self.error = 0
        self.lost = False


class ConnectionLostError(OSError):
    """There is no answer, and will be none."""


class ClientTls(NamedTuple):
    """How to speak TLS, and to whom; the name is that of the server's certificate, or empty."""

    context: ssl.SSLContext
    hostname: str


class NbdConnection(asyncio.Protocol):
    """Made by ``connect``."""

    def __init__(
        self, name: str, tls: ClientTls | None = None, context: str = BASE_ALLOCATION
    ) -> None:
        negotiation = ClientNegotiation(name, tls=tls is not None, context=context)
        self._negotiation: ClientNegotiation | None = negotiation
        self._tls = tls
        self._upgrade: asyncio.Task[None] | None = None
        self.negotiated: asyncio.Future[RemoteExport] = asyncio.get_running_loop().create_future()
        self.lost = False
        self.why_lost = ""
        #: the connection was ended for what the server sent
        self.broke_protocol = False
        #: called once when the connection has ended, before those who wait know
        self.on_lost: Callable[[], None] | None = None
        self._export: RemoteExport = None  # type: ignore[assignment]
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._buffer = bytearray()
        self._waiting: dict[int, Answer] = {}
        self._cookie = 0
        self._heard = 0.0  # seconds of the loop's clock
        self._unsent = 0  # bytes
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: of a simple reply to a READ, whose data is still to come
        self._plain: Answer | None = None

    # -- requests

    async def request(
        self, command: Command, offset: int, length: int, *, flags: int = 0, data: Buffer = b""
    ) -> Answer:
        """Ask and wait for the answer; raises OSError with what the server said."""
        if not self._may_send.is_set():
            await self._may_send.wait()
        if self.lost:
            raise ConnectionLostError(EIO, strerror(EIO))
        if not self._waiting:
            self._heard = asyncio.get_running_loop().time()
        self._cookie += 1
        cookie = self._cookie
        answer = self._waiting[cookie] = Answer(command, offset, length)
        header = Request(flags, command, cookie, offset, length).to_bytes()
        if len(data):
            self._transport.writelines((header, data))
        else:
            self._transport.write(header)
        # Not cancelled with who waits: the server goes on with it, and data may not change.
        await asyncio.shield(answer.future)
        if answer.lost:
            raise ConnectionLostError(EIO, strerror(EIO))
        if answer.error:
            code = host_errno(answer.error)
            raise OSError(code, strerror(code))
        return answer

    async def close(self) -> None:
        """Say goodbye; requests under way are lost."""
        if not self.lost:
            self._transport.write(Request(0, Command.DISC, 0, 0, 0).to_bytes())
            self._transport.close()
        try:
            # not wait_for, which may swallow a cancel
            async with asyncio.timeout(5):
                await asyncio.shield(self._closed)
        except TimeoutError:
            self._transport.abort()

    async def finish(self) -> None:
        """Return when every request has been answered and the connection has ended."""
        while not self.lost and (answers := [a.future for a in self._waiting.values()]):
            await asyncio.wait(answers)
        await self.close()

    def abort(self) -> None:
        """End it at once."""
        self._end("given up")
        self._transport.abort()

    def silence(self) -> float:
        """Seconds for which a server has neither answered nor taken what it was sent; to be asked
        now and then, for that is when it is looked at.
        """
        if self.lost or not self._waiting:
            return 0.0
        now = asyncio.get_running_loop().time()
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._heard = now
        self._unsent = unsent
        return now - self._heard

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let as much wait as a few large requests are."""
        # uvloop's are no subclass of it
        self._transport = transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(HIGH_WATER)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pause_writing(self) -> None:
        """Too much waits."""
        self._may_send.clear()

    def resume_writing(self) -> None:
        """It is gone."""
        self._may_send.set()

    def data_received(self, data: bytes) -> None:
        """Greeting, options, replies."""
        try:
            self._heard = asyncio.get_running_loop().time()
            if self._negotiation is not None:
                self._negotiate(data)
            else:
                self._buffer += data
                self._replies()
        except (ProtocolError, RefusedError) as error:
            self.broke_protocol = True
            self._end(str(error))
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """All who wait get EIO."""
        self._end(str(error or "the server closed the connection"))
        if not self._closed.done():
            self._closed.set_result(None)

    def _end(self, reason: str) -> None:
        if self.lost:
            return
        self.lost, self.why_lost = True, reason
        self._may_send.set()
        if not self.negotiated.done():
            self.negotiated.set_exception(BlockError(reason, errno=EIO))
        if self.on_lost is not None:
            self.on_lost()
        waiting, self._waiting = self._waiting, {}
        for answer in (*waiting.values(), *((self._plain,) if self._plain is not None else ())):
            if not answer.future.done():
                answer.lost = True
                answer.future.set_result(None)

    # -- what comes in

    def _negotiate(self, data: bytes) -> None:
        assert self._negotiation is not None
        if out := self._negotiation.feed(data):
            self._transport.write(out)
        if self._negotiation.wants_tls:
            self._upgrade = asyncio.get_running_loop().create_task(self._start_tls())
        if self._negotiation.export is not None:
            self._export = self._negotiation.export
            self._buffer += self._negotiation.rest
            self._negotiation = None
            if not self.negotiated.done():
                self.negotiated.set_result(self._export)
            self._replies()

    async def _start_tls(self) -> None:
        assert self._tls is not None and self._negotiation is not None
        try:
            secure = await asyncio.get_running_loop().start_tls(
                self._transport, self, self._tls.context, server_hostname=self._tls.hostname or None
            )
        except (OSError, ssl.CertificateError) as error:
            self._end(f"TLS handshake failed: {error}")
            self._transport.abort()
            if not self._closed.done():
                self._closed.set_result(None)
            return
        if secure is None or self.lost:
            if secure is not None:
                secure.abort()
            self._end("the server closed the connection")
            return
        self._transport = secure
        secure.set_write_buffer_limits(HIGH_WATER)
        secure.write(self._negotiation.secured())

    def _replies(self) -> None:
        position = 0
        buffer = self._buffer
        while True:
            if self._plain is not None:
                answer = self._plain
                if len(buffer) - position < answer.length:
                    break
                answer.data[:] = buffer[position : position + answer.length]
                position += answer.length
                self._plain = None
                self._finish(answer)
                continue
            found = parse_reply(buffer, position)
            if found is None:
                break
            reply, position = found
            if isinstance(reply, SimpleReply):
                self._simple(reply)
            else:
                self._chunk(reply)
        if position:
            del buffer[:position]

    def _simple(self, reply: SimpleReply) -> None:
        answer = self._waiting.get(reply.cookie)
        if answer is None:
            raise ProtocolError("a reply to nothing")
        reading = answer.command in (Command.READ, Command.BLOCK_STATUS)
        if reading and not reply.error and self._export.structured:
            raise ProtocolError("a simple reply where chunks were agreed on")
        del self._waiting[reply.cookie]
        answer.error = reply.error
        if answer.command == Command.READ and not reply.error:
            self._plain = answer
        else:
            self._finish(answer)

    def _chunk(self, chunk: Chunk) -> None:
        answer = self._waiting.get(chunk.cookie)
        if answer is None:
            raise ProtocolError("a chunk of a reply to nothing")
        try:
            self._take(answer, chunk)
        except (ValueError, struct.error) as error:
            raise ProtocolError(f"a bad chunk: {error}") from error
        if chunk.done:
            del self._waiting[chunk.cookie]
            if answer.command == Command.BLOCK_STATUS and not (answer.extents or answer.error):
                answer.error = EIO
            self._finish(answer)

    def _take(self, answer: Answer, chunk: Chunk) -> None:
        kind = chunk.type
        if kind >> 15:
            if len(chunk.payload) < 4:
                raise ProtocolError("a short error")
            answer.error = answer.error or int.from_bytes(chunk.payload[:4], "big") or EIO
        elif kind == ChunkType.OFFSET_DATA and answer.command == Command.READ:
            if len(chunk.payload) < 8:
                raise ProtocolError("data without an offset")
            offset = int.from_bytes(chunk.payload[:8], "big") - answer.offset
            length = len(chunk.payload) - 8
            _check_inside(answer, offset, length)
            answer.data[offset : offset + length] = memoryview(chunk.payload)[8:]
        elif kind == ChunkType.OFFSET_HOLE and answer.command == Command.READ:
            if len(chunk.payload) != 12:
                raise ProtocolError("a hole of another size")
            offset, length = chunk.hole()
            _check_inside(answer, offset - answer.offset, length)  # zeros are there already
        elif kind == ChunkType.BLOCK_STATUS and answer.command == Command.BLOCK_STATUS:
            if len(chunk.payload) < 12 or len(chunk.payload) % 8 != 4:
                raise ProtocolError("a bad block status")
            context, extents = chunk.extents()
            if context == self._export.allocation:
                answer.extents = extents
        elif kind != ChunkType.NONE:
            raise ProtocolError(f"a chunk of type {kind}")

    @staticmethod
    def _finish(answer: Answer) -> None:
        if not answer.future.done():
            answer.future.set_result(None)


def _check_inside(answer: Answer, offset: int, length: int) -> None:
    if offset < 0 or offset + length > answer.length:
        raise ProtocolError("data that nobody asked for")


async def connect(
    address: PlainAddress,
    name: str,
    tls: ClientTls | None = None,
    context: str = BASE_ALLOCATION,
) -> tuple[NbdConnection, RemoteExport]:
    """Connect and choose export ``name``; BlockError in QEMU's words.

    ``context`` is what BLOCK_STATUS is to tell of.
    """
    loop = asyncio.get_running_loop()
    connection: NbdConnection | None = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            if isinstance(address, UnixSocketAddress):
                path = "\0" + address.path if address.abstract else address.path
                try:
                    _, connection = await loop.create_unix_connection(
                        lambda: NbdConnection(name, tls, context), path
                    )
                except OSError as error:
                    raise BlockError.from_os_error(
                        f"Failed to connect to '{address.path}'", error
                    ) from error
            elif isinstance(address, InetSocketAddress):
                try:
                    _, connection = await loop.create_connection(
                        lambda: NbdConnection(name, tls, context), address.host, int(address.port)
                    )
                except OSError as error:
                    raise BlockError.from_os_error(
                        f"Failed to connect to '{address.host}:{address.port}'", error
                    ) from error
            else:
                raise BlockError("Only inet and unix addresses are supported")
            export = await connection.negotiated
    except BaseException as error:
        if connection is not None:
            connection.abort()
        if isinstance(error, TimeoutError):
            raise BlockError("The NBD server does not answer", errno=EIO) from error
        raise
    return connection, export
