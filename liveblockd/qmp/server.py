"""Where QMP clients come from: monitors on character devices, in QEMU's sense of the words.

A ``Monitor`` stands on a ``Chardev``: a UNIX or TCP socket that listens or connects, a descriptor
that the daemon inherited, or stdin and stdout. Any number of clients at a time may be connected to
one that listens. ``mode=control`` speaks QMP, ``mode=readline`` the human monitor.

Runs on the event loop. Invariants: a socket file that somebody listens on is never replaced, and at
the end only a file that is still ours is removed; no client is accepted before ``start``.

Errors: BlockError in QEMU's words from ``start``; nothing afterwards, only log lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, Literal, Protocol

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.session import Session, Streams
from liveblockd.qmp.stdio import open_stdio

_log: Final = logging.getLogger(__name__)

_SUN_PATH: Final = 107  # bytes that fit into a socket address
_BACKLOG: Final = 64
_STREAM_LIMIT: Final = 256 << 10  # bytes read ahead of a session


class Chardev(QapiModel):
    """Options of ``--chardev``; sockets have one of ``path``, ``fd`` and ``host``/``port``."""

    id: str
    backend: Literal["socket", "stdio"] = "socket"
    path: str | None = None
    abstract: bool = False  # ``path`` names a socket of the abstract name space
    fd: str | None = None  # number of an inherited descriptor, connected or listening
    host: str | None = None
    port: str | None = None
    server: bool = False
    wait: bool = True  # of a server: do not go on before the first client is there
    reconnect: float = 0  # of a client: seconds between attempts, 0 for a single one
    mode: str | None = None  # permissions of the socket file, octal


class ReadlineSession(Protocol):
    """A client of the human monitor (``hmp.readline``)."""

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve until the client leaves."""


