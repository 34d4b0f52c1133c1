"""References to host clusters of an image in use, kept right while its tables change.

Specification: docs/interop/qcow2, "Host cluster management", "Cluster mapping".

Runs on: pure; ``live_check`` reads tables, ``metadata`` tells every change of an entry. References
are counted for a *window* of host clusters at a time, so that memory does not grow with the disk.
Invariant: at every instant ``counts`` is what the L1 entries, the entries of all ``counted`` tables
and what was added besides refer to. A change of a table that was not counted yet is only noted
(``touched``): who was reading it reads again.
Errors: none.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.check import CheckResult, compressed_ranges
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, Geometry
from liveblockd.formats.qcow2.tables import Entries

_U = np.uint64
Array = npt.NDArray[Any]
#: host clusters that are looked at in one go over the tables: 12 bytes each
WINDOW: Final = 1 << 21


class LiveReferences:
    """See the module; ``limit``: bytes from which on a reference cannot be."""

    def __init__(
        self,
        geometry: Geometry,
        first: int,
        end: int,
        l1: Entries,
        *,
        data_file: bool,
        result: CheckResult,
        limit: int,
    ) -> None:
        self.geometry = geometry
        self.first, self.end = first, end
        self._data_file = data_file
        self._changing = False
        self.result = result
        #: the file may grow
        self.limit = limit
        #: references; of these, active ones with the COPIED flag and without
        self.counts = np.zeros(end - first, np.uint32)
        self.flagged = np.zeros(end - first, np.uint32)
        self.unflagged = np.zeros(end - first, np.uint32)
        #: by L1 index
        self.counted = (l1 & _U(OFFSET_MASK)) == 0
        self.touched: set[int] = set()
        used = l1[~self.counted]
        self._add_whole(used & _U(OFFSET_MASK), 1)
        self._add_flags(used, 1)

    # -- what the engine tells

    def entries_changed(self, l1_index: int, old: Entries, new: Entries) -> None:
        """Entries of an L2 table were replaced."""
        if not self.counted[l1_index]:
            self.touched.add(l1_index)
            return
        self._changing = True  # what the engine gives out is in the file before long
        self._count_entries(old, -1)
        self._count_entries(new, 1)
        self._changing = False

    def cluster_added(self, l1_index: int, entry: int) -> None:
        """An empty entry refers to a whole cluster now: the frequent case."""
        if not self.counted[l1_index]:
            self.touched.add(l1_index)
            return
        index = ((entry & OFFSET_MASK) >> self.geometry.cluster_bits) - self.first
        if not self._data_file and 0 <= index < len(self.counts):
            self.counts[index] += 1
            (self.flagged if entry & COPIED else self.unflagged)[index] += 1

    def l1_changed(self, l1_index: int, old: int, new: int) -> None:
        """The L1 entry names another table with the same contents, or a first, empty one."""
        if not old & OFFSET_MASK:
            self.counted[l1_index] = True
        self.touched.add(l1_index)
        self._changing = True
        for entry, times in ((old, -1), (new, 1)):
            if entry & OFFSET_MASK:
                entries = np.array([entry], np.uint64)
                self._add_whole(entries & _U(OFFSET_MASK), times)
                self._add_flags(entries, times)
        self._changing = False

    # -- what the check adds

    def count_table(self, l1_index: int, words: Entries) -> None:
        """All entries of a table of the active L1 table, as they are now."""
        self.counted[l1_index] = True
        self._count_entries(words, 1)

    def count_inactive(self, words: Entries, times: int) -> None:
        """All entries of a table that snapshots alone name."""
        self._count_entries(words, times, flags=False)

    def add_range(self, offset: int, length: int) -> None:
        """One structure of ``length`` bytes."""
        if length <= 0:
            return
        if offset + length >= self.limit + self.geometry.cluster_size:
            self._beyond(1)
            return
        bits = self.geometry.cluster_bits
        low = max(offset >> bits, self.first) - self.first
        high = min((offset + length - 1 >> bits) + 1, self.end) - self.first
        if low < high:
            self.counts[low:high] += np.uint32(1)

    def add(self, offsets: Entries, lengths: int) -> None:
        """Many structures of so many bytes each."""
        self._spread(offsets, _U(lengths), 1)

    def add_tables(self, offsets: Entries, times: int) -> None:
        """The L2 tables of a snapshot's L1 table, which ``times`` snapshots have."""
        self._add_whole(offsets, times)

    # -- inside

    def _count_entries(self, entries: Entries, sign: int, *, flags: bool = True) -> None:
        if self._data_file:
            return
        compressed = (entries & _U(COMPRESSED)) != 0
        standard = entries[~compressed]
        named = standard[(standard & _U(OFFSET_MASK)) != 0]
        self._add_whole(named & _U(OFFSET_MASK), sign)
        if flags:
            self._add_flags(named, sign)
        if compressed.any():
            starts, lengths = compressed_ranges(entries[compressed], self.geometry)
            self._spread(starts, lengths, sign)

    def _add_whole(self, offsets: Entries, times: int) -> None:
        self._spread(offsets, _U(self.geometry.cluster_size), times)

    def _spread(self, offsets: Entries, lengths: Entries | np.uint64, times: int) -> None:
        """Every cluster that a piece touches."""
        if not len(offsets):
            return
        bits = _U(self.geometry.cluster_bits)
        ends = offsets + lengths
        beyond = ends >= _U(self.limit + self.geometry.cluster_size)
        if not self._changing and beyond.any():
            self._beyond(int(beyond.sum()) * times)
        first, last = offsets >> bits, (ends - _U(1)) >> bits
        self._bump(self.counts, first, times)
        for step in range(1, int((last - first).max()) + 1):
            self._bump(self.counts, first[last - first >= _U(step)] + _U(step), times)

    def _add_flags(self, entries: Entries, times: int) -> None:
        clusters = (entries & _U(OFFSET_MASK)) >> _U(self.geometry.cluster_bits)
        copied = (entries & _U(COPIED)) != 0
        self._bump(self.flagged, clusters[copied], times)
        self._bump(self.unflagged, clusters[~copied], times)

    def _bump(self, array: Array, clusters: Entries, times: int) -> None:
        inside = clusters[(clusters >= _U(self.first)) & (clusters < _U(self.end))]
        if not len(inside):
            return
        places = (inside - _U(self.first)).astype(np.intp)
        if times > 0:
            np.add.at(array, places, np.uint32(times))
        else:
            np.subtract.at(array, places, np.uint32(-times))

    def _beyond(self, times: int) -> None:
        self.result.corrupt("a reference reaches beyond the end of the file", times)
