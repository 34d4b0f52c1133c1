"""Requests of one kind and one length that stand one behind the other: taken apart at once.

Specification: NBD doc/proto.md, "Request message", "Simple reply message", "Structured reply chunk
message".

Pure. What a guest with many requests in flight sends is mostly that, and one call for all of them
costs a third of one call each. A run has ``LEAST`` requests at least; none of them has flags, and
nothing else was checked. Errors: none; what is no run is None.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from liveblockd.nbd.constants import REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, Command
from liveblockd.nbd.transmission import REQUEST_SIZE

#: requests
LEAST: Final = 3

_WORD: Final = struct.Struct(">Q")
#: magic, flags (none) and command as one number
_PLAIN: Final = REQUEST_MAGIC << 32
_WRITE: Final = int(Command.WRITE)
_NO_ERROR: Final = struct.pack(">II", SIMPLE_REPLY_MAGIC, 0)


class Run(NamedTuple):
    """Requests of one length; ``cookies`` as they stand in the bytes."""

    cookies: Sequence[bytes]
    offsets: Sequence[int]  # bytes

    def first(self, count: int) -> Run:
        """As many of them."""
        return Run(self.cookies[:count], self.offsets[:count])


@lru_cache(64)
def _frames(payload: int) -> struct.Struct:
    """(magic, flags and command), cookie, offset, length of requests with ``payload`` bytes."""
    return struct.Struct(f">Q8sQI{payload}x")


def find_run(
    view: memoryview, position: int, end: int, command: int, length: int, most: int
) -> Run | None:
    """The requests like the one at ``position``, which has this command and length (bytes).

    Whole ones before ``end``, ``most`` of them.
    """
    payload = length if command == _WRITE else 0
    frame = REQUEST_SIZE + payload
    count = min(most, (end - position) // frame)
    if count < LEAST:
        return None
    plain = _PLAIN | command
    # Whether it is worth the while: where requests are mixed, the next one mostly is another.
    if _WORD.unpack_from(view, position + frame)[0] != plain:
        return None
    every = _frames(payload).iter_unpack(view[position : position + count * frame])
    heads, cookies, offsets, lengths = zip(*every, strict=True)
    run = Run(cookies, offsets)
    if heads.count(plain) == count and lengths.count(length) == count:
        return run
    alike = 1
    while heads[alike] == plain and lengths[alike] == length:
        alike += 1
    return run.first(alike) if alike >= LEAST else None


def payloads(view: memoryview, position: int, length: int, count: int) -> list[memoryview]:
    """What the first ``count`` WRITEs of a run from ``position`` on store."""
    frame, start = REQUEST_SIZE + length, position + REQUEST_SIZE
    return [view[at : at + length] for at in range(start, start + count * frame, frame)]


def write_replies(cookies: Sequence[bytes]) -> bytes:
    """The replies to WRITEs that went well."""
    return _NO_ERROR + _NO_ERROR.join(cookies)
