"""The way to an NBD server, over one connection after the other when the server goes and comes.

Specification: qapi/block-core.json, BlockdevOptionsNbd (reconnect-delay); NBD doc/proto.md. Runs on
the event loop. Invariants:

* For ``delay`` seconds after a loss requests wait, and are sent (again) when the server is back;
  after that they fail with EIO, until it is back all the same.
* What a server had answered and not flushed may be gone with it. With a delay such writes are kept
  (``UNFLUSHED`` bytes, then this module flushes by itself) and made again, in their order, before
  anything else is asked. Where they cannot be, there is no way back: a flush to the new server
  would be a lie.
* What was under way is sent again: its caller has no answer, so that no later request can build on
  it, and the connection that could still carry it is closed. A request whose caller has gone is
  not. Nothing is sent to a server that offers less than the first one did, or that broke the
  protocol.

Errors: OSError of ``request``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from errno import EIO, ESHUTDOWN
from os import strerror
from typing import Final, NamedTuple, TypeAlias

from liveblockd.errors import BlockError
from liveblockd.nbd.client import RemoteExport
from liveblockd.nbd.constants import Command, TransmissionFlag
from liveblockd.storage.driver import Buffer
from liveblockd.storage.nbd_connection import Answer, ConnectionLostError, NbdConnection

log = logging.getLogger(__name__)

#: bytes of writes that are kept; twice that much and writes wait for the flush
UNFLUSHED: Final = 32 << 20
#: what a kept request counts for beyond its data, bytes
_OVERHEAD: Final = 4096
#: seconds between two tries to connect: the first, and the longest
AGAIN: Final = (0.1, 1.0)
#: how often one request is sent: a server that dies of it each time is not asked for ever
TRIES: Final = 16
#: requests that are made again at a time, and their bytes
_WAVE: Final = (32, 8 << 20)
_CHANGES: Final = frozenset((Command.WRITE, Command.WRITE_ZEROES, Command.TRIM))
_NEEDED: Final = (
    TransmissionFlag.SEND_FLUSH,
    TransmissionFlag.SEND_TRIM,
    TransmissionFlag.SEND_WRITE_ZEROES,
    TransmissionFlag.SEND_FAST_ZERO,
)

Dial: TypeAlias = Callable[[], Awaitable[tuple[NbdConnection, RemoteExport]]]


class Kept(NamedTuple):
    """A request that was answered and may not be durable; offset and length in bytes."""

    number: int
    command: Command
    offset: int
    length: int
    flags: int
    data: bytes

    @property
    def weight(self) -> int:
        """Bytes of memory, more or less."""
        return len(self.data) + _OVERHEAD


class Unflushed:
    """The changes that no flush has followed yet, oldest first; ``keeps``: to make them again."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.weight = 0
        self.kept: deque[Kept] = deque()
        #: numbers of changes: the last one answered, made durable, and not kept
        self.answered = self.durable = self.forgotten = 0

    def add(self, command: Command, offset: int, length: int, flags: int, data: Buffer) -> None:
        """It was answered."""
        self.answered += 1
        if not self.keeps:
            self.forgotten = self.answered
            return
        self.kept.append(Kept(self.answered, command, offset, length, flags, bytes(data)))
        self.weight += self.kept[-1].weight

    def flushed(self, number: int) -> None:
        """A flush that was sent when ``answered`` was ``number`` has succeeded."""
        self.durable = max(self.durable, number)
        while self.kept and self.kept[0].number <= self.durable:
            self.weight -= self.kept.popleft().weight

    def forget(self) -> None:
        """A flush has failed: nobody knows what of it is there."""
        self.kept.clear()
        self.weight = 0
        self.forgotten = self.answered

    @property
    def complete(self) -> bool:
        """Whether all that may be lost can be made again."""
        return self.forgotten <= self.durable


