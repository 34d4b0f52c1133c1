"""Copies of workers that read straight into the pages of a file in memory.

Specification: mmap(2) MAP_SHARED; ``many_requests``.

The kernel lets one write to a file at a time. On tmpfs, where a write is all that a copy waits for,
one processor is all that a copy can use. A read into a mapping of the file takes no such lock, and
many of them are one system call. Nobody but the kernel touches the mapping: where a page is not
to be had (no space, a file cut off) that is an error of the read and no SIGBUS.

Runs on: workers.

Invariants: files only grow, and never shrink, by this; all is unmapped on return.

Errors: none; False where some was not copied, whatever the reason: who asks copies it otherwise.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from liveblockd.storage import hostcalls
from liveblockd.storage.many_requests import MOST, context

#: bytes that are mapped at a time: the mapped pages count as memory of this process
WINDOW: Final = 8 << 20

#: Copies like this at a time, in all: one more than there are processors for makes all slower.
places = threading.BoundedSemaphore(max(1, len(os.sched_getaffinity(0)) - 1))

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap64 if hasattr(_libc, "mmap64") else _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED: Final = ctypes.c_void_p(-1).value


class Run(NamedTuple):
    """Bytes at ``source_offset`` of a buffered file that go to ``offset`` of another."""

    source_fd: int
    source_offset: int
    offset: int
    length: int


def takes_pages(fd: int) -> bool:
    """Whether a copy to this file gains by it: what would be written back would cost more."""
    return stat.S_ISREG(os.fstat(fd).st_mode) and hostcalls.is_in_memory(fd)


def read_into_pages(runs: Sequence[Run], fd: int) -> bool:
    """Copy all runs into one file, for which ``takes_pages`` holds; False if some were not."""
    end = max((run.offset + run.length for run in runs), default=0)
    try:
        if os.fstat(fd).st_size < end and not hostcalls.grow(fd, end):
            return False
    except OSError:
        return False
    return all(_read_window(window, fd) for window in _windows(runs))


def _windows(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs, cut and in groups, each within ``WINDOW`` bytes of the target."""
    group: list[Run] = []
    low = high = 0
    for source_fd, source_offset, offset, length in runs:
        done = 0
        while done < length:
            start = offset + done
            if group and (len(group) == MOST or not high - WINDOW < start < low + WINDOW):
                yield group
                group = []
            if not group:
                low = high = start
            part = min(length - done, WINDOW - max(0, start - low))
            low, high = min(low, start), max(high, start + part)
            group.append(Run(source_fd, source_offset + done, start, part))
            done += part
    if group:
        yield group


def _read_window(runs: list[Run], fd: int) -> bool:
    own = context()
    if own is None:
        return False
    table = np.array(runs, np.int64)
    fds, source_offsets, offsets, lengths = table.T
    begin = int(offsets.min()) // mmap.PAGESIZE * mmap.PAGESIZE
    length = int((offsets + lengths).max()) - begin
    address = _mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, begin)
    if address == _FAILED or address is None:
        return False
    try:
        addresses = (offsets - begin + address).astype(np.uint64)
        found = own.read(fds, source_offsets, addresses, lengths, 0)
    finally:
        _munmap(address, length)
    return found is not None and bool((found == lengths).all())
