"""Copies of many pieces of host files into one file, made by a worker with a batch of them.

Specification: ``copy_engine``, whose means these are; each system call is one for many pieces where
the host has such a one.

Runs on: workers. Source and destination ranges are whole blocks where a file has O_DIRECT.

Invariants: those of ``copy_engine``.

Errors: ``OSError``; ``HaltedError`` where nobody wants the copies any more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from liveblockd.runtime import halting
from liveblockd.storage import copy_engine, hostcalls
from liveblockd.storage.copy_engine import (
    CLONE_ALIGNMENT,
    PIECE,
    Copied,
    CopyMethod,
    Transfer,
    Zeroes,
    clone,
    clone_or_copy,
    copy_run,
    into_pages,
    kernel_copies_from,
    piece_buffer,
    write_direct,
    zero_clusters,
)
from liveblockd.storage.first_words import first_words_of
from liveblockd.storage.flags import runs_of
from liveblockd.storage.gate import Gate, gate_of
from liveblockd.storage.pages import Run, takes_pages
from liveblockd.storage.splices import LONG, splice_runs

#: bytes of a piece among many that the kernel is asked to copy; the call costs as much as 4 KiB
LEAST_SPLICED = 64 << 10


#: an offset, bytes
PAST_ALL = 1 << 62


class Segment(NamedTuple):
    """Whole clusters that go to ``offset`` of the file that all of a batch go to; bytes."""

    source_fd: int
    source_offset: int
    offset: int
    length: int
    source_direct: bool = False
    #: flags of a read that does not wait, if that is known
    read_flags: int | None = None


def copy_segments(
    segments: Sequence[Segment], fd: int, cluster_size: int, *, direct: bool = False
) -> Copied:
    """``clone_or_copy`` of many; ``cloned`` is a sum, ``zero`` has the clusters of all in order.

    Small ones are read one by one and written together where they lie side by side. O_DIRECT as in
    ``Transfer``.
    """
    halting.check()
    total = sum(segment.length for segment in segments) // cluster_size
    gathering = _Gathering(fd, cluster_size, direct, np.zeros(total, np.bool_))
    clones = _clonable({segment.source_fd for segment in segments}, fd)
    copied_already = set() if direct else _splice(segments, clones, fd, cluster_size)
    if len(copied_already) == len(segments):
        return Copied(0, gathering.zero)
    cloned = number = 0
    for index, segment in enumerate(segments):
        halting.check()
        count = segment.length // cluster_size
        if index in copied_already:
            pass
        elif segment.length < PIECE and segment.source_fd not in clones:
            gathering.add(segment, number)
        else:
            gathering.write()  # the plain copy has the same buffer
            copied = clone_or_copy(
                Transfer(
                    segment.source_fd,
                    segment.source_offset,
                    fd,
                    segment.offset,
                    segment.length,
                    cluster_size,
                    segment.source_direct,
                    direct,
                )
            )
            cloned += copied.cloned
            gathering.zero[number : number + count] = copied.zero
        number += count
    gathering.write()
    return Copied(cloned, gathering.zero)


def _splice(segments: Sequence[Segment], clones: set[int], fd: int, cluster_size: int) -> set[int]:
    """Let the kernel copy those of which no cluster begins with zeros; which ones it has copied.

    What it takes to know that is one system call for many of them.
    """
    able = {s.source_fd for s in segments if not s.source_direct} - clones
    able = kernel_copies_from(able, fd, cluster_size)
    chosen = [
        (index, segment)
        for index, segment in enumerate(segments)
        if segment.length >= LEAST_SPLICED and segment.source_fd in able
    ]
    if not chosen:
        return set()
    counts = np.array([segment.length // cluster_size for _, segment in chosen])
    words = first_words_of(
        [(s.source_fd, s.source_offset, s.length // cluster_size) for _, s in chosen],
        cluster_size,
        {s.source_fd: s.read_flags for _, s in chosen},
    )
    if words is None:
        return set()
    full = np.logical_and.reduceat(words != 0, np.cumsum(counts) - counts).tolist()
    runs = {
        index: Run(s.source_fd, s.source_offset, s.offset, s.length)
        for (index, s), whole in zip(chosen, full, strict=True)
        if whole
    }
    gate = gate_of(fd)
    if not gate.turn.acquire(blocking=False):
        if into_pages(list(runs.values()), fd):
            return set(runs)
        gate.turn.acquire()
    try:
        in_memory = all(segment.read_flags == 0 for _, segment in chosen)
        return _copy_in_turn(runs, fd, gate, in_memory=in_memory and takes_pages(fd))
    finally:
        gate.turn.release()


def _copy_in_turn(runs: dict[int, Run], fd: int, gate: Gate, *, in_memory: bool) -> set[int]:
    """Which ones the kernel has copied, until it copied one no further."""
    if in_memory and all(run.length < LONG for run in runs.values()):
        together = list(runs.values())
        if splice_runs(together, fd, gate) == len(together):
            return set(runs)
    done: set[int] = set()
    begin = end = 0  # what lies side by side in the target, for the disk to begin with
    for index, run in runs.items():
        if not copy_run(run, fd, gate):
            break  # whatever it is, who goes on finds it out
        to, length = run.offset, run.length
        if to != end:
            if done:
                hostcalls.start_writeback(fd, begin, end - begin)
            begin = to
        done.add(index)
        end = to + length
    if done:
        hostcalls.start_writeback(fd, begin, end - begin)
    return done


class _Gathering:
    """Small segments on their way through one buffer."""

    def __init__(self, fd: int, cluster_size: int, direct: bool, zero: Zeroes) -> None:
        self.zero = zero
        self._fd = fd
        self._cluster_size = cluster_size
        self._direct = direct
        self._filled = 0
        #: (first byte in the buffer, bytes, target offset, number of its first cluster)
        self._places: list[tuple[int, int, int, int]] = []

    def add(self, segment: Segment, number: int) -> None:
        """Read it; shorter than ``PIECE``."""
        if self._filled + segment.length > PIECE:
            self.write()
        buffer = piece_buffer(PIECE)[self._filled : self._filled + segment.length]
        if segment.source_direct:
            hostcalls.read_aligned(
                segment.source_fd, buffer, segment.source_offset, CLONE_ALIGNMENT
            )
        else:
            hostcalls.read_into(segment.source_fd, buffer, segment.source_offset)
        if self._places:
            start, length, offset, first = self._places[-1]
            clusters = length // self._cluster_size
            if offset + length == segment.offset and first + clusters == number:
                self._places[-1] = (start, length + segment.length, offset, first)
                self._filled += segment.length
                return
        self._places.append((self._filled, segment.length, segment.offset, number))
        self._filled += segment.length

    def write(self) -> None:
        """Write what is not zeros; the buffer is empty then."""
        size = self._cluster_size
        buffer = piece_buffer(PIECE)
        for start, length, offset, number in self._places:
            part = buffer[start : start + length]
            zero = zero_clusters(part, size)
            self.zero[number : number + len(zero)] = zero
            whole = [(0, len(zero))]
            for first, last in runs_of(~zero) if zero.any() else whole:
                begin, end = first * size, last * size
                if self._direct:
                    write_direct(self._fd, offset + begin, part[begin:end])
                else:
                    hostcalls.write(self._fd, offset + begin, part[begin:end])
            if not self._direct:
                hostcalls.start_writeback(self._fd, offset, length)
        self._places.clear()
        self._filled = 0


#: pairs of devices between which clones may be possible, as far as the kernel says
_may_clone: set[tuple[int, int]] = set()


def _clonable(sources: set[int], fd: int) -> set[int]:
    """Which of them may share their extents with ``fd``, as far as is known."""
    target = os.fstat(fd).st_dev
    # most batches come from many files, and each look takes the GIL
    if target in copy_engine.no_clones:
        return set()
    found = set()
    for source in sources:
        pair = (os.fstat(source).st_dev, target)
        never = (*pair, CopyMethod.CLONE) in copy_engine.unsupported
        if not never and pair not in _may_clone:
            # Before a batch of many is made piece by piece in vain. What lies there, past the end
            # of any file, cannot be cloned; but it matters why.
            clone(source, PAST_ALL, fd, 0, CLONE_ALIGNMENT)
            if target in copy_engine.no_clones:
                return set()
            never = (*pair, CopyMethod.CLONE) in copy_engine.unsupported
            if not never:
                _may_clone.add(pair)
        if not never:
            found.add(source)
    return found
