"""One QMP client: greeting, negotiation, its commands in order, its events (qmp-spec, section 2).

Stands on qemu.qmp's ``AsyncProtocol``, which has the reader and writer tasks, the outgoing queue
and the orderly end; what a message is comes from ``codec``.

Runs on the event loop. Invariants:

* Replies and events go through one queue, encoded when they are put there: what is on the wire
  is in the order in which it happened, and says what was true then.
* A session runs one command at a time. A command runs in a task of its own: a client that
  vanishes does not stop it half-way.
* A client that does not read is not read from while ``_PAUSE`` bytes wait for it, and is
  dropped when events make it ``_DROP`` bytes. Nobody else waits for it.
* No error of a command ends the session.

Nothing escapes from ``serve`` but CancelledError.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from qemu.qmp.protocol import AsyncProtocol, Runstate

from liveblockd import __version__
from liveblockd.errors import BlockError, ErrorClass
from liveblockd.events import Event
from liveblockd.qapi import parse, to_qmp
from liveblockd.qmp import registry
from liveblockd.qmp.codec import JsonReader, ParseError, encode, plain_numbers
from liveblockd.qmp.context import Context, asking_session

_log: Final = logging.getLogger(__name__)

#: Level of QEMU's QMP that is spoken; clients choose by these numbers what they may ask for.
QEMU_VERSION: Final = {"major": 11, "minor": 0, "micro": 92}
VERSION: Final = {"qemu": QEMU_VERSION, "package": f"liveblockd-{__version__}"}
GREETING: Final = {"QMP": {"version": VERSION, "capabilities": ["oob"]}}

_CHUNK: Final = 4 << 10  # input looked at in one go, in bytes: 5 ms at the worst
_PAUSE: Final = 1 << 20  # output that waits, in bytes, from which on no more input is taken
_DROP: Final = 64 << 20  # output that waits, in bytes, from which on the client is given up
_LINGER: Final = 10.0  # seconds that a client which sends no more has for reading its replies


class Streams(NamedTuple):
    """A connection that exists already."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Request(NamedTuple):
    """A request whose members are all right; whether there is such a command is seen later."""

    name: str
    arguments: dict[str, Any]
    out_of_band: bool


