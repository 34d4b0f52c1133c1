"""What a check of a qcow2 image counts: references to host clusters, and what cannot be.

Specification: docs/interop/qcow2, all of "Host cluster management" and "Cluster mapping"; the
verdicts and the words are those of ``qemu-img check``.

Runs on: pure; ``checking`` is the shell that reads tables and hands them in as arrays, ``repair``
writes. Invariants: a reference that is counted lies in the file (the last cluster may be cut
short); a count stops at the largest refcount of the image, and each reference beyond is an error.
Errors: none: what is wrong is counted in a ``CheckResult``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.allocator import Counts
from liveblockd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    SECTOR,
    ZERO,
    Geometry,
)
from liveblockd.formats.qcow2.tables import Entries

_U = np.uint64
Mask = npt.NDArray[np.bool_]

#: messages kept of one check: a damaged table has one for each of its entries
MAX_MESSAGES: Final = 1000
#: low half of an extended entry: subclusters that are allocated; the high half read as zeros
_ALL_ALLOCATED: Final = (1 << 32) - 1


class Fix(enum.IntEnum):
    """What may be repaired."""

    NONE = 0
    LEAKS = 1
    ALL = 2


@dataclass
class CheckResult:
    """The members of ImageCheck (qapi/block-core.json), and what was said on the way."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0  # bytes
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: list[str] = field(default_factory=list)
    suppressed: int = 0

    def say(self, message: str) -> None:
        """Keep a line for people, up to a bound."""
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)
        else:
            self.suppressed += 1

    def corrupt(self, message: str, times: int = 1) -> None:
        """Count corruptions of one kind."""
        self.corruptions += times
        self.say(f"ERROR {message}")

    @property
    def clean(self) -> bool:
        """Nothing was found, or nothing was left."""
        return not (self.corruptions or self.leaks or self.check_errors)


class References:
    """How often each host cluster is referred to.

    ``horizon``: where what refers beyond the end of the file is too far away for ``reach``.
    """

    def __init__(
        self, geometry: Geometry, file_length: int, result: CheckResult, *, horizon: int = 0
    ) -> None:
        self.geometry = geometry
        self._file_length = file_length
        self._result = result
        self._horizon = horizon
        #: bytes up to which references go, be it beyond the end of the file
        self.reach = file_length
        #: clusters that are looked at: those of the file, and what the last reference reaches into
        self.clusters = geometry.clusters(file_length)
        dtype: Any = np.uint16 if geometry.refcount_order <= 4 else np.uint32
        self._limit = min(geometry.refcount_max, int(np.iinfo(dtype).max))
        self._counts = np.zeros(self.clusters + 1, dtype)

    @property
    def counts(self) -> Counts:
        """One element a cluster."""
        return self._counts[: self.clusters]

    def of(self, host_offset: int) -> int:
        """References to the cluster at an offset in bytes; 0 outside the file."""
        cluster = host_offset >> self.geometry.cluster_bits
        return int(self._counts[cluster]) if cluster < self.clusters else 0

    def add_range(self, offset: int, length: int) -> None:
        """One structure of ``length`` bytes."""
        if length <= 0:
            return
        size = self.geometry.cluster_size
        if offset + length >= self._file_length + size:
            if offset + length <= self._horizon:
                self.reach = max(self.reach, offset + length)
            self._beyond(offset, length, 1)
            return
        bits = self.geometry.cluster_bits
        first, last = offset >> bits, (offset + length - 1) >> bits
        self._add(np.arange(first, last + 1, dtype=np.uint64), 1)

    def add(self, offsets: Entries, lengths: Entries | int, times: int = 1) -> None:
        """Many pieces of a few clusters at most, each of them referred to ``times`` times."""
        if not len(offsets):
            return
        size, bits = self.geometry.cluster_size, _U(self.geometry.cluster_bits)
        ends = offsets + (_U(lengths) if isinstance(lengths, int) else lengths)
        beyond = ends >= _U(self._file_length + size)
        if beyond.any():
            for index in np.flatnonzero(beyond)[:8].tolist():
                offset = int(offsets[index])
                self._beyond(offset, int(ends[index]) - offset, 0)
            self._result.corruptions += int(beyond.sum()) * times
            near = ends[beyond & (ends <= _U(self._horizon))]
            if len(near):
                self.reach = max(self.reach, int(near.max()))
            offsets, ends = offsets[~beyond], ends[~beyond]
            if not len(offsets):
                return
        first = offsets >> bits
        last = (ends - _U(1)) >> bits
        self._add(first, times)
        more = int((last - first).max())
        for step in range(1, more + 1):
            self._add(first[last - first >= _U(step)] + _U(step), times)

    def _beyond(self, offset: int, length: int, times: int) -> None:
        self._result.corrupt(
            "counting reference for region exceeding the end of the file by one cluster or more: "
            f"offset {offset:#x} size {length:#x}",
            times,
        )

    def _add(self, clusters: Entries, times: int) -> None:
        added: Any = times
        if len(clusters) > 1 and not (clusters[1:] > clusters[:-1]).all():
            clusters, numbers = np.unique(clusters, return_counts=True)
            added = numbers.astype(np.uint64) * _U(times)
        wanted = self._counts[clusters].astype(np.uint64) + _U(added)
        over = wanted > _U(self._limit)
        if over.any():
            surplus = wanted[over] - _U(self._limit)
            for cluster in clusters[over][:8].tolist():
                self._result.say(
                    f"ERROR: overflow cluster offset={cluster << self.geometry.cluster_bits:#x}"
                )
            self._result.corruptions += int(surplus.sum())
            wanted = np.minimum(wanted, _U(self._limit))
        self._counts[clusters] = wanted
        self.clusters = max(self.clusters, int(clusters.max()) + 1)


