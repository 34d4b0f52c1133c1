"""The first eight bytes of many clusters with one system call.

Specification: io_submit(2), io_getevents(2) (Linux AIO); preadv2(2) RWF_NOWAIT.

Whether a cluster is all zeros is settled by its first word nearly always, so a copy that leaves the
bytes to the kernel needs to see no more of them. One read a cluster would do, but each gives the
GIL away and has to get it back; with buffered files io_submit makes all the reads before it
returns, and the GIL is given away once.

Runs on: workers. Each thread has an AIO context and buffers of its own.

Invariants: a word is given only if the page cache has it, so that nobody waits for a disk in small
steps; past the end of a file words are zero. No read is under way on return.

Errors: none; None where the words are not to be had like this (no AIO, not in the page cache, a
read error), and who asks reads the clusters whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import threading
from collections.abc import Sequence
from errno import EINTR
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from liveblockd.storage import hostcalls

Offsets = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

#: words that are asked for at a time at most
MOST: Final = 128
WORD: Final = 8  # bytes

#: io_setup, io_destroy, io_submit, io_getevents; libc has no functions for them
_NUMBERS: Final = {
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
    "riscv64": (0, 1, 2, 4),
}.get(platform.machine() if sys.byteorder == "little" and sys.maxsize > 1 << 32 else "")

_PREAD: Final = 0  # IOCB_CMD_PREAD
_IOCB: Final = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<i4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("fd", "<u4"),
        ("buffer", "<u8"),
        ("length", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_fd", "<u4"),
    ]
)
_EVENT: Final = np.dtype([("data", "<u8"), ("iocb", "<u8"), ("result", "<i8"), ("more", "<i8")])

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class _Reader:
    """An AIO context with room for ``MOST`` reads."""

    def __init__(self, numbers: tuple[int, int, int, int]) -> None:
        """Raises OSError where the kernel gives no context."""
        setup, self._destroy, self._submit, self._get_events = numbers
        context = ctypes.c_ulong(0)
        if _syscall(setup, ctypes.c_ulong(MOST), ctypes.byref(context)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._context = context
        self._words = np.zeros(MOST, np.uint64)
        self._requests = np.zeros(MOST, _IOCB)
        self._events = np.zeros(MOST, _EVENT)
        self._requests["opcode"] = _PREAD
        self._requests["length"] = WORD
        self._requests["buffer"] = _address(self._words) + WORD * np.arange(MOST)
        self._pointers = _address(self._requests) + _IOCB.itemsize * np.arange(MOST)
        self._list = ctypes.c_void_p(_address(self._pointers))
        # Looked up once: each of these costs more than the read of a word.
        self._fds = self._requests["fd"]
        self._offsets = self._requests["offset"]
        self._flags = self._requests["rw_flags"]
        self._results = self._events["result"]
        self._answers = _address(self._events)
        self._broken = False

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with contextlib.suppress(Exception):
                self.close()

    def close(self) -> None:
        """Give the context back; what is under way ends first."""
        if self._context.value:
            _syscall(self._destroy, self._context)
            self._context.value = 0

    def read(self, fds: npt.ArrayLike, offsets: Offsets, flags: npt.ArrayLike) -> Words | None:
        """A copy of the words, or None."""
        count = len(offsets)
        if self._broken:
            return None
        words = self._words[:count]
        self._fds[:count] = fds
        self._offsets[:count] = offsets
        self._flags[:count] = flags
        words[:] = 0
        begun = _syscall(self._submit, self._context, ctypes.c_long(count), self._list)
        if begun <= 0:
            return None
        if not self._wait(begun):
            self._broken = True
            self.close()
            return None
        if begun < count or int(self._results[:begun].min()) < 0:
            return None
        return words.copy()

    def _wait(self, count: int) -> bool:
        """Until ``count`` reads have ended; False if that cannot be known."""
        done = 0
        while done < count:
            left = count - done
            found = _syscall(
                self._get_events,
                self._context,
                ctypes.c_long(left),
                ctypes.c_long(left),
                ctypes.c_void_p(self._answers + done * _EVENT.itemsize),
                None,
            )
            if found < 0 and ctypes.get_errno() == EINTR:
                continue
            if found <= 0:
                return False
            done += found
        return True


class _Local(threading.local):
    reader: _Reader | None = None
    tried = False


_local = _Local()


def _reader() -> _Reader | None:
    if not _local.tried:
        _local.tried = True
        if _NUMBERS is not None:
            with contextlib.suppress(OSError):
                _local.reader = _Reader(_NUMBERS)
    return _local.reader


def nowait_flags(fd: int) -> int:
    """Flags of a read that must not wait: tmpfs takes none, and never waits."""
    memory = hostcalls.filesystem_type(fd) in (hostcalls.TMPFS_MAGIC, hostcalls.RAMFS_MAGIC)
    return 0 if memory else os.RWF_NOWAIT


def first_words(fd: int, offset: int, count: int, step: int) -> Words | None:
    """The words at ``offset`` and each ``step`` bytes further, ``count`` of them; or None."""
    places = np.arange(count, dtype=np.int64) * step + offset
    return _in_parts(fd, places, nowait_flags(fd))


def first_words_of(pieces: Sequence[tuple[int, int, int]], step: int) -> Words | None:
    """The same of (descriptor, offset, count) in turn, one after the other; or None."""
    flags = {fd: nowait_flags(fd) for fd in {piece[0] for piece in pieces}}
    fds, starts, counts = np.array(pieces, np.int64).reshape(-1, 3).T
    before = np.cumsum(counts) - counts
    places = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(before, counts)
    return _in_parts(
        np.repeat(fds, counts),
        places * step + np.repeat(starts, counts),
        np.repeat(np.array([flags[piece[0]] for piece in pieces]), counts),
    )


def _in_parts(
    fds: int | npt.NDArray[np.int64], places: Offsets, flags: int | npt.NDArray[np.int64]
) -> Words | None:
    reader = _reader()
    if reader is None:
        return None
    if len(places) <= MOST:
        return reader.read(fds, places, flags)
    parts: list[Words] = []
    for start in range(0, len(places), MOST):
        part = slice(start, start + MOST)
        words = reader.read(
            fds if isinstance(fds, int) else fds[part],
            places[part],
            flags if isinstance(flags, int) else flags[part],
        )
        if words is None:
            return None
        parts.append(words)
    return np.concatenate(parts)
