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

from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, MIXED, OFFSET_MASK, ZERO
from liveblockd.formats.qcow2.subclusters import SUBCLUSTERS, expand, has_mixed
from liveblockd.formats.qcow2.tables import Entries
from liveblockd.storage.driver import Extent, ExtentKind

_U = np.uint64
NOT_IN_PLACE = ZERO | MIXED
_DATA = ExtentKind.DATA
#: offset 0 is where an external data file has the first cluster: COPIED tells that it is there
_THERE = OFFSET_MASK | COPIED
#: entries that are looked at one by one
FEW = 16


class Run(NamedTuple):
    """A range with one answer; bytes, ``start`` from where the table's span begins."""

    start: int
    length: int
    kind: ExtentKind
    host_offset: int  # of DATA only, else -1


def kind_of(entry: int) -> ExtentKind:
    """What one entry that is not MIXED says."""
    if entry & COMPRESSED:
        return ExtentKind.COMPRESSED
    if entry & ZERO:
        return ExtentKind.ZERO
    return ExtentKind.DATA if entry & _THERE else ExtentKind.UNALLOCATED


def in_place(entry: int) -> bool:
    """Whether a guest write goes to the cluster where it is: allocated, not shared."""
    return entry >> 62 == 2 and not entry & NOT_IN_PLACE


def kinds(entries: Entries) -> npt.NDArray[np.uint8]:
    """``ExtentKind`` of every entry; none is MIXED."""
    result = np.zeros(len(entries), np.uint8)
    result[(entries & _U(_THERE)) != 0] = ExtentKind.DATA
    result[(entries & _U(ZERO)) != 0] = ExtentKind.ZERO
    result[(entries & _U(COMPRESSED)) != 0] = ExtentKind.COMPRESSED
    return result


def runs(
    entries: Entries, bitmaps: Entries | None, start: int, length: int, cluster_bits: int
) -> list[Run]:
    """The runs of ``length`` bytes from ``start`` on within the span of a table.

    Compressed clusters follow each other as one run: their readers look at each entry again.
    """
    size = 1 << cluster_bits
    first = start >> cluster_bits
    part = entries[first : (start + length - 1 >> cluster_bits) + 1]
    if len(part) <= FEW and bitmaps is None:
        return _few_runs(part.tolist(), start, length, cluster_bits)
    if bitmaps is not None and has_mixed(part):
        kind_array, hosts = expand(part, bitmaps[first : first + len(part)], cluster_bits)
        size //= SUBCLUSTERS
    elif len(part) <= FEW:
        return _few_runs(part.tolist(), start, length, cluster_bits)
    else:
        kind_array, hosts = kinds(part), part & _U(OFFSET_MASK)
    data = kind_array == ExtentKind.DATA
    breaks = kind_array[1:] != kind_array[:-1]
    breaks |= data[1:] & data[:-1] & (hosts[1:] != hosts[:-1] + _U(size))
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    ends = [*starts[1:], len(kind_array)]
    origin, end = first << cluster_bits, start + length
    found = []
    for begin, stop in zip(starts, ends, strict=True):
        low, high = max(start, origin + begin * size), min(end, origin + stop * size)
        if low >= high:
            continue  # subclusters of the first or last cluster outside the range
        kind = ExtentKind(int(kind_array[begin]))
        host = -1
        if kind is ExtentKind.DATA:
            host = int(hosts[begin]) + low - origin - begin * size
        found.append(Run(low, high - low, kind, host))
    return found


def _few_runs(entries: list[int], start: int, length: int, cluster_bits: int) -> list[Run]:
    """The same for a few entries that are not MIXED: numpy would take ten times as long."""
    size = 1 << cluster_bits
    position, end = start, start + length
    found: list[Run] = []
    for entry in entries:
        part = min(end, ((position >> cluster_bits) + 1) << cluster_bits) - position
        kind = kind_of(entry)
        host = (entry & OFFSET_MASK) + (position & (size - 1)) if kind is _DATA else -1
        if found:
            last = found[-1]
            if last.kind is kind and (kind is not _DATA or last.host_offset + last.length == host):
                found[-1] = Run(last.start, last.length + part, kind, last.host_offset)
                position += part
                continue
        found.append(Run(position, part, kind, host))
        position += part
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

    A cluster that has a host cluster of its own (zero, or MIXED) ends the run: that is used again.
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
