"""The host clusters that hold metadata: never handed out, never data of a guest.

Specification: docs/interop/qcow2, "Host cluster management"; README.md, invariant 8.

Runs on: pure. An image of a stranger may name four million L2 tables: what was there at the open is
a sorted array (8 bytes each, a set takes 70); what has come since is a set, which for that reason
is all that a write in place has to ask: entries were held against the rest when they were loaded.
Invariants: none of clusters that ``remove`` named is known afterwards. Errors: none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.tables import Entries
from liveblockd.storage.driver import Buffer


class GuardedClusters:
    """A set of cluster indices."""

    def __init__(self) -> None:
        #: those that came one by one
        self.added: set[int] = set()
        #: members of the array that are no longer members
        self._removed: set[int] = set()
        self._bulk: Entries = np.zeros(0, np.uint64)
        self._bulk_view = memoryview(cast(Buffer, self._bulk))
        self._added_array: Entries | None = None

    def add(self, first: int, count: int) -> None:
        """``count`` clusters from ``first`` on."""
        self.added.update(range(first, first + count))
        self._added_array = None

    def add_each(self, clusters: Iterable[int]) -> None:
        """Some clusters, in any order."""
        self.added.update(clusters)
        self._added_array = None

    def add_many(self, clusters: Entries) -> None:
        """Many, in any order; at the open of the image."""
        # Repeated ones do no harm; np.unique takes 10 s where np.sort takes 0.1 s.
        self._bulk = np.sort(np.concatenate((self._bulk, clusters)))
        self._bulk_view = memoryview(cast(Buffer, self._bulk))
        self._removed.clear()

    def copy(self) -> GuardedClusters:
        """Another set with the same members; the array is shared, for nobody changes it."""
        other = GuardedClusters()
        other.added = self.added.copy()
        other._removed = self._removed.copy()
        other._bulk, other._bulk_view = self._bulk, self._bulk_view
        return other

    def remove(self, first: int, count: int) -> None:
        """No longer."""
        self.added.difference_update(range(first, first + count))
        self._added_array = None
        low, high = self._bulk_range(first, count)
        self._removed.update(self._bulk_view[low:high])

    def remove_many(self, clusters: Entries) -> None:
        """The same for clusters in any order."""
        self.added.difference_update(clusters.tolist())
        self._added_array = None
        self._removed.update(clusters[np.isin(clusters, self._bulk)].tolist())

    def _bulk_range(self, first: int, count: int) -> tuple[int, int]:
        view = self._bulk_view
        low = bisect_left(view, first)
        return low, bisect_left(view, first + count, low)

    def isdisjoint(self, clusters: range) -> bool:
        """Whether none of a range (of step 1) is a member."""
        if not self.added.isdisjoint(clusters):
            return False
        low, high = self._bulk_range(clusters.start, len(clusters))
        return low == high or self._removed.issuperset(self._bulk_view[low:high])

    def __contains__(self, cluster: int) -> bool:
        if cluster in self.added:
            return True
        view = self._bulk_view
        at = bisect_left(view, cluster)
        return at < len(view) and view[at] == cluster and cluster not in self._removed

    def array(self) -> Entries:
        """All members, sorted; one may be there twice."""
        members = self._bulk[~np.isin(self._bulk, self._as_array(self._removed))]
        return np.sort(np.concatenate((members, self._as_array(self.added))))

    def overlaps(self, first: Entries, last: Entries) -> npt.NDArray[Any]:
        """For each pair: whether there is a member from ``first`` to ``last`` (included)."""
        if self._added_array is None:
            self._added_array = np.sort(self._as_array(self.added))
        added = self._added_array
        hits = added.searchsorted(first) < added.searchsorted(last, side="right")
        in_bulk = self._bulk.searchsorted(first) < self._bulk.searchsorted(last, side="right")
        if self._removed:
            for index in np.flatnonzero(in_bulk).tolist():
                low, high = self._bulk_range(
                    int(first[index]), int(last[index]) - int(first[index]) + 1
                )
                in_bulk[index] = not self._removed.issuperset(self._bulk_view[low:high])
        found: npt.NDArray[Any] = hits | in_bulk
        return found

    @staticmethod
    def _as_array(clusters: set[int]) -> Entries:
        return np.fromiter(clusters, np.uint64, len(clusters))
