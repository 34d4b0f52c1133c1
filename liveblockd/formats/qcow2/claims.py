"""Which guest clusters a request is about to give a new host cluster.

Runs on: the event loop. A claim is held from the decision to allocate until the L2 entries are
published or the request has failed. A second request that must change the entry of a claimed
cluster waits for the end of the claim and then looks again; nobody waits while holding a claim
for another one, so there is no deadlock.

Invariants: a claimed cluster is never one that writes go to in place, and only the holder of the
claim changes its entry. Errors: none.
"""

from __future__ import annotations

import asyncio


class Claim:
    """``count`` guest clusters from ``first`` on."""

    __slots__ = ("count", "ended", "first")

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self.ended: asyncio.Future[None] | None = None


class Claims:
    """The claims of one image; numbers are guest clusters."""

    def __init__(self) -> None:
        self._clusters: dict[int, Claim] = {}

    def __len__(self) -> int:
        return len(self._clusters)

    def __contains__(self, cluster: int) -> bool:
        return cluster in self._clusters

    def free_count(self, first: int, count: int) -> int:
        """How many clusters from ``first`` on, up to ``count``, are not claimed."""
        held = self._clusters
        if not held:
            return count
        if count == 1:
            return 0 if first in held else 1
        if len(held) < count:
            return min((c - first for c in held if first <= c < first + count), default=count)
        return next((n for n in range(count) if first + n in held), count)

    def first_held(self, first: int, count: int) -> int | None:
        """The first claimed cluster of a range."""
        free = self.free_count(first, count)
        return None if free == count else first + free

    def take(self, first: int, count: int) -> Claim:
        """Claim clusters none of which is claimed."""
        claim = Claim(first, count)
        for cluster in range(first, first + count):
            assert cluster not in self._clusters
            self._clusters[cluster] = claim
        return claim

    def shrink(self, claim: Claim, count: int) -> None:
        """Keep only the first ``count`` clusters."""
        for cluster in range(claim.first + count, claim.first + claim.count):
            del self._clusters[cluster]
        claim.count = count
        # Those who wait for what was let go look again, and wait again if they must.
        self._wake(claim)

    def release(self, claim: Claim) -> None:
        """The entries were published, or the request has failed."""
        for cluster in range(claim.first, claim.first + claim.count):
            del self._clusters[cluster]
        self._wake(claim)

    async def wait(self, cluster: int) -> None:
        """Return when the claim on ``cluster`` has ended; look again then."""
        claim = self._clusters.get(cluster)
        if claim is None:
            return
        if claim.ended is None:
            claim.ended = asyncio.get_running_loop().create_future()
        await asyncio.shield(claim.ended)

    @staticmethod
    def _wake(claim: Claim) -> None:
        if claim.ended is not None:
            claim.ended.set_result(None)
            claim.ended = None
