"""How long a job has to wait so that it keeps its speed.

Bytes are accounted in slices of 100 ms. A chunk may always start when nothing is owed, however
slow the job is meant to be (a speed of 1 B/s still moves one chunk); once a slice holds more than
its share, the job owes the time that its bytes take at this speed. Nothing is saved up: a job that
was idle does not catch up later.

Pure: seconds of a monotonic clock are arguments. Raises nothing.
"""

from __future__ import annotations

from typing import Final

SLICE: Final = 0.1  # seconds


class RateLimit:
    """A speed in bytes/s (0: no limit) and what was moved since the current slice began."""

    __slots__ = ("_dispatched", "_forgiven_at", "_slice_start", "_speed")

    def __init__(self, speed: int = 0) -> None:
        self._speed = speed
        self._slice_start = float("-inf")
        self._dispatched: float = 0
        #: when nothing is owed any more, whatever the speed; None: when it is paid
        self._forgiven_at: float | None = None

    @property
    def speed(self) -> int:
        """Bytes per second; 0 means no limit."""
        return self._speed

    def set_speed(self, speed: int, now: float) -> None:
        """Change the speed; what is owed is owed at whichever of the two speeds pays it sooner.

        A job that moved much while it was fast must not stand still for minutes when it is slowed
        down, nor wait out a long debt when it is set free. But what was moved in this slice counts,
        or a client that tells a speed again and again would make it none at all.
        """
        until = max(now + self.delay(now), self._slice_start + SLICE)
        self._speed = speed
        if now + self.delay(now) > until:
            self._forgiven_at = until

    def account(self, now: float, count: int) -> None:
        """``count`` bytes start to move at ``now``."""
        if not self._speed:
            return
        if self.delay(now) <= 0 and now - self._slice_start >= SLICE:
            self._slice_start = now
            self._dispatched = 0
        self._forgiven_at = None
        self._dispatched += count

    def give_back(self, count: int) -> None:
        """``count`` bytes of what started did not move, and start again later."""
        self._dispatched = max(0, self._dispatched - count)

    def delay(self, now: float) -> float:
        """Seconds until the next chunk may start; 0 or less: now."""
        if not self._speed or not self._dispatched:
            return 0.0
        if self._dispatched < self._speed * SLICE:
            return 0.0
        paid_at = self._slice_start + self._dispatched / self._speed
        if self._forgiven_at is not None:
            paid_at = min(paid_at, self._forgiven_at)
        return paid_at - now