class Session(AsyncProtocol[Any]):
    """One client of a monitor; ``serve`` is its life."""

    def __init__(self, context: Context, *, pretty: bool = False) -> None:
        super().__init__()
        self._context = context
        self._pretty = pretty
        self._input = JsonReader()
        self._items: deque[Any] = deque()
        self._negotiated = False
        self._oob = False
        self._waiting = 0  # bytes in the outgoing queue
        self._room = asyncio.Event()
        self._unsubscribe: Callable[[], None] | None = None
        self._closing = False
        self._ended = asyncio.Event()
        #: also send the events that QEMU has not
        self.own_events = False
        self._answered = asyncio.Event()  # no command is running
        self._answered.set()

    # -- life

    async def serve(self, connection: Streams | socket.socket) -> None:
        """Talk to the client until it leaves, or until ``close``."""
        self._context.sessions.add(self)
        try:
            # not connect(): it takes a client that is gone already for a defect
            await self._do_connect(connection)
            await self._establish_session()
            while self.runstate is Runstate.RUNNING:
                await self.runstate_changed()
        except OSError as error:
            _log.info("QMP client left before it was greeted: %s", error)
        finally:
            self._stop_events()
            try:
                await self._finish()
            finally:
                self._context.sessions.discard(self)
                self._ended.set()

    async def close(self, timeout: float = 1.0) -> None:  # seconds
        """Answer what runs, send what waits, end the connection; by force after ``timeout``."""
        try:
            async with asyncio.timeout(timeout):
                await self._answered.wait()
                self._stop_events()
                if self._writer_task is not None and not self._ended.is_set():
                    self._schedule_disconnect()
                await self._ended.wait()
        except TimeoutError:
            self._abort()
            await self._ended.wait()

    async def _finish(self) -> None:
        """Let the protocol come to its end; why the connection broke is nobody's concern."""
        if self.runstate is Runstate.IDLE:
            return
        with contextlib.suppress(EOFError, OSError):
            await self.disconnect()

    def _abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()

    def _stop_events(self) -> None:
        self._closing = True
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    # -- what AsyncProtocol asks for

    async def _do_connect(self, address: Any, ssl: Any = None) -> None:
        if not isinstance(address, Streams):
            await super()._do_connect(address, ssl)
            return
        self._set_state(Runstate.CONNECTING)
        self._reader, self._writer = address

    async def _establish_session(self) -> None:
        assert self._writer is not None
        self._writer.write(encode(GREETING, pretty=self._pretty))
        await super()._establish_session()

    async def _do_recv(self) -> Any:
        """The next value or ParseError of the input; EOFError at its end."""
        assert self._reader is not None
        while not self._items:
            try:
                data = await self._reader.read(_CHUNK)
            except OSError as error:
                raise EOFError from error
            if not data:
                await self._linger()
                raise EOFError
            self._items.extend(self._input.feed(data))
            await asyncio.sleep(0)  # one client's flood of input is not the others' wait
        return self._items.popleft()

    async def _linger(self) -> None:
        """A client may end its input (``... | socat``) and read the replies afterwards."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._outgoing.join(), _LINGER)

    async def _send(self, msg: bytes) -> None:
        assert self._writer is not None
        try:
            if self._writer.transport.is_closing():  # uvloop takes a write then for a defect
                raise EOFError
            self._writer.write(msg)
            await self._writer.drain()
        except OSError as error:
            raise EOFError from error
        finally:
            self._waiting -= len(msg)
            if self._waiting < _PAUSE:
                self._room.set()

    async def _bh_flush_writer(self) -> None:
        """Wait until all is written, or the writer has failed: then nobody empties the queue."""
        assert self._writer_task is not None
        written = asyncio.create_task(self._outgoing.join())
        try:
            await asyncio.wait((written, self._writer_task), return_when=asyncio.FIRST_COMPLETED)
            if written.done():
                await super()._bh_flush_writer()
        finally:
            written.cancel()

    def _cb_inbound(self, msg: Any) -> Any:
        return msg

    async def _on_message(self, msg: Any) -> None:
        while self._waiting >= _PAUSE:
            self._room.clear()
            await self._room.wait()
        if self._context.quitting:
            return
        if isinstance(msg, ParseError):
            self._put({"error": {"class": ErrorClass.GENERIC, "desc": msg.message}})
            return
        self._answered.clear()
        self._context.demand.monitors.requests += 1
        try:
            reply = await self._answer(msg)
            if isinstance(msg, dict) and "id" in msg:
                reply["id"] = plain_numbers(msg["id"])
            self._put(reply)
        finally:
            self._answered.set()
        if self._negotiated and self._unsubscribe is None and not self._closing:
            self._unsubscribe = self._context.publisher.subscribe(self._on_event)

    # -- output

    def _put(self, message: dict[str, Any]) -> None:
        try:
            line = encode(message, pretty=self._pretty)
        except (TypeError, ValueError) as error:
            _log.exception("a reply cannot be put into JSON")
            message = {k: v for k, v in message.items() if k != "return"}
            line = encode(message | {"error": _internal(error)}, pretty=self._pretty)
        self._put_line(line)

    def _put_line(self, line: bytes) -> None:
        self._waiting += len(line)
        self._outgoing.put_nowait(line)

    def _on_event(self, event: Event) -> None:
        if event.name.lower().startswith("x") and not self.own_events:
            return
        if self._waiting > _DROP:
            _log.warning("QMP client dropped: it has not read %d bytes of events", self._waiting)
            self._stop_events()
            self._abort()
            return
        self._put(event_message(event))

    # -- commands

    async def _answer(self, message: Any) -> dict[str, Any]:
        """The reply to a message, without the id."""
        try:
            request = check_request(message, self._oob)
            if not self._negotiated:
                return self._negotiate(request)
            self._check_command(request)
            task = asyncio.create_task(self._execute(request))
            return {"return": await asyncio.shield(task)}
        except BlockError as error:
            return {"error": {"class": error.error_class, "desc": error.message}}
        except OSError as error:
            desc = error.strerror or str(error)
            return {"error": {"class": ErrorClass.GENERIC, "desc": desc}}
        except Exception as error:  # the session lives whatever a command does
            _log.exception("QMP command failed unexpectedly")
            return {"error": _internal(error)}

    def _negotiate(self, request: Request) -> dict[str, Any]:
        if request.name != "qmp_capabilities":
            raise BlockError(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
                error_class=ErrorClass.COMMAND_NOT_FOUND,
            )
        arguments: Any = parse(registry.find(request.name).args, request.arguments)
        self._oob = "oob" in (arguments.enable or ())
        self._negotiated = True
        return {"return": {}}

    def _check_command(self, request: Request) -> None:
        if request.name == "qmp_capabilities":
            raise BlockError(
                "Capabilities negotiation is already complete, command ignored",
                error_class=ErrorClass.COMMAND_NOT_FOUND,
            )
        registry.find(request.name)
        if request.out_of_band:
            raise BlockError(f"The command {request.name} does not support OOB")

    async def _execute(self, request: Request) -> Any:
        asking_session.set(self)
        return to_qmp(await registry.execute(self._context, request.name, request.arguments))


def check_request(message: Any, oob: bool) -> Request:
    """The request that a JSON value is; raises BlockError. ``oob``: exec-oob is allowed."""
    if not isinstance(message, dict):
        raise BlockError("QMP input must be a JSON object")
    name: str | None = None
    arguments: dict[str, Any] = {}
    out_of_band = False
    for key, value in message.items():
        if key == "execute" or (key == "exec-oob" and oob):
            if not isinstance(value, str):
                raise BlockError(f"QMP input member '{key}' must be a string")
            if name is not None:
                raise BlockError("QMP input member 'execute' clashes with 'exec-oob'")
            name, out_of_band = value, key == "exec-oob"
        elif key == "arguments":
            if not isinstance(value, dict):
                raise BlockError("QMP input member 'arguments' must be an object")
            arguments = value
        elif key != "id":
            raise BlockError(f"QMP input member '{key}' is unexpected")
    if name is None:
        raise BlockError("QMP input lacks member 'execute'")
    return Request(name, arguments, out_of_band)


def event_message(event: Event) -> dict[str, Any]:
    """An event as it goes over the wire, with the time of now."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    message: dict[str, Any] = {
        "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
        "event": event.name,
    }
    if data := to_qmp(event.data()):
        message["data"] = data
    return message


def _internal(error: Exception) -> dict[str, str]:
    reason = f"{type(error).__name__}: {error}"
    return {"class": ErrorClass.GENERIC, "desc": f"Internal error, {reason}"}
