"""From L2 entries to extents: where the bytes of a range of guest clusters live.

Specification: docs/interop/qcow2, "Cluster mapping".

Runs on: pure. A whole table is classified by a handful of numpy operations (8192 entries: about
60 us); single clusters are looked up by the callers in the table's memoryview.
Invariants: the runs cover the range without gap; neighbours that could be one run are one.
Errors: none; tables have been checked when they were loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from liveblockd.formats.qcow2.tables import Entries
from liveblockd.storage.driver import Extent, ExtentKind

_U = np.uint64
_HOST_BITS = COMPRESSED | ZERO | OFFSET_MASK


class Run(NamedTuple):
    """Clusters with one answer: ``first`` is an index into the table, so many of them."""

    first: int
    clusters: int
    kind: ExtentKind
    host_offset: int  # bytes; of DATA only, else -1


def kind_of(entry: int) -> ExtentKind:
    """What one entry says."""
    if entry & COMPRESSED:
        return ExtentKind.COMPRESSED
    if entry & ZERO:
        return ExtentKind.ZERO
    return ExtentKind.DATA if entry & OFFSET_MASK else ExtentKind.UNALLOCATED


def in_place(entry: int) -> bool:
    """Whether a guest write goes to the cluster where it is: allocated, not shared."""
    return entry >> 62 == 2 and not entry & ZERO


def kinds(entries: Entries) -> npt.NDArray[np.uint8]:
    """``ExtentKind`` of every entry."""
    result = np.zeros(len(entries), np.uint8)
    result[(entries & _U(OFFSET_MASK)) != 0] = ExtentKind.DATA
    result[(entries & _U(ZERO)) != 0] = ExtentKind.ZERO
    result[(entries & _U(COMPRESSED)) != 0] = ExtentKind.COMPRESSED
    return result


def runs(entries: Entries, first: int, count: int, cluster_size: int) -> list[Run]:
    """The runs of ``count`` clusters from index ``first`` of a table.

    Compressed clusters follow each other as one run: their readers look at each entry again.
    """
    part = entries[first : first + count]
    if count == 1:
        entry = int(part[0])
        kind = kind_of(entry)
        return [Run(first, 1, kind, entry & OFFSET_MASK if kind is ExtentKind.DATA else -1)]
    kind_array = kinds(part)
    hosts = part & _U(OFFSET_MASK)
    data = kind_array == ExtentKind.DATA
    breaks = kind_array[1:] != kind_array[:-1]
    breaks |= data[1:] & data[:-1] & (hosts[1:] != hosts[:-1] + _U(cluster_size))
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    ends = [*starts[1:], count]
    found = []
    for start, end in zip(starts, ends, strict=True):
        kind = ExtentKind(int(kind_array[start]))
        host = int(hosts[start]) if kind is ExtentKind.DATA else -1
        found.append(Run(first + start, end - start, kind, host))
    return found


def append_extent(extents: list[Extent], extent: Extent) -> None:
    """Add ``extent`` at the end, as part of the last one where they are one run."""
    if extents:
        last = extents[-1]
        if last.kind is extent.kind and (
            extent.kind is not ExtentKind.DATA
            or last.host_offset + last.length == extent.host_offset
        ):
            extents[-1] = Extent(last.length + extent.length, last.kind, last.host_offset)
            return
    extents.append(extent)


def not_in_place_count(entries: Entries, first: int, count: int) -> int:
    """How many clusters from ``first`` on, up to ``count``, a write must allocate anew.

    A preallocated zero cluster ends the run: its host cluster is used again.
    """
    part = entries[first : first + count]
    owned = (part & _U(COPIED)) != 0
    hits = np.flatnonzero(owned)
    return int(hits[0]) if len(hits) else count


def contiguous_count(entries: Entries, first: int, count: int, cluster_size: int) -> int:
    """How many entries from ``first`` on have the flags of the first and follow it on the host."""
    part = entries[first : first + count]
    expected = part[0] + np.arange(len(part), dtype=np.uint64) * _U(cluster_size)
    hits = np.flatnonzero(part != expected)
    return int(hits[0]) if len(hits) else len(part)
