"""A guest: several requests at a time, of every size and alignment, against a model in memory.

Requests that overlap an unfinished write are not made, since nobody could say what they should
give; requests to other bytes of the same cluster are, and are what finds races.
"""

from __future__ import annotations

import asyncio
import random

import numpy as np

from liveblockd.graph.backend import Backend
from tests.support.begun import write_as_export

KIB = 1024


class Guest:
    """``model`` is what the disk holds; ``run`` goes on until ``stop`` is set."""

    def __init__(self, backend: Backend, model: bytearray, rng: random.Random, name: str) -> None:
        assert backend.length == len(model)
        self.backend = backend
        self.model = model
        self.rng = rng
        self.name = name
        self.stop = asyncio.Event()
        self.requests = 0
        #: above 0: a write may fail, and its bytes are as before or as they should be
        self.may_fail = 0
        self._busy: list[tuple[int, int, bool]] = []

    async def run(self, at_once: int = 4) -> None:
        """Make requests; raises AssertionError for a wrong answer."""
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(self._work())

    async def _work(self) -> None:
        rng = self.rng
        kinds = {self._read: 8, self._write: 8, self._zeroes: 2, self._discard: 2, self._flush: 1}
        while not self.stop.is_set():
            request = rng.choices(list(kinds), list(kinds.values()))[0]
            await request()
            self.requests += 1
            await asyncio.sleep(rng.choice((0, 0, 0, 0, 0.001)))

    def _range(self) -> tuple[int, int]:
        rng, size = self.rng, len(self.model)
        unit = rng.choice((1, 512, 512, 4 * KIB, 4 * KIB, 64 * KIB))
        most = rng.choice((600, 4 * KIB, 20 * KIB, 150 * KIB, 600 * KIB))
        offset = rng.randrange(size) // unit * unit
        length = max(1, rng.randrange(most) // unit) * unit
        return offset, min(length, size - offset)

    def _take(self, writing: bool) -> tuple[int, int] | None:
        """A range that is free, marked as taken."""
        offset, length = self._range()
        for start, end, written in self._busy:
            if offset < end and start < offset + length and (writing or written):
                return None
        self._busy.append((offset, offset + length, writing))
        return offset, length

    def _give(self, offset: int, length: int, writing: bool) -> None:
        self._busy.remove((offset, offset + length, writing))

    async def _read(self) -> None:
        if (place := self._take(False)) is None:
            return
        offset, length = place
        data = self.backend.read_nowait(offset, length) if self.rng.random() < 0.7 else None
        if data is None:
            data = await self.backend.read(offset, length)
        self.expect(offset, data)
        self._give(offset, length, False)

    async def _write(self) -> None:
        if (place := self._take(True)) is None:
            return
        offset, length = place
        kind = self.rng.random()
        data = bytes(length) if kind < 0.1 else self.rng.randbytes(length)
        try:
            if self.rng.random() < 0.7:
                done = self._halves(offset, data)
                if done < length:
                    await write_as_export(self.backend, offset + done, data[done:])
            else:
                await self.backend.write(offset, data)
        except OSError as error:
            await self._failed(offset, data, error)
        else:
            self.model[offset : offset + length] = data
        self._give(offset, length, True)

    def _halves(self, offset: int, data: bytes) -> int:
        """Some writes as two that came together; bytes that are stored."""
        half = len(data) // 2
        if len(data) % 2 or not half or offset // 512 % 2:
            return 0
        parts = (data[:half], data[half:])
        return half * self.backend.write_many_nowait((offset, offset + half), parts)

    async def _failed(self, offset: int, data: bytes, error: OSError) -> None:
        """See what has come of a write."""
        if not self.may_fail:
            raise error
        found = bytes(await self.backend.read(offset, len(data)))
        old = self.model[offset : offset + len(data)]
        got, was, wanted = (np.frombuffer(part, np.uint8) for part in (found, old, data))
        assert ((got == was) | (got == wanted)).all(), f"{self.name}: neither old nor new bytes"
        self.model[offset : offset + len(data)] = found

    async def _zeroes(self) -> None:
        if (place := self._take(True)) is None:
            return
        offset, length = place
        try:
            await self.backend.write_zeroes(offset, length, may_unmap=self.rng.random() < 0.5)
        except OSError as error:
            await self._failed(offset, bytes(length), error)
        else:
            self.model[offset : offset + length] = bytes(length)
        self._give(offset, length, True)

    async def _discard(self) -> None:
        if (place := self._take(True)) is None:
            return
        offset, length = place
        try:
            await self.backend.discard(offset, length)
        except OSError:
            if not self.may_fail:
                raise
        data = bytes(await self.backend.read(offset, length))
        old = self.model[offset : offset + length]
        if data != old and any(data):
            # Each byte is as before or zero; anything else came from below.
            new = np.frombuffer(data, np.uint8)
            wrong = np.flatnonzero((new != np.frombuffer(old, np.uint8)) & (new != 0))
            at = offset + int(wrong[0]) if len(wrong) else 0
            assert not len(wrong), f"{self.name}: a discard uncovered old data at {at:#x}"
        self.model[offset : offset + length] = data
        self._give(offset, length, True)

    async def _flush(self) -> None:
        await self.backend.flush()

    def expect(self, offset: int, data: object) -> None:
        """Compare bytes at ``offset`` with the model."""
        got = bytes(data)  # type: ignore[call-overload]
        wanted = self.model[offset : offset + len(got)]
        if got != wanted:
            first = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
            count = sum(a != b for a, b in zip(got, wanted, strict=True))
            raise AssertionError(
                f"{self.name}: read {offset:#x}+{len(got):#x}: {count} wrong bytes from "
                f"{offset + first:#x} on: {got[first]:#x}, not {wanted[first]:#x}"
            )

    async def compare_all(self) -> None:
        """Read the whole disk."""
        for offset in range(0, len(self.model), 256 * KIB):
            length = min(256 * KIB, len(self.model) - offset)
            self.expect(offset, await self.backend.read(offset, length))
