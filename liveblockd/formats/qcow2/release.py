"""Clusters that nothing refers to any more: the host gets their space, and their refcounts fall.

Specification: docs/interop/qcow2, "Host cluster management". Runs on: the event loop, in the task
of the ``Committer``, with no commit under way.

Invariants: what is added is neither named by the disk nor in use by a request (``quarantine``). The
space goes first, while the refcount still keeps everybody away from the cluster. A range is in
``pending`` until the step in which its refcounts fall. An I/O error leaves clusters allocated: that
leaks space but no data. Errors: none; a refcount that is 0 already is told as damage.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from liveblockd.formats.qcow2.allocator import BlockNeeded
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.quarantine import Freed
from liveblockd.formats.qcow2.tables import DamageError

#: released in one go; a flush that is waited for comes in between
BATCH_CLUSTERS: Final = 1024
BATCH_RANGES: Final = 64
#: discards that are under way at the same time
PARALLEL_DISCARDS: Final = 16


class Releaser:
    """What waits to be released, in the order in which it was freed."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        #: told when a refcount turns out to be too low
        self.on_damage: Callable[[DamageError], None] = lambda _: None
        self._waiting: deque[Freed] = deque()
        self._batch: deque[Freed] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, freed: Sequence[Freed]) -> None:
        """These are ready."""
        self._waiting.extend(freed)

    def clear(self) -> None:
        """The image is damaged: refcounts stay."""
        self._waiting.clear()

    def pending(self) -> Iterator[Freed]:
        """What has one refcount more than there are references."""
        yield from self._batch
        yield from self._waiting

    async def release(self) -> None:
        """Release a batch of what waits."""
        self._batch = self._take()
        await self.release_all(self._batch)

    async def release_all(self, batch: deque[Freed]) -> None:
        """Empty ``batch``, whose ranges do not overlap."""
        refcounts, bits = self._metadata.refcounts, self._metadata.geometry.cluster_bits
        for item in batch:
            refcounts.stop_packing(item.host_offset >> bits, item.clusters)
        await self._unmap([item for item in batch if item.unmap])
        while batch:
            try:
                await self._lower(batch[0])
            except DamageError as damage:
                self.on_damage(damage)
            except OSError:
                pass
            finally:
                batch.popleft()

    def _take(self) -> deque[Freed]:
        """A batch in which no cluster is twice: the last reference gives its space back."""
        bits = self._metadata.geometry.cluster_bits
        batch: deque[Freed] = deque()
        taken: set[int] = set()
        while self._waiting and len(taken) < BATCH_CLUSTERS and len(batch) < BATCH_RANGES:
            item = self._waiting.popleft()
            room = BATCH_CLUSTERS - len(taken)
            if item.clusters > room:
                place = item.host_offset + (room << bits)
                self._waiting.appendleft(Freed(place, item.clusters - room, item.unmap))
                item = item._replace(clusters=room)
            first = item.host_offset >> bits
            clusters = range(first, first + item.clusters)
            if not taken.isdisjoint(clusters):
                self._waiting.appendleft(item)
                break
            taken.update(clusters)
            batch.append(item)
        return batch

    async def _lower(self, item: Freed) -> None:
        metadata = self._metadata
        cluster = item.host_offset >> metadata.geometry.cluster_bits
        while True:
            try:
                metadata.refcounts.decrement(cluster, item.clusters)
            except BlockNeeded as needed:
                await metadata.load_block(needed.index)
                continue
            break
        metadata.refcounts.remove_metadata(item.host_offset, item.clusters)
        metadata.on_dirty()

    async def _unmap(self, items: Sequence[Freed]) -> None:
        """Give the space of clusters that nothing else refers to back to the host: a wish only."""
        file, bits = self._metadata.file, self._metadata.geometry.cluster_bits
        runs: list[tuple[int, int]] = []  # first cluster, end
        for item in sorted(items):
            try:
                found = await self._only_here(item.host_offset >> bits, item.clusters)
            except (OSError, DamageError):
                continue
            for first, end in found:
                if runs and runs[-1][1] == first:
                    runs[-1] = (runs[-1][0], end)
                else:
                    runs.append((first, end))
        for start in range(0, len(runs), PARALLEL_DISCARDS):
            part = runs[start : start + PARALLEL_DISCARDS]
            results = await asyncio.gather(
                *(file.discard(first << bits, (end - first) << bits) for first, end in part),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, OSError):
                    raise result

    async def _only_here(self, cluster: int, count: int) -> list[tuple[int, int]]:
        """(first, end) of the clusters of a range that have no other reference."""
        while True:
            try:
                single = self._metadata.refcounts.single(cluster, count)
            except BlockNeeded as needed:
                await self._metadata.load_block(needed.index)
                continue
            break
        edges = np.flatnonzero(np.diff(np.concatenate(([False], single, [False])).astype(np.int8)))
        return [(cluster + first, cluster + end) for first, end in edges.reshape(-1, 2).tolist()]
