"""Compressed clusters of one file unpacked into another, by one job of a worker.

Runs on: workers. What is unpacked stays in a buffer that fits into the cache of a core until it is
written; clusters of zeros are not.

Invariants: as of ``copy_engine``; on return the whole range was stored, not made durable.
Errors: ``OSError``, of either file or of data that cannot be unpacked; ``HaltedError``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from liveblockd.runtime import halting
from liveblockd.storage import copy_engine, hostcalls
from liveblockd.storage.copy_engine import CLONE_ALIGNMENT, PIECE, Zeroes
from liveblockd.storage.driver import Buffer


class Unpacking(NamedTuple):
    """``places``, ``cluster_size`` and ``unpack`` as of ``driver.Packed``; offsets in bytes."""

    source_fd: int
    places: Sequence[tuple[int, int]]
    cluster_size: int
    unpack: Callable[[Any, Any, Sequence[tuple[int, int]]], None]
    fd: int
    offset: int
    source_direct: bool = False
    direct: bool = False


class _Local(threading.local):
    clusters: memoryview | None = None
    packed: memoryview | None = None


_local = _Local()


def unpack_clusters(work: Unpacking) -> Zeroes:
    """Store the clusters; for each: is it all zeros, and was not written?

    Closes both descriptors: duplicates, so that a node that is closed meanwhile does no harm.
    """
    try:
        per_piece = max(1, PIECE // work.cluster_size)
        zero = [
            _unpack_piece(work, start, work.places[start : start + per_piece])
            for start in range(0, len(work.places), per_piece)
        ]
        return np.concatenate(zero) if zero else np.zeros(0, np.bool_)
    finally:
        os.close(work.source_fd)
        os.close(work.fd)


def _unpack_piece(work: Unpacking, first: int, places: Sequence[tuple[int, int]]) -> Zeroes:
    halting.check()
    size = work.cluster_size
    length = len(places) * size
    if _local.clusters is None or len(_local.clusters) < length:
        _local.clusters = hostcalls.aligned_buffer(max(length, PIECE))
    buffer = _local.clusters[:length]
    packed, within = _read(work, places)
    work.unpack(np.frombuffer(buffer, np.uint8), np.frombuffer(packed, np.uint8), within)
    zero = copy_engine.zero_clusters(buffer, size)
    offset = work.offset + first * size
    edges = np.flatnonzero(np.diff(~zero, prepend=False, append=False))
    for begin, end in (edges.reshape(-1, 2) * size).tolist():
        if work.direct:
            hostcalls.write_aligned(work.fd, offset + begin, buffer[begin:end], CLONE_ALIGNMENT)
        else:
            hostcalls.write(work.fd, offset + begin, buffer[begin:end])
    if not work.direct:
        hostcalls.start_writeback(work.fd, offset, length)
    return zero


def _read(
    work: Unpacking, places: Sequence[tuple[int, int]]
) -> tuple[Buffer, list[tuple[int, int]]]:
    """The compressed bytes of all, and where in them each is; neighbours are read together."""
    low = min(offset for offset, _ in places)
    high = max(offset + length for offset, length in places)
    if work.source_direct:
        low -= low % CLONE_ALIGNMENT
        high += -high % CLONE_ALIGNMENT
    if high - low <= 2 * sum(length for _, length in places) + 2 * CLONE_ALIGNMENT:
        ranges = [(low, high)]
        within = [(offset - low, length) for offset, length in places]
    else:
        ranges, within, end = [], [], 0
        for offset, length in places:
            start, stop = offset, offset + length
            if work.source_direct:
                start, stop = start - start % CLONE_ALIGNMENT, stop + -stop % CLONE_ALIGNMENT
            ranges.append((start, stop))
            within.append((end + offset - start, length))
            end += stop - start
    total = sum(stop - start for start, stop in ranges)
    if _local.packed is None or len(_local.packed) < total:
        _local.packed = hostcalls.aligned_buffer(max(total, PIECE))
    done = 0
    for start, stop in ranges:
        part = _local.packed[done : done + stop - start]
        if work.source_direct:
            hostcalls.read_aligned(work.source_fd, part, start, CLONE_ALIGNMENT)
        else:
            hostcalls.read_into(work.source_fd, part, start)
        done += stop - start
    return _local.packed[:total], within
