"""Requests of one kind and one length that came together, done together.

Specification: NBD doc/proto.md, "Transmission"; ``nbd/runs`` takes them apart.

Runs on the loop, on the request path; nothing waits. What the backend does not do in one go is left
to the way of each single request, and where that is what a client needs, runs are not looked for
for a while. Invariant: replies go out in the order of the requests, each after what it tells of. No
errors escape: a backend that raises is asked again for one request at a time, which tells of it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from liveblockd.exports.nbd_commands import HOLE_MINIMUM
from liveblockd.nbd.constants import (
    CHUNK_DONE,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
)
from liveblockd.nbd.runs import LEAST, find_run, payloads, write_replies
from liveblockd.nbd.transmission import REQUEST_SIZE

if TYPE_CHECKING:
    from liveblockd.exports.backend import Buffer
    from liveblockd.exports.nbd_commands import Session

#: rounds without a look for runs after one of which nothing could be done
PAUSE: Final = 32

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
#: magic, flags, type, cookie, bytes that follow, offset
_pack_data: Final = struct.Struct(">IHH8sIQ").pack
_OFFSET_DATA: Final = int(ChunkType.OFFSET_DATA)
_NO_ERROR: Final = struct.pack(">II", SIMPLE_REPLY_MAGIC, 0)


class Alike:
    """A part of ``NbdConnection``."""

    session: Session | None
    _view: memoryview
    _end: int
    _out: list[Buffer]
    _round_bytes: int
    #: requests that were done with others
    alike = 0
    #: whether runs are looked for in this round, and rounds until they are again
    _runs = False
    _runs_after = 0

    def _expect_runs(self, served: int) -> None:
        """A round begins; the one before it had so many requests."""
        self._runs = served >= LEAST and not self._runs_after
        if self._runs_after:
            self._runs_after -= 1

    def _done_alike(self, command: int, position: int, length: int, most: int) -> int:
        """How many requests like the one at ``position`` were done, ``most`` of them.

        0: that one goes its own way.
        """
        session = self.session
        assert session is not None
        try:
            if command == _WRITE:
                done, found = self._alike_writes(session, position, length, most)
            elif command == _READ and length < HOLE_MINIMUM:
                done, found = self._alike_reads(session, position, length, most)
            else:
                return 0
        except Exception:
            done, found = 0, 1
        if done < found:
            self._runs = False
            if not done:
                self._runs_after = PAUSE
        self.alike += done
        return done

    def _alike_writes(
        self, session: Session, position: int, length: int, most: int
    ) -> tuple[int, int]:
        """How many were done of how many."""
        run = find_run(self._view, position, self._end, _WRITE, length, most)
        if run is None:
            return 0, 0
        parts = payloads(self._view, position, length, len(run.offsets))
        done = session.export.backend.write_many_nowait(run.offsets, parts)
        if done:
            self._out.append(write_replies(run.cookies[:done]))
        return done, len(parts)

    def _alike_reads(
        self, session: Session, position: int, length: int, most: int
    ) -> tuple[int, int]:
        """How many were done of how many."""
        most = min(most, self._round_bytes // length)
        run = find_run(self._view, position, self._end, _READ, length, most)
        if run is None:
            return 0, 0
        found = session.export.backend.read_many_nowait(run.offsets, length)
        self._round_bytes -= len(found) * length
        out, every = self._out, zip(found, run.cookies, run.offsets, strict=False)
        if session.structured:
            after = length + 8
            for data, cookie, offset in every:
                out += (
                    _pack_data(
                        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _OFFSET_DATA, cookie, after, offset
                    ),
                    data,
                )
        else:
            for data, cookie, _ in every:
                out += (_NO_ERROR + cookie, data)
        return len(found), len(run.offsets)


def frame(command: int, length: int) -> int:
    """Bytes that a request of this length takes in the buffer."""
    return REQUEST_SIZE + length if command == _WRITE else REQUEST_SIZE
