"""Dirty bitmaps: which parts of a disk were written to since somebody asked.

Specification: qapi/block-core.json (BlockDirtyInfo and the block-dirty-bitmap commands), QEMU's
docs/interop/bitmaps. The bits lie as a qcow2 image stores them: bit ``n`` of the bitmap is bit
``n % 8`` of byte ``n // 8``.

Runs on: pure. Invariants: bits beyond the end of the disk are 0; the array is whole 64-bit words.
A range is marked after its write has ended, so that who clears a bit and then reads the disk either
gets the new bytes or finds the bit set again.

Errors: ``BlockError`` in QEMU's words from ``check`` and the functions that make one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from errno import EBUSY, EINVAL, EPERM
from typing import Final

import numpy as np
import numpy.typing as npt

from liveblockd.errors import BlockError
from liveblockd.storage.flags import first_true

#: bytes of the bitmap that are looked at in one step
_STEP: Final = 8192
MIN_GRANULARITY: Final = 512
MAX_NAME: Final = 1023
DEFAULT_GRANULARITY: Final = 65536
_WORD: Final = 8


class DirtyBitmap:
    """One bitmap of a disk of ``size`` bytes; ``granularity`` is the bytes that one bit stands for.

    The name is empty for those that jobs make for themselves.
    """

    def __init__(self, size: int, granularity: int, *, name: str = "") -> None:
        assert granularity & (granularity - 1) == 0
        self.name = name
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        #: writes are recorded
        self.enabled = True
        #: stored in the image when that is closed
        self.persistent = False
        #: somebody did not store it: what it says is worth nothing
        self.inconsistent = False
        #: a job or an export uses it
        self.busy = False
        #: takes the writes while a job works off what is dirty here
        self.successor: DirtyBitmap | None = None
        self.bits: npt.NDArray[np.uint8] = np.zeros(self._bytes(size), np.uint8)
        self._count: int | None = 0

    @property
    def length(self) -> int:
        """Bits that belong to the disk."""
        return -(-self.size // self.granularity)

    def _bytes(self, size: int) -> int:
        words = -(-size // (self.granularity * 8 * _WORD))
        return max(1, words) * _WORD

    # -- marking

    def record(self, offset: int, length: int) -> None:
        """A write has ended, well or not."""
        if self.enabled and length:
            (self.successor or self).set(offset, length)

    def set(self, offset: int, length: int) -> None:
        """All granules that the range touches are dirty."""
        end = min(offset + length, self.size)
        if offset < end:
            self._fill(offset >> self._shift, (end - 1 >> self._shift) + 1, 0xFF)

    def reset(self, offset: int, length: int) -> None:
        """All granules that lie in the range whole are clean; the last may be short.

        A granule of which only a part was dealt with stays dirty.
        """
        end = min(offset + length, self.size)
        first = -(-offset // self.granularity)
        last = self.length if end == self.size else end >> self._shift
        self._fill(first, last, 0)

    def clear(self) -> None:
        """All is clean."""
        self.bits[:] = 0
        self._count = 0

    def _fill(self, first: int, end: int, value: int) -> None:
        if first >= end:
            return
        self._count = None
        bits = self.bits
        low, high = first >> 3, end >> 3
        head = 0xFF << (first & 7) & 0xFF  # bits from ``first`` on
        tail = (1 << (end & 7)) - 1  # bits below ``end``
        if low == high:
            self._mix(low, head & tail, value)
            return
        if first & 7:
            self._mix(low, head, value)
            low += 1
        if low < high:
            bits[low:high] = value
        if tail:
            self._mix(high, tail, value)

    def _mix(self, index: int, mask: int, value: int) -> None:
        if value:
            self.bits[index] |= mask
        else:
            self.bits[index] &= ~mask & 0xFF

    def merge(self, other: DirtyBitmap) -> None:
        """What is dirty in ``other``, a bitmap of the same or a smaller disk, is dirty here too."""
        if other.granularity == self.granularity:
            count = min(len(self.bits), len(other.bits))
            self.bits[:count] |= other.bits[:count]
            self._count = None
            self._trim()
            return
        for offset, length in other.runs():
            self.set(offset, length)

    def resize(self, size: int) -> None:
        """The disk has another size; new bytes are clean."""
        if self.successor is not None:
            self.successor.resize(size)
        bits = np.zeros(self._bytes(size), np.uint8)
        count = min(len(bits), len(self.bits))
        bits[:count] = self.bits[:count]
        self.bits, self.size, self._count = bits, size, None
        self._trim()

    def _trim(self) -> None:
        """Nothing beyond the end."""
        end = self.length
        if end < len(self.bits) * 8:
            self.bits[(end + 7) >> 3 :] = 0
            if end & 7:
                self.bits[end >> 3] &= (1 << (end & 7)) - 1

    def load(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Take the bits from pieces of what an image stores: (offset in bytes of bits, bytes)."""
        self.clear()
        for start, data in pieces:
            source = np.frombuffer(data, np.uint8)[: max(0, len(self.bits) - start)]
            self.bits[start : start + len(source)] = source
        self._count = None
        self._trim()

    def dump(self) -> bytes:
        """The bytes that hold the bits of the disk, for an image; of a job's share, too."""
        if self.successor is not None:
            both = self.copy()
            both.merge(self.successor)
            return both.dump()
        return self.bits[: (self.length + 7) >> 3].tobytes()

    def copy(self) -> DirtyBitmap:
        """The bits alone: an unnamed bitmap of the same granularity."""
        other = DirtyBitmap(self.size, self.granularity)
        other.bits[:] = self.bits
        other._count = self._count
        return other

    def restore(self, saved: DirtyBitmap) -> None:
        """Take the bits back that ``copy`` saved."""
        self.bits[:] = saved.bits
        self._count = saved._count

    # -- in use by a job

    def freeze(self) -> None:
        """Stay as it is from now on, for a job; writes are recorded apart until ``thaw``."""
        assert self.successor is None
        self.busy = True
        self.successor = DirtyBitmap(self.size, self.granularity)

    def thaw(self, *, keep: bool, undone: DirtyBitmap | None = None) -> None:
        """The job is over. With ``keep`` it has dealt with nothing: all stays dirty that was.

        Else what was written meanwhile is dirty, and what the job has left ``undone``.
        """
        successor, self.successor = self.successor, None
        assert successor is not None
        self.busy = False
        if not keep:
            self.clear()
        self.merge(successor)
        if undone is not None:
            self.merge(undone)

    # -- asking

    def any_dirty(self, offset: int, length: int) -> bool:
        """Whether a granule that the range touches is dirty; ``length`` is not 0."""
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        if first == last:
            return bool(int(self.bits[first >> 3]) >> (first & 7) & 1)
        return next(self.runs(offset, length), None) is not None

    def dirty_bytes(self, offset: int, length: int) -> int:
        """How much of the range is dirty."""
        return sum(count for _, count in self.runs(offset, length))

    @property
    def count(self) -> int:
        """Dirty granules."""
        if self._count is None:
            self._count = int(np.bitwise_count(self.bits.view(np.uint64)).sum())
        return self._count

    def is_dirty(self, offset: int) -> bool:
        """Whether the granule of ``offset`` is dirty."""
        bit = offset >> self._shift
        return bool(int(self.bits[bit >> 3]) >> (bit & 7) & 1)

    def next_dirty(self, offset: int) -> int:
        """The first dirty byte from ``offset`` on, or -1: the start of its granule at the least."""
        bit = offset >> self._shift
        index = bit >> 3
        if index >= len(self.bits):
            return -1
        if found := int(self.bits[index]) >> (bit & 7):
            bit += (found & -found).bit_length() - 1
            return max(offset, bit << self._shift)
        index += 1
        while index < len(self.bits):
            part = self.bits[index : index + _STEP]
            if part.any():
                index += first_true(part != 0)
                found = int(self.bits[index])
                return (index << 3 | (found & -found).bit_length() - 1) << self._shift
            index += _STEP
        return -1

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """(offset, length) of the dirty areas in a range, in bytes, adjacent granules joined.

        The bitmap may change while a caller goes on: each step of 64 Ki granules is looked at when
        it is reached.
        """
        end = self.size if length is None else min(self.size, offset + length)
        bit, stop = offset >> self._shift, -(-end // self.granularity)
        start = -1  # of the run that is open
        while bit < stop:
            base = bit & ~7
            limit = min(stop, base + _STEP * 8)
            part = self.bits[base >> 3 : (limit + 7) >> 3]
            if not part.any():
                if start >= 0:
                    yield self._run(start, bit, offset, end)
                    start = -1
                bit = limit
                continue
            flags = np.unpackbits(part, bitorder="little")[bit - base : limit - base]
            edges = np.flatnonzero(np.diff(flags, prepend=np.uint8(start >= 0))) + bit
            for edge in edges.tolist():
                if start < 0:
                    start = edge
                else:
                    yield self._run(start, edge, offset, end)
                    start = -1
            bit = limit
        if start >= 0:
            yield self._run(start, stop, offset, end)

    def _run(self, first: int, last: int, offset: int, end: int) -> tuple[int, int]:
        low = max(first << self._shift, offset)
        return low, min(last << self._shift, end) - low

    def sha256(self) -> str:
        """Digest of the bits, in whole 64-bit words, as QEMU makes it."""
        return hashlib.sha256(self.bits.tobytes()).hexdigest()

    def check(self, *, read_only: bool = False, allow_inconsistent: bool = False) -> None:
        """BlockError if it cannot be used now; ``read_only``: its image is, and it is to change."""
        if self.busy:
            raise BlockError(
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used",
                errno=EBUSY,
            )
        if read_only and self.persistent:
            raise BlockError(
                f"Bitmap '{self.name}' is readonly and cannot be modified", errno=EPERM
            )
        if self.inconsistent and not allow_inconsistent:
            raise BlockError(
                f"Bitmap '{self.name}' is inconsistent and cannot be used", errno=EINVAL
            )

    def to_qmp(self) -> dict[str, object]:
        """BlockDirtyInfo."""
        info: dict[str, object] = {
            "count": self.count * self.granularity,
            "granularity": self.granularity,
            "recording": self.enabled,
            "busy": self.busy,
            "persistent": self.persistent,
        }
        if self.name:
            info["name"] = self.name
        if self.inconsistent:
            info["inconsistent"] = True
        return info


def default_granularity(cluster_size: int | None) -> int:
    """Bytes: a cluster, but from 4 KiB to 64 KiB; 64 KiB where there are no clusters.

    Of an image with clusters of 2 MiB an increment is no larger than what was written asks for.
    """
    return min(max(4096, cluster_size or DEFAULT_GRANULARITY), DEFAULT_GRANULARITY)


def check_granularity(granularity: int) -> None:
    """BlockError for what no bitmap can have."""
    if granularity < MIN_GRANULARITY or granularity & (granularity - 1):
        raise BlockError("Granularity must be power of 2 and at least 512")