class NbdLink:
    """One export, as long as its node is open; ``delay`` in seconds."""

    def __init__(
        self, connection: NbdConnection, export: RemoteExport, dial: Dial, *, delay: float
    ) -> None:
        self.export = export
        self._connection = connection
        self._dial = dial
        self._delay = delay
        self._can_flush = bool(export.flags & TransmissionFlag.SEND_FLUSH)
        self._unflushed = Unflushed(keeps=delay > 0)
        #: requests wait for it while the server is away
        self._back: asyncio.Future[None] | None = None
        self._patient = False
        self._lost_at = 0.0  # by the loop's clock
        self._waiting = 0  # requests that wait for it
        self._timer: asyncio.TimerHandle | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._own_flush: asyncio.Task[None] | None = None
        self._flush_error: OSError | None = None
        #: why there is no way back
        self.broken = ""
        connection.on_lost = self._lost
        if connection.lost:
            self._lost()

    # -- requests

    async def request(
        self, command: Command, offset: int, length: int, *, flags: int = 0, data: Buffer = b""
    ) -> Answer:
        """Ask and wait for the answer, if need be of the server that comes after this one."""
        changes = self._can_flush and command in _CHANGES
        for _ in range(TRIES):
            if self._back is not None:
                await self._wait()
            if changes and self._unflushed.weight > UNFLUSHED:
                await self._make_room()
            number = self._unflushed.answered
            connection = self._connection
            try:
                answer = await connection.request(command, offset, length, flags=flags, data=data)
            except ConnectionLostError:
                continue
            except OSError as error:
                if error.errno != ESHUTDOWN or not self._delay:
                    raise
                self._retire(connection)
                continue
            if changes:
                self._unflushed.add(command, offset, length, flags, data)
            elif command == Command.FLUSH:
                self._unflushed.flushed(number)
                self._report_flush()
            return answer
        raise _gone()

    async def _wait(self) -> None:
        """Until there is a connection; raises OSError when there is none for too long."""
        self._waiting += 1
        try:
            while self._back is not None:
                if not self._patient:
                    raise _gone()
                await asyncio.shield(self._back)
        finally:
            self._waiting -= 1

    def _report_flush(self) -> None:
        """Raise the error of a flush that nobody but this module had asked for."""
        error, self._flush_error = self._flush_error, None
        if error is not None:
            raise OSError(error.errno, error.strerror)

    async def _make_room(self) -> None:
        if self._own_flush is None or self._own_flush.done():
            self._own_flush = asyncio.get_running_loop().create_task(self._flush())
        if self._unflushed.weight > 2 * UNFLUSHED:
            await asyncio.shield(self._own_flush)

    async def _flush(self) -> None:
        number = self._unflushed.answered
        try:
            await self._connection.request(Command.FLUSH, 0, 0)
        except ConnectionLostError:
            return
        except OSError as error:
            self._flush_error = error
            self._unflushed.forget()
        else:
            self._unflushed.flushed(number)

    # -- when the server goes

    @property
    def lost(self) -> bool:
        """Whether there is no connection now."""
        return self._back is not None

    @property
    def dirty(self) -> bool:
        """Whether something was answered that no flush has followed."""
        return self._unflushed.answered > self._unflushed.durable

    def silence(self) -> float:
        """Seconds for which requests have waited for the server, which is silent or away."""
        if self._back is None:
            return self._connection.silence()
        return asyncio.get_running_loop().time() - self._lost_at if self._waiting else 0.0

    def end_patience(self) -> None:
        """From now on no request waits for a server."""
        self._delay = 0
        self.stop_waiting()

    def stop_waiting(self) -> None:
        """Requests that wait for the server fail now; it may come back all the same."""
        self._patient = False
        self._end_timer()
        if self._back is not None and not self._back.done():
            self._back.set_result(None)

    def cut_off(self, silence: float) -> None:
        """Requests that a server has not answered for so many seconds fail now.

        That server is left for good: what it does in the end with what it was sent may come after
        what somebody else writes there.
        """
        if self._connection.silence() >= silence:
            if self._back is None:
                self._back = asyncio.get_running_loop().create_future()
            self._break("the server does not answer, and nobody waits for it")
            self._connection.abort()

    def _retire(self, connection: NbdConnection) -> None:
        """The server says that it is ending: leave it, when it has done what it took."""
        if connection is self._connection and not connection.lost:
            self._lost("the server is being shut down")

    def _lost(self, reason: str = "") -> None:
        loop = asyncio.get_running_loop()
        if self._back is not None:
            return
        self._back = loop.create_future()
        self._lost_at = loop.time()
        reason = reason or self._connection.why_lost
        if self._connection.broke_protocol:
            self._break(f"the server broke the protocol: {reason}")
        elif not self._unflushed.complete:
            self._break(f"{reason}; what it had not flushed may be lost")
        else:
            log.warning("NBD export lost: %s", reason)
            if self._delay:
                self._patient = True
                self._timer = loop.call_later(self._delay, self.stop_waiting)
            self._reconnecting = loop.create_task(self._reconnect())

    def _break(self, reason: str) -> None:
        log.error("NBD export lost for good: %s", reason)
        self.broken = reason
        self.stop_waiting()

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _reconnect(self) -> None:
        pause, most = AGAIN
        await self._connection.finish()
        while True:
            try:
                connection, export = await self._dial()
            except BlockError as error:
                log.debug("NBD export: %s", error.message)
                await asyncio.sleep(pause)
                pause = min(2 * pause, most)
                continue
            try:
                adopted = await self._adopt(connection, export)
            except BaseException:
                connection.abort()
                raise
            if adopted:
                return
            connection.abort()
            if self.broken:
                return
            await asyncio.sleep(pause)

    async def _adopt(self, connection: NbdConnection, export: RemoteExport) -> bool:
        """Whether requests go there now."""
        if difference := _difference(self.export, export):
            self._break(f"the server that came back {difference}")
            return False
        if not self._unflushed.complete:  # an answer that came with the end was still on its way
            self._break("what the server had not flushed may be lost")
            return False
        try:
            for wave in _waves(self._unflushed.kept):
                await _all(connection, wave)
        except ConnectionLostError:
            return False
        except OSError as error:
            if error.errno == ESHUTDOWN:  # it was the old one, which is ending
                return False
            self._break(f"writes could not be made again: {error.strerror}")
            return False
        if connection.lost:
            return False
        log.warning("NBD export is back, %d writes made again", len(self._unflushed.kept))
        self._connection = connection
        connection.on_lost = self._lost
        back, self._back = self._back, None
        self._end_timer()
        self._patient = False
        if back is not None and not back.done():
            back.set_result(None)
        return True

    async def close(self) -> None:
        """Say goodbye; requests that wait fail."""
        self._connection.on_lost = None
        if self._back is None:
            self._back = asyncio.get_running_loop().create_future()
        self.stop_waiting()
        for task in (self._reconnecting, self._own_flush):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        await self._connection.close()


