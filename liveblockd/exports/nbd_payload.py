"""The payload of a large WRITE on its way in.

Where the backend stores bytes at once, pieces are stored as they come, out of one buffer that stays
in the processor's cache: a large payload neither needs memory of its own nor goes through the
memory bus twice more. The first piece that would have to wait ends that: the rest is collected and
becomes a request of its own for the coroutine.

Runs on the loop. Invariants: pieces are stored in order, and end where a cluster may end, so that
none is cut into two writes; the reply comes after the last one. Before the reply any part of the
payload may be on the disk, whatever becomes of the client, as with any disk. After an error nothing
more is stored; the rest is still received. Errors: none escape; ``error`` has that of a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from liveblockd.exports.backend import Buffer
from liveblockd.nbd.transmission import Request
from liveblockd.storage.hostcalls import new_buffer

#: bytes of the largest piece
PIECE: Final = 256 << 10
#: pieces end at a multiple of this, on the disk
BOUNDARY: Final = 64 << 10

#: ``write_nowait`` of a backend
Store = Callable[[int, Buffer], bool]


class Payload:
    """Of one request; without ``store`` it is collected whole.

    ``chunk`` has ``PIECE`` bytes, for this payload alone until it is complete.
    """

    __slots__ = ("_chunk", "_received", "_store", "_window", "error", "request", "stored")

    def __init__(self, request: Request, store: Store | None, chunk: memoryview) -> None:
        self.request = request
        #: bytes that the backend has, or was not to have because of ``error``
        self.stored = 0
        self.error: Exception | None = None
        self._store = store
        self._chunk = chunk
        self._received = 0  # of the window
        self._window = self._next() if store else memoryview(new_buffer(request.length))

    def _next(self) -> memoryview:
        position = self.request.offset + self.stored
        length = min(PIECE - position % BOUNDARY, self.request.length - self.stored)
        return self._chunk[:length]

    @property
    def room(self) -> memoryview:
        """Where the next bytes go."""
        return self._window[self._received :]

    def put(self, data: memoryview) -> None:
        """Take bytes that were received elsewhere, fewer than are missing."""
        while len(data):
            room = self.room
            part = min(len(room), len(data))
            room[:part] = data[:part]
            self.arrived(part)
            data = data[part:]

    def arrived(self, count: int) -> bool:
        """So many bytes were received into ``room``; whether that was the last of them."""
        self._received += count
        if self._received < len(self._window):
            return False
        if self._store is None:
            return True
        if self.error is None:
            try:
                stored = self._store(self.request.offset + self.stored, self._window)
            except Exception as error:
                self.error = error
            else:
                if not stored:
                    return self._collect()
        self.stored += self._received
        self._received = 0
        self._window = self._next()
        return not len(self._window)

    def _collect(self) -> bool:
        self._store = None
        rest = memoryview(new_buffer(self.request.length - self.stored))
        rest[: self._received] = self._window
        self._window = rest
        return self._received == len(rest)

    def rest(self) -> tuple[Request, Buffer] | None:
        """What is left to be written when all has come; None: everything is stored."""
        if self.stored == self.request.length:
            return None
        flags, command, cookie, offset, length = self.request
        left = Request(flags, command, cookie, offset + self.stored, length - self.stored)
        return left, self._window
