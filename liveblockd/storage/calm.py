"""Whether a small write may go into the page cache from the event loop, without a worker.

Where a file system cannot say that a buffered write would wait (RWF_NOWAIT: ext4 refuses it), there
are two ways: a worker for every write, some 50 us, or the system call itself, some 2 us, on the
loop. The second is right as long as the kernel only copies. It waits when too much is dirty: then
``balance_dirty_pages`` makes writers sleep, up to 200 ms at a time; and when somebody else holds
the inode or a journal transaction. So: the kernel's own figures are looked at now and then, and
after a write that took long there is none from the loop for a while, four times as long each time
that happens soon again: a disk cannot take more than a small part of the loop's time.

Specification: proc_vmstat(5), Documentation/admin-guide/sysctl/vm (dirty_background_ratio).

Runs on: the event loop. Invariant: no wait. No errors escape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

#: nanoseconds: a longer write has waited for something: for a disk, or its thread for a processor
SLOW: Final = 2_000_000
#: no write from the loop for so many times as long as the slow one took
REST: Final = 2
#: times longer, when the next slow one comes within so many writes: what waits for a disk does so
#: again and again, a thread that lost its processor does not
LONGER: Final = 4
SOON: Final = 64
#: nanoseconds: the longest rest
LONGEST_REST: Final = 30_000_000_000
#: nanoseconds between two looks at the kernel's figures, which take about 50 us
LOOK_EVERY: Final = 50_000_000

VMSTAT: Final = "/proc/vmstat"
_WANTED: Final = (b"nr_dirty", b"nr_writeback", b"nr_dirty_background_threshold")


def much_is_dirty() -> bool:
    """Whether the kernel writes back at full speed already; writers are held up soon after that."""
    try:
        with open(VMSTAT, "rb", buffering=0) as file:
            lines = file.read(1 << 16).split(b"\n")
        found = dict(line.split() for line in lines if line.startswith((b"nr_dirty", b"nr_write")))
        dirty, writeback, background = (int(found[name]) for name in _WANTED)
    except (OSError, KeyError, ValueError):
        return True  # nobody knows: workers do it
    return dirty + writeback >= background


class Calm:
    """One file's; times are nanoseconds of one clock, which the caller reads."""

    def __init__(self, much_is_dirty: Callable[[], bool] = much_is_dirty) -> None:
        self._much_is_dirty = much_is_dirty
        self._rest_until = 0
        self._next_look = 0
        self._factor = REST
        #: writes since the last slow one
        self._quick = SOON

    def allows(self, now: int) -> bool:
        """Whether the next small write may be made on the loop."""
        if now < self._rest_until:
            return False
        if now >= self._next_look:
            self._next_look = now + LOOK_EVERY
            if self._much_is_dirty():
                self._rest_until = self._next_look
                return False
        return True

    def took(self, begun: int, ended: int) -> None:
        """A write was made on the loop."""
        self._quick += 1
        if ended - begun < SLOW:
            return
        self._factor = self._factor * LONGER if self._quick <= SOON else REST
        self._quick = 0
        self._rest_until = ended + min((ended - begun) * self._factor, LONGEST_REST)
