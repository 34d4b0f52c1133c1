"""Many reads of host files, or writes, with one system call.

Specification: io_submit(2), io_getevents(2) (Linux AIO); preadv2(2) RWF_NOWAIT.

Each system call of a worker gives the GIL away and has to get it back, which among busy threads
costs more than a read of some KiB. With buffered files io_submit makes all the requests before it
returns, and the GIL is given away once.

Runs on: workers. Each thread has an AIO context of its own.

Invariants: no request is under way on return; what is read to or written is memory of the caller
until then.

Errors: none; None where nobody can know what was done (no AIO, a descriptor that takes no such
request); who asks does it one by one then, and finds out what is wrong.
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

Integers = npt.NDArray[np.int64]
Unsigned = npt.NDArray[np.uint64]

#: requests of one call at most
MOST: Final = 256

#: io_setup, io_destroy, io_submit, io_getevents; libc has no functions for them
_NUMBERS: Final = {
    "x86_64": (206, 207, 209, 208),
    "aarch64": (0, 1, 2, 4),
    "riscv64": (0, 1, 2, 4),
}.get(platform.machine() if sys.byteorder == "little" and sys.maxsize > 1 << 32 else "")

_PREAD: Final = 0  # IOCB_CMD_PREAD
_PWRITE: Final = 1  # IOCB_CMD_PWRITE
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


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the first byte lies in memory."""
    address: int = array.__array_interface__["data"][0]
    return address


class Context:
    """An AIO context with room for ``MOST`` requests."""

    def __init__(self, numbers: tuple[int, int, int, int]) -> None:
        """Raises OSError where the kernel gives no context."""
        setup, self._destroy, self._submit, self._get_events = numbers
        context = ctypes.c_ulong(0)
        if _syscall(setup, ctypes.c_ulong(MOST), ctypes.byref(context)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._context = context
        self._requests = np.zeros(MOST, _IOCB)
        self._events = np.zeros(MOST, _EVENT)
        self._requests["data"] = np.arange(MOST)
        self._pointers = address_of(self._requests) + _IOCB.itemsize * np.arange(MOST)
        self._list = ctypes.c_void_p(address_of(self._pointers))
        # Looked up once: each of these costs more than the read of a word.
        self._fds = self._requests["fd"]
        self._offsets = self._requests["offset"]
        self._addresses = self._requests["buffer"]
        self._lengths = self._requests["length"]
        self._flags = self._requests["rw_flags"]
        self._opcodes = self._requests["opcode"]
        self._numbers = self._events["data"]
        self._results = self._events["result"]
        self._answers = address_of(self._events)
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

    def read(
        self,
        fds: npt.ArrayLike,
        offsets: Integers,
        addresses: Unsigned,
        lengths: npt.ArrayLike,
        flags: npt.ArrayLike,
    ) -> Integers | None:
        """Of each read (at most ``MOST``) the bytes, or an errno below 0; offsets in bytes.

        ``flags`` are those of preadv2(2).
        """
        return self._transfer(_PREAD, fds, offsets, addresses, lengths, flags)

    def write(
        self, fd: int, offsets: Integers, addresses: Unsigned, lengths: npt.ArrayLike
    ) -> Integers | None:
        """The same of writes to one file."""
        return self._transfer(_PWRITE, fd, offsets, addresses, lengths, 0)

    def _transfer(
        self,
        opcode: int,
        fds: npt.ArrayLike,
        offsets: Integers,
        addresses: Unsigned,
        lengths: npt.ArrayLike,
        flags: npt.ArrayLike,
    ) -> Integers | None:
        count = len(offsets)
        if self._broken:
            return None
        self._opcodes[:count] = opcode
        self._fds[:count] = fds
        self._offsets[:count] = offsets
        self._addresses[:count] = addresses
        self._lengths[:count] = lengths
        self._flags[:count] = flags
        begun = _syscall(self._submit, self._context, ctypes.c_long(count), self._list)
        if begun <= 0:
            return None
        if not self._wait(begun):
            self._broken = True
            self.close()
            return None
        if begun < count:
            return None
        results = np.empty(count, np.int64)
        results[self._numbers[:count]] = self._results[:count]
        return results

    def _wait(self, count: int) -> bool:
        """Until ``count`` requests have ended; False if that cannot be known."""
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
    context: Context | None = None
    tried = False


_local = _Local()


def context() -> Context | None:
    """That of this thread; None where there is none to be had."""
    if not _local.tried:
        _local.tried = True
        if _NUMBERS is not None:
            with contextlib.suppress(OSError):
                _local.context = Context(_NUMBERS)
    return _local.context
