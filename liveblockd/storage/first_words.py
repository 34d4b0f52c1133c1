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

    def read(self, fds: npt.ArrayLike, offsets: Offsets, flags: int) -> Words | None:
        """A copy of the words, or None."""
        count = len(offsets)
        if self._broken:
            return None
        requests, words = self._requests[:count], self._words[:count]
        requests["fd"] = fds
        requests["offset"] = offsets
        requests["rw_flags"] = flags
        words[:] = 0
        begun = _syscall(
            self._submit,
            self._context,
            ctypes.c_long(count),
            self._list,
        )
        if begun <= 0:
            return None
        if not self._wait(begun):
            self._broken = True
            self.close()
            return None
        if begun < count or int(self._events["result"][:begun].min()) < 0:
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
                ctypes.c_void_p(_address(self._events) + done * _EVENT.itemsize),
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
    reader = _reader()
    if reader is None:
        return None
    flags = nowait_flags(fd)
    parts: list[Words] = []
    for start in range(0, count, MOST):
        places = np.arange(start, min(start + MOST, count), dtype=np.int64) * step + offset
        words = reader.read(fd, places, flags)
        if words is None:
            return None
        parts.append(words)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
