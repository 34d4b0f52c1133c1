"""Clusters that nothing in memory refers to any more, until they may be used again.

Runs on: pure. Two things keep a freed cluster from being handed out: the disk may still refer to it
(until the commit that removes the reference is durable), and requests that looked up its host
offset before may still be reading or writing it (until they have ended). Requests are counted
by *epoch*: every commit seals what was freed up to then and begins a new one.

Invariants: ``ready`` gives a range once, after its commit and after every request of its epoch
and of older ones. Errors: none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Freed(NamedTuple):
    """A range of host clusters that lost one reference each."""

    host_offset: int  # bytes, a multiple of the cluster size
    clusters: int
    #: the host may have the space back
    unmap: bool


@dataclass(slots=True, eq=False)
class Batch:
    """What was freed between two commits."""

    epoch: int
    freed: list[Freed]


class Quarantine:
    """See the module."""

    def __init__(self) -> None:
        self._epoch = 0
        self._requests: dict[int, int] = {0: 0}
        self._freed: list[Freed] = []
        self._sealed: list[Batch] = []
        self._committed: deque[Batch] = deque()

    def enter(self) -> int:
        """A request begins that uses host offsets; ``leave`` takes what this returns."""
        epoch = self._epoch
        self._requests[epoch] += 1
        return epoch

    def leave(self, epoch: int) -> bool:
        """The request has ended; whether this may have made something ready."""
        left = self._requests[epoch] - 1
        self._requests[epoch] = left
        if left or epoch == self._epoch:
            return False
        del self._requests[epoch]
        return bool(self._committed)

    def free(self, host_offset: int, clusters: int, *, unmap: bool) -> None:
        """Memory has one reference less to each of the clusters."""
        self._freed.append(Freed(host_offset, clusters, unmap))

    @property
    def has_freed(self) -> bool:
        """Whether anything waits for a commit."""
        return bool(self._freed)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held back."""
        return not self._freed and not self._committed

    def seal(self) -> Batch:
        """A commit begins: what was freed up to now, for ``committed`` or ``failed``."""
        batch = Batch(self._epoch, self._freed)
        self._freed = []
        self._sealed.append(batch)
        if not self._requests[self._epoch]:
            del self._requests[self._epoch]
        self._epoch += 1
        self._requests[self._epoch] = 0
        return batch

    def committed(self, batch: Batch) -> None:
        """The disk no longer refers to what is in ``batch``."""
        self._sealed.remove(batch)
        if batch.freed:
            self._committed.append(batch)

    def failed(self, batch: Batch) -> None:
        """The disk may still refer to it: the next commit will tell."""
        self._sealed.remove(batch)
        self._freed[:0] = batch.freed

    def pending(self) -> Iterator[Freed]:
        """Everything that is held back, in no order."""
        yield from self._freed
        for batch in (*self._sealed, *self._committed):
            yield from batch.freed

    def ready(self) -> list[Freed]:
        """Take the ranges that may be released now."""
        # The current epoch counts only when requests are in it.
        oldest = min((e for e, n in self._requests.items() if n), default=self._epoch)
        found: list[Freed] = []
        while self._committed and self._committed[0].epoch < oldest:
            found.extend(self._committed.popleft().freed)
        return found
