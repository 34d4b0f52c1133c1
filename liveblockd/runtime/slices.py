"""How soon a thread of this process gets a processor when there is something for it to do.

A request takes tens of microseconds. What it waits for, where the processors are busy with copies,
with the guests themselves, or with anything else of the host, is its turn on one of them: whoever
runs there may finish its time slice first, which is looked at once a tick (4 ms at 250 Hz). Since
Linux 6.12 a thread can ask for shorter slices. That gives it no larger share, only its share in
smaller parts: it goes ahead of a longer slice at the moment in which it wakes up.

Even so a thread that has had its share waits for the tick. One that copies asks who is to go on
each time it has copied a little (``give_way``): those who wait beside it are served then.

Specification: sched_setattr(2), ``sched_runtime`` of SCHED_OTHER (Linux 6.12); sched_yield(2). No
privilege needed.

Runs on: the main thread, at the start, and threads that copy, at theirs; other threads inherit it.
No errors escape: where the kernel knows no such thing, or a sandbox forbids it, all stays as it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct
import sys
from collections.abc import Callable
from time import monotonic
from typing import Final

log = logging.getLogger(__name__)

#: nanoseconds: of the loop and of workers for requests; the least that the kernel takes
SLICE: Final = 100_000
#: the same of workers that copy: more than others have by default (0.7 to 3 ms, by the number of
#: processors), so that everybody who wakes up goes ahead of a copy, the guests themselves included
COPY_SLICE: Final = 4_000_000

#: struct sched_attr up to ``sched_period``: size, policy, flags, nice, priority, runtime, ...
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
_RESET_ON_FORK: Final = 1  # what was asked for once cannot be taken back
#: the policies in which slices mean something: SCHED_OTHER and SCHED_BATCH
_FAIR: Final = (0, 3)

#: sched_setattr and sched_getattr; not every libc has functions for them
_NUMBERS: Final = {
    "x86_64": (314, 315),
    "aarch64": (274, 275),
    "riscv64": (274, 275),
}.get(platform.machine() if sys.maxsize > 1 << 32 else "")


#: Let whoever waits for the processor of this thread have it first, if anybody does. Not that of
#: ``os``, which keeps the GIL meanwhile.
give_way: Final[Callable[[], int]] = ctypes.CDLL(None).sched_yield


#: of the time so much may be given away in the end: beside somebody who computes without end each
#: way given is a time slice
SHARE: Final = 0.1
#: seconds that may be given away at once, after which it is that share: a time slice or two
MOST_AT_ONCE: Final = 0.006
#: seconds; a way that nobody took, or that a request had, counts as nothing
NOTHING: Final = 0.00005


class Courtesy:
    """Gives way again and again, as long as that costs no more than ``SHARE`` of the time.

    One long way does not end it: it may have been the loop itself, which had something to plan, and
    a request that comes next would wait for the tick.
    """

    __slots__ = ("_credit", "_seen")

    def __init__(self) -> None:
        self._credit = MOST_AT_ONCE
        self._seen = float("-inf")

    def give_way(self, now: float) -> None:
        """``now`` is that of ``time.monotonic``."""
        self._credit = min(MOST_AT_ONCE, self._credit + (now - self._seen) * SHARE)
        self._seen = now
        if self._credit <= 0:
            return
        give_way()
        gone = monotonic() - now
        if gone > NOTHING:
            self._credit -= gone


def slice_of_thread() -> int:
    """Of the calling thread, in nanoseconds; 0 where it is not known."""
    found = _attributes()
    return 0 if found is None or found[1] not in _FAIR else int(found[5])


def ask_for_slices(nanoseconds: int) -> bool:
    """For the calling thread and those that it starts; whether the kernel was asked.

    A thread that somebody has given another policy (idle, real time) keeps what it has.
    """
    found = _attributes()
    if _NUMBERS is None or found is None or found[1] not in _FAIR:
        return False
    size, policy, flags, nice, priority, _, deadline, period = found
    wanted = _ATTRIBUTES.pack(
        size, policy, flags & _RESET_ON_FORK, nice, priority, nanoseconds, deadline, period
    )
    if _call(_NUMBERS[0], 0, ctypes.create_string_buffer(wanted, _ATTRIBUTES.size), 0):
        log.debug("no short time slices: %s", os.strerror(ctypes.get_errno()))
        return False
    return True


def _attributes() -> tuple[int, ...] | None:
    if _NUMBERS is None:
        return None
    space = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if _call(_NUMBERS[1], 0, space, _ATTRIBUTES.size, 0):
        return None
    return _ATTRIBUTES.unpack(space.raw)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    return result
