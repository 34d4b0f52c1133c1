"""Listening sockets for the addresses of commands and options.

Specification: qapi/sockets.json.

Runs on the loop. A socket file in the way is replaced only if nobody listens on it; any other file
is left alone. Errors: ``BlockError`` with QEMU's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.qapi.sockets import (
    FdSocketAddress,
    InetSocketAddress,
    PlainAddress,
    UnixSocketAddress,
)

#: room for a path in a socket address, with its NUL
SUN_PATH: Final = 108


@dataclass(slots=True)
class Listeners:
    """Listening sockets and, of a UNIX socket, the file to remove at the end."""

    sockets: list[socket.socket]
    path: str | None = None
    inode: tuple[int, int] | None = field(default=None)

    def close(self) -> None:
        """Close the sockets; remove the file if it is still the one we made."""
        for listener in self.sockets:
            listener.close()
        if self.path is not None:
            with contextlib.suppress(OSError):
                found = os.stat(self.path, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == self.inode:
                    os.unlink(self.path)


async def listen(address: PlainAddress, backlog: int) -> Listeners:
    """Listen on ``address``; raises BlockError."""
    match address:
        case UnixSocketAddress():
            return _listen_unix(address, backlog)
        case InetSocketAddress():
            return Listeners(await _listen_inet(address, backlog))
        case FdSocketAddress():
            return Listeners([_inherited(address.str_)])
        case _:
            raise BlockError("vsock addresses are not supported")


def _listen_unix(address: UnixSocketAddress, backlog: int) -> Listeners:
    if len(os.fsencode(address.path)) > SUN_PATH - 1:
        raise BlockError(f"UNIX socket path '{address.path}' is too long")
    listener = socket.socket(socket.AF_UNIX)
    try:
        if address.abstract:
            name = b"\0" + os.fsencode(address.path)
            listener.bind(name if address.tight else name.ljust(SUN_PATH, b"\0"))
            path = None
        else:
            path = os.path.abspath(address.path)
            _remove_stale(address.path)
            listener.bind(address.path)
        listener.listen(backlog)  # at once: who sees the file connects to it
        inode = None
        if path is not None:
            found = os.stat(path)
            inode = (found.st_dev, found.st_ino)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise BlockError.from_os_error(f"Failed to bind socket to {address.path}", error) from error
    except BaseException:
        listener.close()
        raise
    return Listeners([listener], path, inode)


def _remove_stale(path: str) -> None:
    """Remove a socket file that a dead process left; another file is somebody's data."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BlockError(f"Failed to bind socket to {path}: a file that is no socket is there")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # somebody listens, and its queue is full
            pass
    raise BlockError(f"Failed to bind socket to {path}: Address already in use")


async def _listen_inet(address: InetSocketAddress, backlog: int) -> list[socket.socket]:
    where = f"{address.host}:{address.port}"
    flags = socket.AI_PASSIVE
    if address.numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family = socket.AF_UNSPEC
    if address.ipv4 != address.ipv6 and (address.ipv4 or address.ipv6 is False):
        family = socket.AF_INET
    elif address.ipv4 != address.ipv6:
        family = socket.AF_INET6
    if address.port.isdecimal() and int(address.port) > 65535:
        raise BlockError(f"port {address.port} is out of range")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host or None, address.port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BlockError(f"address resolution failed for {where}: {reason}") from error
    port = int(found[0][4][1])
    last = max(port, address.to or port)
    while True:
        try:
            return _bind_all(found, port, backlog)
        except OSError as error:
            if port == last:
                raise BlockError.from_os_error("Failed to bind socket", error) from error
        port += 1


def _bind_all(found: Sequence[tuple[Any, ...]], port: int, backlog: int) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, place in found:
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((place[0], port, *place[2:]))
            listener.listen(backlog)
            listener.setblocking(False)
            if not port:  # any free port: the same one for all families
                port = listener.getsockname()[1]
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _inherited(number: str) -> socket.socket:
    """A copy of an inherited descriptor, so that the server may be started again."""
    if not number.isdecimal():
        raise BlockError(f"File descriptor named '{number}' has not been found")
    try:
        listener = socket.socket(fileno=os.dup(int(number)))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BlockError(f"File descriptor '{number}' is not a socket: {reason}") from error
    (listens,) = struct.unpack(
        "i", listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN, struct.calcsize("i"))
    )
    if not listens:
        listener.close()
        raise BlockError(f"File descriptor '{number}' is not a listening socket")
    listener.setblocking(False)
    return listener
