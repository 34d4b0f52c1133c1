"""The NBD server: listening sockets, clients, exports by name.

Specification: qapi/block-export.json, nbd-server-start; NBD doc/proto.md.

One server a daemon. It may be started again after it was stopped. A client over
``max_connections`` waits in the queue of the socket until another has gone.

Runs on the loop. Errors: ``BlockError`` from ``start``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM
from typing import TYPE_CHECKING, Final

from liveblockd.errors import BlockError
from liveblockd.exports.addresses import Listeners, listen
from liveblockd.exports.nbd_connection import NbdConnection
from liveblockd.nbd.options import ExportInfo
from liveblockd.qapi.sockets import InetSocketAddress, PlainAddress
from liveblockd.runtime.demand import Demand

if TYPE_CHECKING:
    from liveblockd.exports.nbd_export import NbdExport

log = logging.getLogger(__name__)

DEFAULT_MAX_CONNECTIONS: Final = 100
DEFAULT_HANDSHAKE_SECONDS: Final = 10
#: clients accepted in one wake-up
ACCEPT_BATCH: Final = 16
#: seconds to wait when the process has no descriptor left
ACCEPT_PAUSE: Final = 0.5
#: size asked of the kernel for the send buffer of a client, in bytes
SEND_BUFFER: Final = 1 << 20


class NbdServer:
    """Also the ``Directory`` that clients negotiate with."""

    def __init__(self, demand: Demand | None = None) -> None:
        #: rounds of requests are counted here
        self.demand = demand or Demand()
        self.exports: dict[str, NbdExport] = {}
        self.connections: set[NbdConnection] = set()
        self.handshake_seconds = DEFAULT_HANDSHAKE_SECONDS
        self.max_connections = DEFAULT_MAX_CONNECTIONS
        #: whether workers are busy, who need the processors more than a look for requests does
        self.busy: Callable[[], bool] = lambda: False
        #: the client who sent something last
        self.active: object = None
        #: requests that were found by looking
        self.found_early = 0
        self.tls: ssl.SSLContext | None = None
        #: whether the owner of a certificate, a distinguished name, is let in; None: everybody
        self.authorized: Callable[[str], bool] | None = None
        self._listeners: Listeners | None = None
        self._address: PlainAddress | None = None
        self._accepting = False
        self._attaching: set[asyncio.Task[None]] = set()
        self._starting = False
        self._idle: asyncio.Future[None] | None = None

    @property
    def running(self) -> bool:
        """Whether clients can connect."""
        return self._listeners is not None

    @property
    def addresses(self) -> list[str]:
        """Where it listens, for a reader."""
        return [str(s.getsockname()) for s in self._listeners.sockets] if self._listeners else []

    async def start(
        self,
        address: PlainAddress,
        *,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        handshake_seconds: int = DEFAULT_HANDSHAKE_SECONDS,
        tls: ssl.SSLContext | None = None,
        tls_authz: Callable[[str], bool] | None = None,
    ) -> None:
        """Listen; 0 means no limit. With ``tls`` clients are told of exports only over that.

        ``tls_authz`` says whether the owner of a certificate is let in, by the distinguished name.
        Raises BlockError.
        """
        if self.running or self._starting:
            raise BlockError("NBD server already running")
        if tls_authz is not None and (tls is None or tls.verify_mode is not ssl.CERT_REQUIRED):
            # It would be asked for nobody.
            raise BlockError("'tls-authz' needs 'tls-creds' of certificates, with verify-peer=on")
        self._starting = True
        try:
            self._listeners = await listen(address, min(max_connections or 128, 128))
        finally:
            self._starting = False
        self._address = address
        self.tls = tls
        self.authorized = tls_authz
        self.max_connections = max_connections
        self.handshake_seconds = handshake_seconds
        self._accept_more()

    def stop_listening(self) -> None:
        """Close and remove the sockets; drop the clients that negotiate. Raises BlockError."""
        if self._listeners is None:
            raise BlockError("NBD server not running")
        self._accept_none()
        self._listeners.close()
        self._listeners = None
        for connection in tuple(self.connections):
            if connection.session is None:
                connection.abort()

    async def closed(self) -> None:
        """Return when no connection is left. The exports must have been shut down."""
        while self._attaching:
            await asyncio.wait(self._attaching)
        while self.connections:
            for connection in tuple(self.connections):
                connection.abort()
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    # -- the directory of a negotiation

    def find(self, name: str) -> ExportInfo | None:
        """The export called ``name``."""
        export = self.exports.get(name)
        return None if export is None else export.info()

    def listed(self) -> Iterator[ExportInfo]:
        """All exports, in the order in which they were made."""
        return (export.info() for export in self.exports.values())

    # -- clients

    def disconnected(self, connection: NbdConnection) -> None:
        """The socket of a client is closed; requests of it may be in flight."""
        self.connections.discard(connection)
        if self.active is connection:
            self.active = None
        if self.running:
            self._accept_more()
        if not self.connections and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _room(self) -> int:
        if not self.max_connections:
            return ACCEPT_BATCH
        return self.max_connections - len(self.connections) - len(self._attaching)

    def _accept_more(self) -> None:
        if self._listeners is None or self._accepting or self._room() <= 0:
            return
        self._accepting = True
        loop = asyncio.get_running_loop()
        for listener in self._listeners.sockets:
            loop.add_reader(listener, self._accept, listener)

    def _accept_none(self) -> None:
        if self._listeners is not None and self._accepting:
            loop = asyncio.get_running_loop()
            for listener in self._listeners.sockets:
                loop.remove_reader(listener)
        self._accepting = False

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPT_BATCH):
            if self._room() <= 0:
                self._accept_none()
                return
            try:
                connected, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (EMFILE, ENFILE, ENOBUFS, ENOMEM):
                    raise
                log.warning("NBD client not accepted: %s", error.strerror)
                self._accept_none()
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE, self._accept_more)
                return
            task = asyncio.get_running_loop().create_task(self._attach(connected))
            self._attaching.add(task)
            task.add_done_callback(self._attached)

    async def _attach(self, connected: socket.socket) -> None:
        try:
            connected.setblocking(False)
            self._set_options(connected)
            connection = NbdConnection(self, connected)
            self.connections.add(connection)
            try:
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: connection, connected
                )
            except BaseException:
                self.connections.discard(connection)
                raise
        except OSError as error:  # the client has gone already
            connected.close()
            log.info("NBD client lost before it was greeted: %s", error.strerror)

    def _attached(self, task: asyncio.Task[None]) -> None:
        self._attaching.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("NBD client not attached", exc_info=task.exception())
        self._accept_more()

    def _set_options(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if connected.family == socket.AF_UNIX:
            return
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        address = self._address
        if isinstance(address, InetSocketAddress):
            for option, value in (
                (socket.TCP_KEEPCNT, address.keep_alive_count),
                (socket.TCP_KEEPIDLE, address.keep_alive_idle),
                (socket.TCP_KEEPINTVL, address.keep_alive_interval),
            ):
                if value:
                    connected.setsockopt(socket.IPPROTO_TCP, option, value)
