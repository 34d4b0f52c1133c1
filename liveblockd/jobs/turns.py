"""Which jobs may copy, where only so many may at a time: the first to come are the first to go.

Specification: ``max-concurrent`` in docs/configuration.md. Pure: it only decides; a job asks at
each of its checkpoints, and is woken when it has got or lost its turn.

Invariants: with a limit of N at most N jobs have a turn; one that could have it never waits; the
order is that in which the jobs began, also after a pause. A job that stands still (paused, or by an
error) or is ready needs none: it holds up nobody. No errors escape.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class Taker(Protocol):
    """What takes turns: a job."""

    def wake(self) -> None:
        """Let it look again."""


T = TypeVar("T", bound=Taker)


class Turns(Generic[T]):
    """``limit`` is how many have a turn at most; 0: all."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._count = 0
        #: who takes part, and when it began
        self._numbers: dict[T, int] = {}
        self._working: set[T] = set()
        self._waiting: set[T] = set()

    @property
    def limit(self) -> int:
        """How many work at a time at most; 0: all."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        # The youngest give their turns back, at their next checkpoint.
        for job in self._in_order(self._working)[limit or len(self._working) :]:
            self._working.remove(job)
            self._waiting.add(job)
            job.wake()
        self._grant()

    def enter(self, job: T) -> None:
        """It wants to begin; it has its turn, or ``waits``."""
        self._count += 1
        self._numbers[job] = self._count
        self.ask(job)

    def ask(self, job: T) -> None:
        """It wants to go on after a ``rest``, in its old place."""
        if job in self._numbers and job not in self._working:
            self._waiting.add(job)
            self._grant()

    def rest(self, job: T) -> None:
        """It stands still."""
        self._waiting.discard(job)
        self._working.discard(job)
        self._grant()

    def leave(self, job: T) -> None:
        """It takes no part any more; twice is harmless."""
        self._numbers.pop(job, None)
        self.rest(job)

    def waits(self, job: T) -> bool:
        """Whether it may not copy now."""
        return job in self._waiting

    def waiting(self) -> list[T]:
        """Who waits; the next one first."""
        return self._in_order(self._waiting)

    def _grant(self) -> None:
        free = self._limit - len(self._working) if self._limit else len(self._waiting)
        for job in self._in_order(self._waiting)[: max(free, 0)]:
            self._waiting.remove(job)
            self._working.add(job)
            job.wake()

    def _in_order(self, jobs: set[T]) -> list[T]:
        return sorted(jobs, key=self._numbers.__getitem__)
