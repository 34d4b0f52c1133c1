"""What a mirror has still to copy: the dirty bitmap of its source, and what is under way of it.

Runs on the event loop. Invariants:

* Two requests to the target never overlap: a copy that is late would undo what came after it.
  Each holds a ``Claim`` in whole units; guests' writes wait for theirs, copies look elsewhere.
* A chunk is clean from the moment its copy begins, so that a write that ends meanwhile is seen.
* A pass goes through the disk once: what is written again and again is copied once a pass, so
  that the rest shrinks as long as writing is slower than copying.

No errors escape.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from liveblockd.graph.bitmaps import DirtyBitmap

_WORD: Final = 8
#: bytes of a copy that is small, and how many times more of them go on at a time
_SMALL: Final = 64 * 1024
_MORE_SMALL: Final = 4
#: the bitmap of the mirror on whose behalf the current task writes to its source
_mirrored: ContextVar[DirtyBitmap | None] = ContextVar("mirrored", default=None)


#: what guests write is told apart down to this, in bytes; they seldom write less
_FINEST: Final = 4096
#: granules a bitmap has at most for that; 1 MiB of bits
_MOST_GRANULES: Final = 8 << 20


class MirrorBitmap(DirtyBitmap):
    """Records what is written to a source, but for what its mirror writes to both sides.

    Finer than ``block``, the granularity that the client knows: where guests write 4 KiB here and
    there, copying all of each block would be 16 times as much as they write, and a mirror with a
    speed limit would not get ahead of them. Not with ``whole``: then all copies are whole blocks.
    """

    def __init__(self, size: int, block: int, *, whole: bool = False) -> None:
        finest = max(_FINEST, 1 << (size // _MOST_GRANULES).bit_length())
        super().__init__(size, block if whole else min(block, finest))
        self.block = block

    def set_blocks(self, offset: int, length: int) -> None:
        """What is not known to be clean is copied, and counted, by whole blocks."""
        start = offset // self.block * self.block
        self.set(start, -(-(offset + length) // self.block) * self.block - start)

    def next_piece(self, position: int, limit: int) -> tuple[int, int] | None:
        """(start, end) of the next that is dirty: of each block all from the first to the last
        dirty byte, so that no block makes two copies. It is looked for up to ``limit`` bytes.
        """
        found = self.next_dirty(position)
        if found < 0:
            return None
        end = found
        for start, length in self.runs(found, limit):
            if start != end and start // self.block != (end - 1) // self.block:
                break
            end = start + length
        return found, end

    def _fill(self, first: int, end: int, value: int) -> None:
        """Also keeps the count, which the job asks for after every copy."""
        count = self._count
        low, high = first >> 3, (end + 7) >> 3
        before = self._ones(low, high)
        super()._fill(first, end, value)
        if count is not None:
            self._count = count + self._ones(low, high) - before

    def _ones(self, low: int, high: int) -> int:
        part = self.bits[low:high]
        if high - low <= _WORD:
            return int.from_bytes(part.tobytes()).bit_count()
        return int(np.bitwise_count(part).sum())

    def to_qmp(self) -> dict[str, object]:
        """BlockDirtyInfo, with the granularity that was asked for."""
        return super().to_qmp() | {"granularity": self.block}

    def record(self, offset: int, length: int) -> None:
        """A write has ended, well or not."""
        if _mirrored.get() is not self:
            super().record(offset, length)

    def look_away(self) -> None:
        """What the current task writes from now on is not recorded."""
        _mirrored.set(self)


def most_copies(share: int, under_way: int) -> int:
    """How many copies may go on, where ``share`` large ones may; ``under_way`` is their bytes.

    Small ones cost the loop and no worker. Were there not more of them, a guest that keeps the
    loop busy with small writes would stay ahead of the mirror.
    """
    return share * _MORE_SMALL if under_way < share * _SMALL else share


@dataclass(eq=False, slots=True)
class Claim:
    """A range, in bytes, that one request to the target has for itself."""

    start: int
    end: int
    waiters: list[asyncio.Future[None]] = field(default_factory=list)

    def let_in(self) -> None:
        """Let those look again who wait for it."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)


class Chunks:
    """The rest of a disk of ``size`` bytes; claims and copies are in multiples of ``unit``."""

    def __init__(self, bitmap: MirrorBitmap, unit: int) -> None:
        assert unit % bitmap.granularity == 0
        self.bitmap = bitmap
        self.unit = unit
        #: how often it began again at the start, for what was written behind it
        self.passes = 0
        self._cursor = 0
        self._claims: list[Claim] = []
        self._open = False

    @property
    def rest(self) -> int:
        """Bytes that are dirty; what is claimed is not among them."""
        bitmap = self.bitmap
        count = bitmap.count * bitmap.granularity
        over = bitmap.length * bitmap.granularity - bitmap.size
        if over and count and bitmap.is_dirty(bitmap.size - 1):
            count -= over
        return count

    @property
    def claimed(self) -> bool:
        """Whether anything is under way."""
        return bool(self._claims)

    def widened(self, start: int, end: int) -> tuple[int, int]:
        """The range in whole units; the last one of the disk may be short."""
        unit = self.unit
        return start // unit * unit, min(-(-end // unit) * unit, self.bitmap.size)

    def take(self, limit: int) -> Claim | None:
        """Claim the next dirty range of at most ``limit`` bytes and call it clean; None: nothing.

        Nothing also when all that is dirty is claimed.
        """
        start = self._cursor
        if (claim := self._take(start, self.bitmap.size, limit)) is None:
            claim = self._take(0, start, limit)
            self.passes += claim is not None
        if claim is not None:
            self._cursor = claim.end
        return claim

    def _take(self, position: int, stop: int, limit: int) -> Claim | None:
        bitmap = self.bitmap
        limit = max(limit, self.unit)
        while (piece := bitmap.next_piece(position, limit)) is not None and piece[0] < stop:
            start, end = self.widened(*piece)
            end = min(end, start + limit // self.unit * self.unit)
            blocker = self._blocker(start, end)
            if blocker is not None:
                if blocker.start <= start:
                    position = blocker.end
                    continue
                end = blocker.start
            claim = Claim(start, end)
            self._claims.append(claim)
            bitmap.reset(start, end - start)
            return claim
        return None

    async def enter(self, start: int, end: int) -> Claim:
        """Claim a range for a write, as soon as nothing else has any of it."""
        start, end = self.widened(start, end)
        while not self._open and (blocker := self._first_blocker(start, end)) is not None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            blocker.waiters.append(waiter)
            await waiter
        claim = Claim(start, end)
        self._claims.append(claim)
        return claim

    def let_in(self) -> None:
        """Nothing more is written to the target: who waits for a claim need not, now or later."""
        self._open = True
        for claim in self._claims:
            claim.let_in()

    def leave(self, claim: Claim) -> None:
        """The request has ended, well or not."""
        self._claims.remove(claim)
        claim.let_in()

    def _blocker(self, start: int, end: int) -> Claim | None:
        """The one that begins first."""
        found = [c for c in self._claims if c.start < end and start < c.end]
        return min(found, key=lambda claim: claim.start) if found else None

    def _first_blocker(self, start: int, end: int) -> Claim | None:
        for claim in self._claims:
            if claim.start < end and start < claim.end:
                return claim
        return None
