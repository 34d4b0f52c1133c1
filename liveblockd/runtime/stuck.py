"""Which threads wait for something that does not come: a disk, a file system on a network.

A pool has few threads, so that its work leaves processors to others. But a thread that waits for a
slow disk uses none, and were those counted, jobs on slow disks would keep all of them, and whoever
has a fast one would be as slow. So a pool whose queue does not move looks at its threads now and
then, and starts one more for each that is stuck.

Specification: /proc/PID/task/TID/schedstat, of the kernel: nanoseconds on a processor, and waiting
for one. What is left of the time a thread slept. Where there is no such file nobody is ever stuck.

Runs on: the event loop; ``begin`` and ``end`` on the worker itself. No errors escape.
"""

from __future__ import annotations

import threading
from typing import Final

#: seconds between two looks; who sleeps in one system call from one to the next is stuck
LOOK: Final = 0.02
#: of that time at least
SLEPT: Final = 0.8


class Worker:
    """A thread of a pool."""

    __slots__ = ("_number", "_seen", "_seen_number", "_task", "ended", "stuck")

    def __init__(self) -> None:
        #: let go of at its end
        self.ended = threading.Lock()
        self.stuck = False
        self._task = 0
        #: of the job that it is at, odd; even: of the pause before the next one
        self._number = 0
        self._seen_number = 0
        #: when that was, in seconds, and how long it had not slept by then, in nanoseconds
        self._seen: tuple[float, int] | None = None

    def live(self) -> None:
        """On the thread, before its first job."""
        self._task = threading.get_native_id()

    def begin(self) -> None:
        """On the thread: a job begins."""
        self._number += 1

    def end(self) -> None:
        """On the thread: it has ended."""
        self._number += 1
        self.stuck = False

    def look(self, now: float) -> bool:
        """Whether it slept from the last look to this one, at ``now`` (seconds), in one job."""
        number = self._number
        if number != self._seen_number or not number & 1:  # it gets on
            self._seen_number, self._seen, self.stuck = number, None, False
            return False
        if self.stuck:
            return True
        try:
            with open(f"/proc/self/task/{self._task}/schedstat", "rb") as file:
                ran, waited, _ = map(int, file.read().split())
        except (OSError, ValueError):  # not this kernel
            return False
        before, self._seen = self._seen, (now, ran + waited)
        if before is not None:
            elapsed, awake = now - before[0], (ran + waited - before[1]) / 1e9
            self.stuck = awake < elapsed * (1 - SLEPT) and number == self._number
        return self.stuck