def _gone() -> OSError:
    return OSError(EIO, strerror(EIO))


def _difference(first: RemoteExport, now: RemoteExport) -> str:
    """Why ``now`` cannot take the place of ``first``; empty if it can."""
    if now.size < first.size:
        return "has a smaller export"
    if now.read_only and not first.read_only:
        return "exports for reading only"
    if now.minimum_block > first.minimum_block or now.maximum_payload < first.maximum_payload:
        return "takes other sizes of requests"
    if first.flags & sum(_NEEDED) & ~now.flags or (
        first.allocation is not None and now.allocation is None
    ):
        return "can do less"
    return ""


def _waves(kept: deque[Kept]) -> list[list[Kept]]:
    """Groups to be sent one after the other; in a group nothing overlaps."""
    most, most_bytes = _WAVE
    waves: list[list[Kept]] = []
    size = 0
    for entry in kept:
        wave = waves[-1] if waves else []
        end = entry.offset + entry.length
        overlaps = any(
            other.offset < end and entry.offset < other.offset + other.length for other in wave
        )
        if not wave or overlaps or len(wave) >= most or size > most_bytes:
            waves.append(wave := [])
            size = 0
        wave.append(entry)
        size += len(entry.data)
    return waves


async def _all(connection: NbdConnection, wave: list[Kept]) -> None:
    results = await asyncio.gather(
        *(
            connection.request(kept.command, kept.offset, kept.length,
                               flags=kept.flags, data=kept.data)
            for kept in wave
        ),
        return_exceptions=True,
    )  # fmt: skip
    for result in results:
        if isinstance(result, BaseException):
            raise result
