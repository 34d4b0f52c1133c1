"""The socket of a client, used beside the transport that owns it.

Replies are sent by one system call at once, without a turn of the event loop and without a copy
into a buffer of the transport; what the socket does not take goes that way after all. And bytes
can be received early, before the loop sees them (``polling`` says when that is worth it).

Specification: sendmsg(2), recv(2).

Runs on the loop. Invariants: nothing is sent here while the transport has something to send, so
the order stays. Whatever ends a connection (an error, the end of the stream) is left for the
transport to find: it finds it again. The socket is the transport's, which closes it: after that
the calls here fail and do nothing. Errors: none escape.
"""

from __future__ import annotations

import asyncio
import socket
from time import perf_counter_ns
from typing import Final

from liveblockd.exports.backend import Buffer

#: buffers that one system call sends at most (IOV_MAX)
MAX_VECTOR: Final = 1024


class Line:
    """Of one client."""

    __slots__ = ("_receive", "_send", "_transport", "_unsent", "at_once")

    def __init__(self, connected: socket.socket, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._send, self._receive = connected.sendmsg, connected.recv_into
        self._unsent = transport.get_write_buffer_size
        #: batches that went past the transport, whole
        self.at_once = 0

    @property
    def unsent(self) -> int:
        """Bytes that wait until the client reads."""
        return self._unsent()

    def write(self, out: list[Buffer]) -> None:
        """Send all of it, now or when the client reads."""
        if not self._unsent() and len(out) <= MAX_VECTOR:
            try:
                sent = self._send(out)
            except OSError:  # full; or broken
                sent = 0
            if sent:
                if sent == sum(map(len, out)):
                    self.at_once += 1
                    return
                out = rest(out, sent)
        self._transport.writelines(out)

    def look(self, room: memoryview, nanoseconds: int) -> int:
        """Receive what comes within this time, which is spent here; bytes, 0 for nothing.

        -1: the connection is at its end.
        """
        until = 0
        while True:
            try:
                return self._receive(room) or -1
            except BlockingIOError:
                now = perf_counter_ns()
                if not until:
                    until = now + nanoseconds
                elif now >= until:
                    return 0
            except OSError:
                return -1


class SecureLine(Line):
    """Of a client that speaks TLS: its transport alone knows what goes over the socket."""

    __slots__ = ()

    def write(self, out: list[Buffer]) -> None:
        """Send all of it."""
        self._transport.writelines(out)

    def look(self, room: memoryview, nanoseconds: int) -> int:  # noqa: ARG002
        """Nothing: what is on the socket is not for us."""
        return 0


def rest(out: list[Buffer], sent: int) -> list[Buffer]:
    """What is left of ``out`` after its first ``sent`` bytes."""
    for number, buffer in enumerate(out):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *out[number + 1 :]]
        sent -= len(buffer)
    return []
