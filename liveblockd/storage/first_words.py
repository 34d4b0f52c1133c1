"""The first eight bytes of many clusters with one system call.

Specification: preadv2(2) RWF_NOWAIT; ``many_requests``.

Whether a cluster is all zeros is settled by its first word nearly always, so a copy that leaves the
bytes to the kernel needs to see no more of them.

Runs on: workers. Each thread has buffers of its own.

Invariants: a word is given only if the page cache has it, so that nobody waits for a disk in small
steps; past the end of a file words are zero. No read is under way on return.

Errors: none; None where the words are not to be had like this (no AIO, not in the page cache, a
read error), and who asks reads the clusters whole.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from liveblockd.storage import hostcalls
from liveblockd.storage.many_requests import MOST, Integers, Unsigned, address_of, context

WORD: Final = 8  # bytes


class _Local(threading.local):
    def __init__(self) -> None:
        self.words = np.zeros(MOST, np.uint64)
        self.addresses = address_of(self.words) + WORD * np.arange(MOST, dtype=np.uint64)


_local = _Local()


def nowait_flags(fd: int) -> int:
    """Flags of a read that must not wait: tmpfs takes none, and never waits."""
    return 0 if hostcalls.is_in_memory(fd) else os.RWF_NOWAIT


def first_words(fd: int, offset: int, count: int, step: int) -> Unsigned | None:
    """The words at ``offset`` and each ``step`` bytes further, ``count`` of them; or None."""
    places = np.arange(count, dtype=np.int64) * step + offset
    return _in_parts(fd, places, nowait_flags(fd))


def first_words_of(
    pieces: Sequence[tuple[int, int, int]], step: int, known: Mapping[int, int | None]
) -> Unsigned | None:
    """The same of (descriptor, offset, count) in turn, one after the other; or None.

    ``known`` has the ``nowait_flags`` of each descriptor, or None where they are to be found out.
    """
    flags = {fd: nowait_flags(fd) if flag is None else flag for fd, flag in known.items()}
    fds, starts, counts = np.array(pieces, np.int64).reshape(-1, 3).T
    before = np.cumsum(counts) - counts
    places = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(before, counts)
    return _in_parts(
        np.repeat(fds, counts),
        places * step + np.repeat(starts, counts),
        np.repeat(np.array([flags[piece[0]] for piece in pieces]), counts),
    )


def _in_parts(
    fds: int | npt.NDArray[np.int64], places: Integers, flags: int | npt.NDArray[np.int64]
) -> Unsigned | None:
    if len(places) <= MOST:
        return _read(fds, places, flags)
    parts: list[Unsigned] = []
    for start in range(0, len(places), MOST):
        part = slice(start, start + MOST)
        words = _read(
            fds if isinstance(fds, int) else fds[part],
            places[part],
            flags if isinstance(flags, int) else flags[part],
        )
        if words is None:
            return None
        parts.append(words)
    return np.concatenate(parts)


def _read(fds: npt.ArrayLike, places: Integers, flags: npt.ArrayLike) -> Unsigned | None:
    """A copy of the words, or None."""
    own = context()
    if own is None:
        return None
    count = len(places)
    words = _local.words[:count]
    words[:] = 0
    found = own.read(fds, places, _local.addresses[:count], WORD, flags)
    if found is None or int(found.min()) < 0:
        return None
    return words.copy()
