"""From what the intermediate images hold to pieces of work in whole clusters of the top image.

A stream copies into clusters of the top, but what there is to copy begins and ends where the
layers below have their own, smaller or larger clusters, or where one of them is short. A cluster
that one run covers is copied from that run's layer directly; a cluster with a border in it is read
through the chain; a cluster of which the layers above the base hold nothing is left out.

Pure. Invariants: pieces come in order, do not overlap, begin at multiples of the cluster size
and end there or at the end of the range; every byte that a layer holds is in one of them. The cost
is one step a run, never one a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from liveblockd.storage.driver import ExtentKind


@dataclass(frozen=True, slots=True)
class Run:
    """What the layers between top and base say of ``length`` bytes; UNALLOCATED: nothing."""

    offset: int
    length: int
    kind: ExtentKind
    #: DATA: the layer (anything with an identity), and where in its ``file`` child
    layer: Any = None
    host_offset: int = -1

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.offset + self.length

    def part(self, start: int, end: int) -> Run:
        """The bytes from ``start`` to ``end``."""
        host_offset = -1 if self.host_offset < 0 else self.host_offset + start - self.offset
        return replace(self, offset=start, length=end - start, host_offset=host_offset)

    def joins(self, other: Run) -> bool:
        """Whether ``other``, which follows, says the same."""
        if self.kind is not other.kind:
            return False
        if self.kind is not ExtentKind.DATA:
            return True
        return self.layer is other.layer and self.host_offset + self.length == other.host_offset


class Planner:
    """Takes the runs of ``[start, end)`` in order and gives out the pieces.

    A piece is a ``Run`` of kind DATA (copy from its layer), ZERO (make it zeros) or COMPRESSED
    (read it through the chain, whatever the reason). DATA shorter than ``least_copy`` bytes is
    read too: many small copies cost more than one read of them all.
    """

    def __init__(self, start: int, end: int, cluster_size: int, *, least_copy: int = 0) -> None:
        assert start % cluster_size == 0
        self.end = end
        self._cluster_size = cluster_size
        self._least_copy = least_copy
        self._position = start  # a cluster's begin: all before it is planned
        self._touched = False  # a layer holds something of the cluster that is begun
        self._run: Run | None = None  # the last run, which the next may join
        self._piece: Run | None = None  # the last piece, likewise

    def feed(self, run: Run) -> Iterator[Run]:
        """Pieces that are complete with this run; it follows the one before without a gap."""
        last = self._run
        if last is not None and last.joins(run):
            self._run = replace(last, length=last.length + run.length)
            return
        self._run = run
        if last is not None:
            yield from self._place(last)

    def finish(self) -> Iterator[Run]:
        """The rest, after the last run."""
        if self._run is not None:
            yield from self._place(self._run)
            self._run = None
        assert self._position >= self.end, "runs must cover the range"
        if self._piece is not None:
            yield self._piece
            self._piece = None

    def _place(self, run: Run) -> Iterator[Run]:
        held = run.kind is not ExtentKind.UNALLOCATED
        if run.offset > self._position:  # it begins within a cluster
            border = min(self._position + self._cluster_size, self.end)
            self._touched |= held
            if run.end < border:
                return
            if self._touched:
                yield from self._add(_to_read(self._position, border))
            self._position, self._touched = border, False
        end = run.end if run.end >= self.end else run.end // self._cluster_size * self._cluster_size
        if end > self._position:
            if held:
                yield from self._add(run.part(self._position, end))
            self._position = end
        if run.end > self._position:
            self._touched = held

    def _add(self, piece: Run) -> Iterator[Run]:
        if piece.kind is ExtentKind.DATA and piece.length < self._least_copy:
            piece = _to_read(piece.offset, piece.end)
        last = self._piece
        if last is not None and last.end == piece.offset and last.joins(piece):
            self._piece = replace(last, length=last.length + piece.length)
            return
        self._piece = piece
        if last is not None:
            yield last


def _to_read(start: int, end: int) -> Run:
    return Run(start, end - start, ExtentKind.COMPRESSED)


def split(piece: Run, size: int) -> Iterator[Run]:
    """``piece`` in chunks of ``size`` bytes, a multiple of the cluster size."""
    for start in range(piece.offset, piece.end, size):
        yield piece.part(start, min(start + size, piece.end))