class L1Tables:
    """The L2 tables that the L1 tables of an image name: where, how often, and for whom."""

    def __init__(self) -> None:
        self.offsets = np.zeros(0, np.uint64)
        self.total = np.zeros(0, np.int64)
        self.active = np.zeros(0, np.int64)

    def add(self, offsets: Entries, *, active: bool, times: int = 1) -> None:
        """Those of one L1 table, which ``times`` L1 tables are."""
        joined, inverse = np.unique(np.concatenate([self.offsets, offsets]), return_inverse=True)
        known, new = inverse[: len(self.offsets)], inverse[len(self.offsets) :]
        total = np.bincount(new, minlength=len(joined)) * times
        mine = total.copy() if active else np.zeros(len(joined), np.int64)
        total[known] += self.total
        mine[known] += self.active
        self.offsets, self.total, self.active = joined, total, mine


def examine_l1(
    entries: Entries, geometry: Geometry, result: CheckResult, times: int = 1
) -> Entries:
    """The offsets of the L2 tables of an L1 table, whatever they are worth."""
    used = entries[entries != 0]
    reserved = used[(used & _U(L1_RESERVED)) != 0]
    for entry in reserved[:8].tolist():
        result.say(f"ERROR found L1 entry with reserved bits set: {entry:x}")
    offsets: Entries = used & _U(OFFSET_MASK)
    unaligned = offsets[(offsets & _U(geometry.cluster_size - 1)) != 0]
    for offset in unaligned[:8].tolist():
        result.say(f"ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
    result.corruptions += (len(reserved) + len(unaligned)) * times
    return offsets


class L2Findings(NamedTuple):
    """What one L2 table refers to."""

    clusters: Entries  # host offsets of whole clusters
    compressed: Entries  # host offsets of compressed data
    compressed_lengths: Entries  # and its bytes
    fragmented: int
    to_zero: list[int]  # indices of preallocated zero clusters that name no cluster


@dataclass(frozen=True, slots=True)
class L2Format:
    """How the L2 tables of an image are read."""

    geometry: Geometry
    extended: bool = False
    data_file: bool = False

    @property
    def words(self) -> int:
        """64-bit words of an entry."""
        return 2 if self.extended else 1


def allocated(entries: Entries, form: L2Format) -> Mask:
    """Which standard entries name a host cluster, or should."""
    standard = (entries & _U(COMPRESSED)) == 0
    named = (entries & _U(OFFSET_MASK)) != 0
    if form.data_file:  # its first cluster is at offset 0
        plain = (entries & _U(ZERO)) == 0 if not form.extended else np.bool_(True)
        named |= ((entries & _U(COPIED)) != 0) & plain
    return np.asarray(standard & named)


def examine_l2(
    table: Entries, form: L2Format, result: CheckResult, times: int = 1, *, zeroing: bool = False
) -> L2Findings:
    """Look at every entry; ``times``: as many L1 entries name this table.

    With ``zeroing`` a misaligned preallocated zero cluster is left to the repair, not counted.
    """
    geometry = form.geometry
    entries = table[:: form.words]
    bitmaps = table[1::2] if form.extended else None
    compressed = (entries & _U(COMPRESSED)) != 0
    _report(
        entries, ~compressed & ((entries & _U(L2_RESERVED)) != 0), result, times,
        "found l2 entry with reserved bits set: {:x}",
    )  # fmt: skip
    _report(
        entries, compressed & ((entries & _U(COPIED)) != 0), result, times,
        "coffset={:#x}: copied flag must never be set for compressed clusters",
    )  # fmt: skip
    if bitmaps is not None:
        _check_subclusters(entries, bitmaps, form, result, times)
    if form.data_file:
        _report(
            entries, compressed, result, times, "compressed cluster with data file, entry={:#x}"
        )
        compressed &= False
    offsets = entries & _U(OFFSET_MASK)
    named = allocated(entries, form)
    to_zero: list[int] = []
    unaligned = named & ((offsets & _U(geometry.cluster_size - 1)) != 0)
    if unaligned.any():
        empty = unaligned & _without_data(entries, bitmaps)
        _report(
            offsets, empty, result, times,
            "offset={:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
        )  # fmt: skip
        _report(
            offsets, unaligned & ~empty, result, times,
            "offset={:x}: Data cluster is not properly aligned; L2 entry corrupted.",
        )  # fmt: skip
        if zeroing:
            to_zero = np.flatnonzero(empty).tolist()
            named &= ~empty
    hosts = offsets[named]
    fragmented = int((hosts[1:] != hosts[:-1] + _U(geometry.cluster_size)).sum())
    starts, lengths = compressed_ranges(entries[compressed], geometry)
    return L2Findings(hosts, starts, lengths, fragmented + len(starts), to_zero)


def _without_data(entries: Entries, bitmaps: Entries | None) -> Mask:
    if bitmaps is None:
        return np.asarray((entries & _U(ZERO)) != 0)
    return np.asarray((bitmaps & _U(_ALL_ALLOCATED)) == 0)


def _check_subclusters(
    entries: Entries, bitmaps: Entries, form: L2Format, result: CheckResult, times: int
) -> None:
    compressed = (entries & _U(COMPRESSED)) != 0
    named = allocated(entries, form)
    _report(
        entries, compressed & (bitmaps != 0), result, times,
        "compressed cluster with non-zero subcluster allocation bitmap, entry={:#x}",
    )  # fmt: skip
    both = (bitmaps >> _U(32)) & bitmaps & _U(_ALL_ALLOCATED)
    _report(
        entries, named & (both != 0), result, times,
        "cluster has bits set in both halves of its allocation bitmap, entry={:#x}",
    )  # fmt: skip
    _report(
        entries, ~compressed & ~named & ((bitmaps & _U(_ALL_ALLOCATED)) != 0), result, times,
        "unallocated cluster has non-zero subcluster allocation map, entry={:#x}",
    )  # fmt: skip


def _report(values: Entries, bad: Mask, result: CheckResult, times: int, text: str) -> None:
    if not bad.any():
        return
    for value in values[bad][:8].tolist():
        result.say(f"ERROR {text.format(value)}")
    result.corruptions += int(bad.sum()) * times


def compressed_ranges(entries: Entries, geometry: Geometry) -> tuple[Entries, Entries]:
    """Host offsets and lengths in bytes of compressed data, as ``tables.compressed_range``."""
    bits = geometry.compressed_offset_bits
    offsets = entries & _U((1 << bits) - 1)
    sectors = ((entries >> _U(bits)) & _U((1 << (62 - bits)) - 1)) + _U(1)
    return offsets, sectors * _U(SECTOR) - (offsets & _U(SECTOR - 1))


def copied_errors(entries: Entries, refcounts: npt.NDArray[np.int64]) -> Mask:
    """Entries whose COPIED flag is not what the refcount (-1: not known) asks for."""
    wrong = ((entries & _U(COPIED)) != 0) != (refcounts == 1)
    return np.asarray(wrong & (refcounts >= 0))


class Comparison(NamedTuple):
    """Refcounts of one block against the references."""

    highest: int  # index of the last cluster in use within the block; -1
    low: Mask  # refcount too low
    high: Mask  # leaked
    rebuild: bool  # a cluster in use has refcount 0: it may have been given away


def compare(stored: Counts, references: Counts) -> Comparison:
    """Both begin at the same cluster and are as long."""
    counted = references.astype(np.uint64)
    present = stored.astype(np.uint64)
    used = np.flatnonzero((counted | present) != 0)
    low = present < counted
    return Comparison(
        int(used[-1]) if len(used) else -1,
        np.asarray(low),
        np.asarray(present > counted),
        bool((low & (present == 0)).any()),
    )
