"""One client of the NBD server: bytes in, requests to the backend, replies out.

Specification: NBD doc/proto.md, "Transmission"; the rules are in ``nbd/``, this is the shell.

Runs on the loop, on the request path: no coroutine, no copy and no call that waits where the
backend answers at once. What comes in one wake-up is done in one round and answered with one
``writelines``, or two; the rest becomes tasks.

* The payload of a large WRITE is stored while it comes (``nbd_payload``), or read from the socket
  into the buffer that is handed to the backend. A small one is handed over where it stands
  (``write_nowait``) or copied into a task.
* At most ``MAX_REQUESTS`` requests and ``MAX_BYTES`` bytes are in flight; then, and while the
  client does not read its replies, nothing more is read from it.
* Replies go to the socket at once, past the transport, as long as that has nothing to send; and
  where requests come one by one the next is looked for before the loop sleeps (``polling``).
  What is received so, and what the transport receives, takes the same way. Nobody else waits for
  longer than ``nbd_looking.TURN``: then the loop goes round once.
* A request that was begun is ended whatever becomes of the client; the connection leaves the
  clients of its export only after that. No task of a request is ever cancelled from here.

Errors: none escape; an ``OSError`` of the backend is answered, any other exception is logged and
answered with EIO, a client out of step is disconnected.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from liveblockd.errors import BlockError
from liveblockd.exports.backend import Buffer
from liveblockd.exports.nbd_alike import Alike, frame
from liveblockd.exports.nbd_commands import HANDLERS, HOLE_MINIMUM, Session, read_reply
from liveblockd.exports.nbd_line import Line, SecureLine
from liveblockd.exports.nbd_looking import Looking
from liveblockd.exports.nbd_payload import PIECE, Payload
from liveblockd.exports.polling import Polling
from liveblockd.nbd.constants import REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, Command
from liveblockd.nbd.options import GREETING, Negotiation, Phase
from liveblockd.nbd.transmission import (
    REQUEST,
    REQUEST_SIZE,
    Request,
    data_chunk,
    pack_simple,
    simple_reply,
)
from liveblockd.runtime.distinguished import distinguished_name

if TYPE_CHECKING:
    from liveblockd.exports.nbd_server import NbdServer

log = logging.getLogger(__name__)

BUFFER_SIZE: Final = 256 << 10
#: bytes of one wake-up while a client negotiates
NEGOTIATION_READ: Final = 64 << 10
#: a payload up to this size waits in the buffer until it is complete; bytes
SMALL_WRITE: Final = 64 << 10
#: bytes of one receive where the payload of a large WRITE may follow: that is not to come with it
HEAD_READ: Final = 4 << 10
#: reads up to this size are done on the loop when they need no wait; bytes
INLINE_READ: Final = 256 << 10
#: in flight for one client
MAX_REQUESTS: Final = 128
MAX_BYTES: Final = 64 << 20
#: of one wake-up, so that one client does not keep the loop from the others
ROUND_REQUESTS: Final = 128
ROUND_BYTES: Final = 2 << 20
#: rounds of so many requests, where each is done alone, are answered in two halves: the client goes
#: on with the first while the second is done, or one of the two would always wait. Larger rounds
#: overlap by themselves; those that are done together are over before the client is awake.
HALVED: Final = range(8, 33)
#: replies that wait for the client before nothing more is done for it; bytes
WRITE_HIGH: Final = 1 << 20

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_DISC: Final = int(Command.DISC)
_WITH_DATA: Final = frozenset((_READ, _WRITE))


class NbdConnection(Alike, Looking, asyncio.BufferedProtocol):
    """The protocol object of one connection."""

    def __init__(self, server: NbdServer, connected: socket.socket) -> None:
        self.server = server
        self._socket = connected
        self.session: Session | None = None  # None while it negotiates
        self._loop = asyncio.get_running_loop()
        self._negotiation = Negotiation(server, tls=server.tls is not None)
        self._upgrade: asyncio.Task[None] | None = None  # to TLS
        self._transport: asyncio.Transport | None = None
        self._line: Line  # with the transport
        self._deadline: asyncio.TimerHandle | None = None
        # bytes received and not yet used are at [_start, _end)
        self._buffer = bytearray(BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        # a large WRITE whose payload is coming in
        self._payload: Payload | None = None
        self._chunk: memoryview | None = None
        self._head_only = False  # the last request was one: what follows the next is not wanted
        # a refused WRITE: bytes still to come, and the reply for when they have (a client need
        # not expect an answer to a request that it is still sending)
        self._unwanted = 0
        self._refusal = b""
        # replies to be sent at the end of this round
        self._out: list[Buffer] = []
        self._flush_due = False
        self._round_bytes = 0  # of replies that this round may still make
        # requests that wait
        self._tasks: set[asyncio.Task[None]] = set()
        self._begun = 0  # writes without a task
        self._bytes = 0
        self._stalled = False  # complete requests may be in the buffer; nothing is read
        self._round_due = False
        self._polling = Polling(0)
        self._served_in_round = 0
        self._write_paused = False  # the client does not read its replies
        self._closing = False  # no more requests are taken
        self._lost = False

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = cast(asyncio.Transport, transport)
        self._line = Line(self._socket, self._transport)
        if self._closing:  # aborted before it began
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=WRITE_HIGH)
        seconds = self.server.handshake_seconds
        if seconds:
            self._deadline = self._loop.call_later(seconds, self._too_late)
        self._transport.write(GREETING)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._payload is not None:
            return self._payload.room
        if self.session is None:
            return self._view[:NEGOTIATION_READ]
        if self._head_only:
            return self._view[self._end : self._end + HEAD_READ]
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Use them."""
        if self._closing:
            return
        if self._payload is not None:
            self._payload_came(self._payload, nbytes)
            return
        if self.session is None:
            self._negotiate(self._view[:nbytes])
        else:
            self._end += nbytes
            self._round_and_look()

    def eof_received(self) -> bool:
        """The client sends no more; answer what it asked for."""
        self._finish()
        return self._upgrade is None  # TLS ends both ways at once, and warns of who wants otherwise

    def pause_writing(self) -> None:
        """The client does not read."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """It does again."""
        self._write_paused = False
        self._unstall()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Let go, now or when the last request in flight has ended."""
        self._lost = self._closing = True
        self._payload = None
        if self._deadline is not None:
            self._deadline.cancel()
        self._out.clear()
        self.server.disconnected(self)
        self._let_go()

    # -- ends

    def abort(self) -> None:
        """Disconnect without waiting for the client."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def _too_late(self) -> None:
        if self.session is None:
            log.info("NBD client dropped: negotiation took too long")
            self.abort()

    def _broken(self, problem: str) -> None:
        log.info("NBD client dropped: %s", problem)
        self._finish()

    def _finish(self) -> None:
        """Take no more requests; close when those in flight are answered."""
        if not self._closing:
            self._closing = True
            assert self._transport is not None
            self._transport.pause_reading()
        self._flush()
        self._let_go()

    def _let_go(self) -> None:
        if self._tasks or self._begun:
            return
        if not self._lost:
            assert self._transport is not None
            self._transport.close()
        elif self.session is not None:
            self.session.export.client_gone(self)

    # -- negotiation

    def _negotiate(self, data: Buffer = b"") -> None:
        negotiation, transport = self._negotiation, self._transport
        assert transport is not None
        if self._upgrade is not None and not isinstance(self._line, SecureLine):
            negotiation.feed(data)  # came with the end of the handshake; `_start_tls` goes on
            return
        while True:
            out = negotiation.feed(data)
            if negotiation.phase is Phase.TLS:
                # What comes after the answer is not in the clear, and not for us.
                transport.pause_reading()
            if out:
                transport.write(out)
            if not negotiation.more:
                break
            if self._write_paused:  # it asks for more than it reads
                self._stall()
                return
            data = b""
        if negotiation.phase is Phase.CLOSED:
            if negotiation.problem:
                log.info("NBD client dropped: %s", negotiation.problem)
            self._finish()
        elif negotiation.phase is Phase.TRANSMISSION:
            self._begin_transmission(negotiation)
        elif negotiation.phase is Phase.TLS:
            self._upgrade = self._loop.create_task(self._start_tls())
            self._upgrade.add_done_callback(self._upgraded)

    async def _start_tls(self) -> None:
        assert self._transport is not None and self.server.tls is not None
        secure = await self._loop.start_tls(
            self._transport, self, self.server.tls, server_side=True
        )
        if self._closing or secure is None:
            if secure is not None:
                secure.abort()
            return
        self._transport = secure
        self._authorize(secure)
        self._line = SecureLine(self._socket, secure)
        secure.set_write_buffer_limits(high=WRITE_HIGH)
        self._negotiation.secured()
        self._negotiate()

    def _authorize(self, transport: asyncio.Transport) -> None:
        """BlockError unless the owner of the certificate may connect."""
        if self.server.authorized is None:
            return
        certificate = transport.get_extra_info("peercert") or {}
        name = distinguished_name(certificate.get("subject", ()))
        if not name or not self.server.authorized(name):
            raise BlockError(f"TLS x509 authz check for {name} is denied")

    def _upgraded(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.info("NBD client dropped: TLS: %s", error)
        self.abort()
        if not self._lost:
            self.connection_lost(None)

    def _begin_transmission(self, negotiation: Negotiation) -> None:
        assert negotiation.export is not None
        export = self.server.exports[negotiation.export.name]
        self.session = Session(export, negotiation.structured, negotiation.contexts)
        self._polling = Polling(export.poll_ns)
        export.clients.add(self)
        if self._deadline is not None:
            self._deadline.cancel()
        rest = negotiation.rest
        assert len(rest) <= NEGOTIATION_READ
        self._view[: len(rest)] = rest
        self._end = len(rest)
        self._round()

    # -- requests

    def _full(self) -> bool:
        return (
            self._write_paused
            or len(self._tasks) + self._begun >= MAX_REQUESTS
            or self._bytes >= MAX_BYTES
        )

    def _round(self) -> None:
        """Do the complete requests in the buffer, or as many as a round may have."""
        self.server.demand.guests.requests += 1
        self._skip_unwanted()
        if self._full():
            self._stall()
            return
        going = self._requests()
        self._flush()
        if self._closing:
            return
        self._make_room()
        if not going:
            self._stall()
            if not self._full() and not self._round_due:
                self._round_due = True
                self._loop.call_soon(self._next_round)

    def _requests(self) -> bool:
        """False when the round ended before the requests did."""
        session = self.session
        assert session is not None
        export = session.export
        size = export.backend.length
        # A write that is done on the loop: nothing to flush after it. Whether the node takes
        # writes at all it says itself, by refusing those.
        inline_write = SMALL_WRITE if export.writable and not export.writethrough else 0
        buffer, view, end = self._buffer, self._view, self._end
        unpack, write_now = REQUEST.unpack_from, export.backend.write_nowait
        position = self._start
        left = ROUND_REQUESTS
        served = self._served_in_round  # as many as the last time, mostly
        half = left - (served + 1 >> 1) if served in HALVED else -1
        self._round_bytes = ROUND_BYTES
        self._expect_runs(served)
        while end - position >= REQUEST_SIZE:
            magic, flags, command, cookie, offset, length = unpack(buffer, position)
            if magic != REQUEST_MAGIC:
                self._broken(f"request magic {magic:#x}")
                return True
            inside = not flags and length and offset + length <= size
            runs = self._runs and inside and (length <= inline_write or command == _READ)
            count = runs and self._done_alike(command, position, length, left)
            if count:
                used = count * frame(command, length)
            elif command == _READ and inside and length <= INLINE_READ:
                self._read(session, cookie, offset, length)
                used = REQUEST_SIZE
            elif (
                command == _WRITE
                and inside
                and length <= inline_write
                and length <= end - position - REQUEST_SIZE
            ):
                used = REQUEST_SIZE + length
                payload = view[position + REQUEST_SIZE : position + used]
                try:
                    done = write_now(offset, payload)
                except Exception as error:
                    request = Request(0, _WRITE, cookie, offset, length)
                    self._out.append(session.failed(request, error))
                else:
                    if done:
                        self._out.append(pack_simple(SIMPLE_REPLY_MAGIC, 0, cookie))
                    else:
                        self._small_write(session, cookie, offset, payload)
            else:
                used = self._other(Request(flags, command, cookie, offset, length), position)
                if not used:  # the payload is not all here
                    break
                if self._closing:
                    return True
            position += used
            left -= count or 1
            if left == half:
                self._flush()
            if left <= 0 or self._round_bytes <= 0 or self._full():
                self._start = position
                return self._payload is not None
        self._start = position
        self._served_in_round = ROUND_REQUESTS - left
        if self._payload is None and self._served_in_round > 1:
            self._head_only = False
        return True

    def _read(self, session: Session, cookie: int, offset: int, length: int) -> None:
        """A READ that may be answered at once."""
        try:
            data = session.export.backend.read_nowait(offset, length)
        except Exception as error:
            self._out.append(session.failed(Request(0, _READ, cookie, offset, length), error))
            return
        if data is None:
            self._serve(Request(0, _READ, cookie, offset, length))
            return
        self._round_bytes -= length
        if length < HOLE_MINIMUM and session.structured:
            self._out += (data_chunk(cookie, offset, length), data)
        else:
            self._out += read_reply(session, Request(0, _READ, cookie, offset, length), data)

    def _small_write(self, session: Session, cookie: int, offset: int, payload: memoryview) -> None:
        """A WRITE that is not done at once; its payload stands where more will be received."""
        # Both counts go up first: the write may have ended when the call returns.
        length = len(payload)
        self._begun += 1
        self._bytes += length
        ended = partial(self._written, session, cookie, offset, length)
        if not session.export.backend.begin_write(offset, payload, ended):
            self._begun -= 1
            self._bytes -= length
            request = Request(0, _WRITE, cookie, offset, length)
            refused = session.refused(request)  # the node may have become read-only
            if refused:
                self._out.append(refused)
            else:
                self._serve(request, bytes(payload))

    def _written(
        self, session: Session, cookie: int, offset: int, length: int, error: OSError | None
    ) -> None:
        self._begun -= 1
        self._bytes -= length
        if error is None:
            self._out.append(simple_reply(cookie))
        else:
            self._out.append(session.failed(Request(0, _WRITE, cookie, offset, length), error))
        self._answered()

    def _other(self, request: Request, position: int) -> int:
        """Any request; bytes of the buffer that it used up, 0 when more must come first."""
        session = self.session
        assert session is not None
        if request.command == _DISC:
            self._finish()
            return REQUEST_SIZE
        reply = session.refused(request)
        if request.command == _WRITE:
            return self._write(request, position, reply)
        if reply:
            self._out.append(reply)
        else:
            self._serve(request)
        return REQUEST_SIZE

    def _write(self, request: Request, position: int, refused: bytes) -> int:
        length = request.length
        start = position + REQUEST_SIZE
        available = min(self._end - start, length)
        if refused:
            self._unwanted = length - available
            if self._unwanted:
                self._refusal = refused
            else:
                self._out.append(refused)
        elif available == length:
            self._serve(request, bytes(self._view[start : start + length]))
        elif length <= SMALL_WRITE:
            return 0
        else:
            self._begin_payload(request, self._view[start : start + available])
        return REQUEST_SIZE + available

    def _begin_payload(self, request: Request, begin: memoryview) -> None:
        assert self.session is not None
        export = self.session.export
        if self._chunk is None:
            self._chunk = memoryview(bytearray(PIECE))
        at_once = not request.flags and not export.writethrough
        store = export.backend.write_nowait if at_once else None
        self._payload = Payload(request, store, self._chunk)
        self._payload.put(begin)
        self._head_only = True

    def _payload_came(self, payload: Payload, count: int) -> None:
        """And what else is there of it already."""
        came = 0
        while not payload.arrived(count):
            came += count
            if came > ROUND_BYTES:
                return
            count = self._line.look(payload.room, 0)
            if count <= 0:
                return
        self._payload = None
        rest = payload.rest()
        if rest is None:
            reply = simple_reply(payload.request.cookie)
            if payload.error is not None:
                assert self.session is not None
                reply = self.session.failed(payload.request, payload.error)
            self._out.append(reply)
            self._flush()
        else:
            self._serve(*rest)
        if self._full():
            self._stall()

    def _skip_unwanted(self) -> None:
        if self._unwanted:
            part = min(self._unwanted, self._end - self._start)
            self._unwanted -= part
            self._start += part
            if not self._unwanted:
                self._out.append(self._refusal)

    def _make_room(self) -> None:
        """Keep room behind ``_end`` for the largest request that is waited for in the buffer."""
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
        elif start and BUFFER_SIZE - start < SMALL_WRITE + REQUEST_SIZE:
            self._view[: end - start] = bytes(self._view[start:end])
            self._start, self._end = 0, end - start

    # -- the flow

    def _stall(self) -> None:
        if not self._stalled and not self._closing:
            self._stalled = True
            assert self._transport is not None
            self._transport.pause_reading()

    def _next_round(self) -> None:
        self._round_due = False
        self._unstall()

    def _unstall(self) -> None:
        """Go on after a stall if nothing stands against it."""
        if not self._stalled or self._closing or self._full():
            return
        self._stalled = False
        if self.session is None:
            self._negotiate()
        elif self._payload is None:
            self._round()
        if not self._stalled and not self._closing:
            assert self._transport is not None
            self._transport.resume_reading()

    def _flush(self) -> None:
        self._flush_due = False
        out = self._out
        if out:
            self._out = []
            if not self._lost:
                self._line.write(out)

    def _serve(self, request: Request, payload: Buffer = b"") -> None:
        """Make a task of a request."""
        if request.command in _WITH_DATA:
            self._bytes += request.length
        task = self._loop.create_task(self._served(request, payload))
        self._tasks.add(task)

    async def _served(self, request: Request, payload: Buffer) -> None:
        session = self.session
        assert session is not None
        try:
            reply = await HANDLERS[request.command](session, request, payload)
            self._out.extend(reply)
        except Exception as error:
            self._out.append(session.failed(request, error))
        finally:
            if request.command in _WITH_DATA:
                self._bytes -= request.length
            task = asyncio.current_task()
            assert task is not None
            self._tasks.discard(task)
            self._answered()

    def _answered(self) -> None:
        if self._closing:
            if not self._tasks and not self._begun:
                self._flush()
                self._let_go()
        elif self._stalled and not self._round_due:
            self._round_due = True
            self._loop.call_soon(self._next_round)
        if self._out and not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)
