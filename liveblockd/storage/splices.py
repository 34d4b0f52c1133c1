"""Copies of many small pieces between files in memory, with a few waits for the GIL.

Specification: splice(2), pipe(7) "Pipe capacity".

Each system call of a worker gives the GIL away and has to get it back; what takes 27 us, such as
copy_file_range(2) of a cluster of 64 KiB, then waits longer than it works while the event loop and
other workers have something to compute. Here pages of many pieces are put into a pipe, which
copies nothing and takes so little that the GIL is kept, and one call writes them all. The kernel
does the same for copy_file_range, 64 KiB at a time, so the work is the same.

Runs on: workers; each thread has a pipe of its own. Only between files in memory: with the GIL kept
nobody may wait for a disk.

Invariants: source and target ranges are whole pages. Nothing is left in the pipe on return: one
that may not be empty is closed.

Errors: ``HaltedError`` where nobody wants it any more; else none: who asks is told how many were
copied, and finds out what is wrong with the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

from liveblockd.runtime import halting
from liveblockd.storage.gate import Gate
from liveblockd.storage.hostcalls import PAGE
from liveblockd.storage.pages import Run

#: bytes of a pipe: what anybody may ask for; with less it is not worth it
CAPACITY: Final = 1 << 20
LEAST_CAPACITY: Final = 256 << 10
#: bytes; of longer runs one call each is as good
LONG: Final = 1 << 20

_SET_SIZE: Final = getattr(fcntl, "F_SETPIPE_SZ", 1031)
_NONBLOCK: Final = 2  # SPLICE_F_NONBLOCK: a full pipe is no reason to wait


def _call(library: type[ctypes.CDLL]) -> Any:
    function = getattr(library(None), "splice", None)  # not every libc has it
    if function is not None:
        function.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_uint,
        )
        function.restype = ctypes.c_ssize_t
    return function


_fill: Final = _call(ctypes.PyDLL)  # keeps the GIL
_drain: Final = _call(ctypes.CDLL)


class _Pipe:
    """Of one thread."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._out, self._in = os.pipe()
        self.capacity = 0
        with contextlib.suppress(OSError):  # the user has too many
            self.capacity = fcntl.fcntl(self._in, _SET_SIZE, CAPACITY)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """With all that is in it."""
        ends, self._out, self._in = (self._out, self._in), -1, -1
        for end in ends:
            if end >= 0:
                os.close(end)

    def copy(self, runs: Sequence[Run], fd: int, gate: Gate) -> int:
        """How many of the runs, from the first on, are copied. What is in the pipe is a mess then,
        unless it is all of them.
        """
        copied = filled = 0
        limit = min(gate.piece(), self.capacity)
        place = ctypes.c_int64()
        address = ctypes.addressof(place)
        begin = end = runs[0].offset  # of what is in the pipe: where it goes
        for source, source_offset, offset, length in runs:
            if offset != end:
                if not self._write(fd, begin, end):
                    return copied
                copied, begin, end = filled, offset, offset
            done = 0
            while done < length:
                part = min(length - done, begin + limit - end)
                count = 0
                if part > 0:
                    place.value = source_offset + done
                    count = _fill(source, address, self._in, None, part, _NONBLOCK)
                if count > 0:
                    done, end = done + count, end + count
                    continue
                # Full, or not to be had: with an empty pipe that is plain.
                if end == begin or not self._write(fd, begin, end):
                    return copied
                copied, begin = filled, end
                limit = min(gate.piece(), self.capacity)
            filled += 1
        return filled if self._write(fd, begin, end) else copied

    def _write(self, fd: int, begin: int, end: int) -> bool:
        """All that is in the pipe."""
        place = ctypes.c_int64(begin)
        while place.value < end:
            halting.check()
            if _drain(self._out, None, fd, ctypes.addressof(place), end - place.value, 0) <= 0:
                return False
        return True


class _Local(threading.local):
    pipe: _Pipe | None = None


_local = _Local()


def splice_runs(runs: Sequence[Run], fd: int, gate: Gate) -> int:
    """Copy runs between files in memory, in order; how many are copied.

    With ``gate.turn``.
    """
    if _fill is None or not runs or any((r[1] | r[2] | r[3]) % PAGE for r in runs):
        return 0
    pipe = _local.pipe
    if pipe is None:
        try:
            pipe = _local.pipe = _Pipe()
        except OSError:  # no descriptors
            return 0
    if pipe.capacity < LEAST_CAPACITY:
        return 0
    copied = 0
    try:
        copied = pipe.copy(runs, fd, gate)
    finally:
        if copied < len(runs):
            _local.pipe = None
            pipe.close()
    return copied