class Monitor:
    """One ``--monitor``: takes connections from its chardev and serves them."""

    def __init__(
        self,
        context: Context,
        chardev: Chardev,
        *,
        mode: Literal["control", "readline"] = "control",
        pretty: bool = False,
        make_readline: Callable[[Context], ReadlineSession] | None = None,
    ) -> None:
        assert mode == "control" or make_readline is not None
        self._context = context
        self._chardev = chardev
        self._pretty = pretty
        self._make_readline = make_readline if mode == "readline" else None
        self._server: asyncio.Server | None = None
        self._file: _SocketFile | None = None
        self._connected = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sessions: set[Session] = set()
        self._clients = 0
        self._closing = False

    async def start(self) -> None:
        """Listen or connect. With ``wait=on`` returns when the first client is connected.

        Raises BlockError.
        """
        chardev = self._chardev
        if chardev.backend == "stdio":
            self._spawn(self._serve(await open_stdio()))
        elif chardev.fd is not None:
            await self._start_fd(chardev.fd)
        elif chardev.server:
            await self._listen(self._bind())
        else:
            await self._start_client()
        if chardev.server and chardev.wait:
            _log.info("waiting for a client on chardev %s", chardev.id)
            await self._connected.wait()

    async def close(self) -> None:
        """``stop_listening``, then send what is under way to the clients and disconnect them."""
        self.stop_listening()
        await asyncio.gather(*(session.close() for session in tuple(self._sessions)))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop_listening(self) -> None:
        """Take no more clients, connect to none, remove the socket file."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        if self._file is not None:
            self._file.remove()

    @property
    def is_open(self) -> bool:
        """Whether a client is connected."""
        return self._clients > 0

    # -- listening

    def _bind(self) -> socket.socket:
        chardev = self._chardev
        if chardev.path is None:
            return _bind_inet(chardev.host or "", chardev.port or "0")
        if chardev.abstract:
            listener = socket.socket(socket.AF_UNIX)
            with _closed_on_error(listener, f"Failed to bind socket to {chardev.path}"):
                listener.bind("\0" + chardev.path)
                listener.listen(_BACKLOG)
            return listener
        self._file = _SocketFile(chardev.path)
        return self._file.bind(int(chardev.mode, 8) if chardev.mode else None)

    async def _listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._server = await asyncio.start_server(
            self._accepted, sock=listener, limit=_STREAM_LIMIT, backlog=_BACKLOG
        )

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._serve(Streams(reader, writer)))

    # -- connections that are there or that are made

    async def _start_fd(self, text: str) -> None:
        prefix = f"File descriptor '{text}'"
        try:
            connection = socket.socket(fileno=int(text))
        except ValueError:
            raise BlockError(f"{prefix} is not a number") from None
        except OSError as error:
            raise BlockError.from_os_error(prefix, error) from None
        os.set_inheritable(connection.fileno(), False)
        connection.setblocking(False)
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            await self._listen(connection)
            return
        self._spawn(self._serve(await _streams(connection)))

    async def _start_client(self) -> None:
        try:
            streams = await self._connect()
        except BlockError:
            if not self._chardev.reconnect:
                raise
            streams = None
        self._spawn(self._serve_connecting(streams))

    async def _serve_connecting(self, streams: Streams | None) -> None:
        """Serve the peer we connect to, and connect again when it leaves, if that is wanted."""
        while True:
            if streams is not None:
                await self._serve(streams)
            if not self._chardev.reconnect or self._closing:
                return
            await asyncio.sleep(self._chardev.reconnect)
            try:
                streams = await self._connect()
            except BlockError as error:
                _log.debug("chardev %s: %s", self._chardev.id, error)
                streams = None

    async def _connect(self) -> Streams:
        chardev = self._chardev
        if chardev.path is None:
            where = f"{chardev.host or 'localhost'}:{chardev.port}"
            _check_port(chardev.port or "")
            try:
                found = await asyncio.open_connection(
                    chardev.host or "localhost", chardev.port, limit=_STREAM_LIMIT
                )
            except OSError as error:
                raise BlockError.from_os_error(f"Failed to connect to '{where}'", error) from None
            return Streams(*found)
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        with _closed_on_error(connection, f"Failed to connect to '{chardev.path}'"):
            if chardev.abstract:
                connection.connect("\0" + chardev.path)
            else:
                with _short_path(chardev.path) as path:
                    connection.connect(path)  # of a UNIX socket: never waits
        return await _streams(connection)

    # -- serving

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, streams: Streams) -> None:
        self._connected.set()
        if self._closing:
            streams.writer.close()
            return
        self._clients += 1
        try:
            if self._make_readline is not None:
                await self._make_readline(self._context).run(*streams)
            else:
                await self._serve_control(streams)
        finally:
            self._clients -= 1

    async def _serve_control(self, streams: Streams) -> None:
        session = Session(self._context, pretty=self._pretty)
        self._sessions.add(session)
        try:
            await session.serve(streams)
        finally:
            self._sessions.discard(session)


async def _streams(connection: socket.socket) -> Streams:
    return Streams(*await asyncio.open_connection(sock=connection, limit=_STREAM_LIMIT))


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket, prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        sock.close()
        raise BlockError.from_os_error(prefix, error) from None
    except BaseException:
        sock.close()
        raise


def _check_port(port: str) -> None:
    if port.isdecimal() and int(port) > 0xFFFF:  # the C library would take the low 16 bits
        raise BlockError(f"port {port} is out of range")


def _bind_inet(host: str, port: str) -> socket.socket:
    where = f"{host}:{port}"
    _check_port(port)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        reason = error.strerror or str(error)
        raise BlockError(f"address resolution failed for {where}: {reason}") from None
    listener = socket.socket(family, kind)
    with _closed_on_error(listener, f"Failed to find an available port: {where}"):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    return listener


@contextlib.contextmanager
def _short_path(path: str) -> Iterator[str]:
    """A name for ``path`` that fits into a socket address, through its directory's descriptor."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{fd}/{name}"
        if len(os.fsencode(short)) > _SUN_PATH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        yield short
    finally:
        os.close(fd)


class _SocketFile:
    """The file of a listening socket; knows whether what is there is still its own."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._shown = path
        self._identity: tuple[int, int] | None = None

    def bind(self, mode: int | None) -> socket.socket:
        """A listening socket at the path; ``mode`` are the permissions, else those of umask."""
        listener = socket.socket(socket.AF_UNIX)
        prefix = f"Failed to bind socket to {self._shown}"
        with _closed_on_error(listener, prefix), _short_path(self._path) as short:
            self._remove_stale(short)
            # From bind on the file is there: without the umask anybody could connect before chmod.
            umask = os.umask(0o777 & ~mode) if mode is not None else None
            try:
                listener.bind(short)
            finally:
                if umask is not None:
                    os.umask(umask)
            listener.listen(_BACKLOG)  # at once: who sees the file connects to it
            self._identity = self._look()
        return listener

    def remove(self) -> None:
        """Remove the file if it is the one that ``bind`` made."""
        if self._identity is not None and self._look() == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._identity = None

    def _remove_stale(self, short: str) -> None:
        """Remove a socket that nobody listens on; OSError when it is anything else."""
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            reason = probe.connect_ex(short)
        if reason != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        os.unlink(self._path)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except OSError:
            return None
        return found.st_dev, found.st_ino
