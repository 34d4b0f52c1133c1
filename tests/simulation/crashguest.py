"""A guest that writes to its drive and notes in the machine's log what it was promised.

Requests that touch the same bytes are never under way together. With faults on, errors are
expected and leave it open what the bytes are; without, an error is a failure of the run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EINVAL, ENOTSUP

from liveblockd.graph.backend import Backend
from tests.simulation.disks import Machine
from tests.support.begun import write_as_export

KIB = 1024


class CrashGuest:
    """``limit``: the most bytes of a request."""

    def __init__(
        self,
        machine: Machine,
        backend: Backend,
        content: bytes,
        rng: random.Random,
        *,
        limit: int,
        cluster_size: int,
        can_compress: Callable[[], bool] = lambda: False,
    ) -> None:
        self.machine = machine
        self.backend = backend
        self.random = rng
        self.limit = limit
        self.cluster_size = cluster_size
        self.can_compress = can_compress
        self.size = backend.length
        #: what reads give; None: an error has left that open
        self.model = bytearray(content)
        self.unknown: list[tuple[int, int]] = []
        self.requests = 0
        self.stopping = False
        #: each is told the places of requests that begin
        self.watchers: list[list[tuple[int, int]]] = []
        self._busy: list[tuple[int, int]] = []
        self._halted = 0
        self._going = asyncio.Event()
        self._going.set()

    async def work(self, at_once: int) -> None:
        """Until ``stopping``."""
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(self._work())

    async def _work(self) -> None:
        kinds = (self._write, self._zeroes, self._discard, self._flush, self._read, self._pack)
        while not self.stopping:
            await self._going.wait()
            await self.random.choices(kinds, (10, 3, 2, 2, 2, 1))[0]()
            self.requests += 1
            pause = self.random.choice((0.0, 0.0, 0.002, 0.02))
            await asyncio.sleep(self.random.random() * pause)

    @asynccontextmanager
    async def halted(self) -> AsyncIterator[None]:
        """Nothing is under way, nothing begins."""
        self._halted += 1
        self._going.clear()
        while self._busy:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        try:
            yield
        finally:
            self._halted -= 1
            if not self._halted:
                self._going.set()

    def _take(self, clusters: int | None = None) -> tuple[int, int] | None:
        """A place nobody is at; of whole ``clusters`` if they have a size."""
        rng = self.random
        if not self._going.is_set():
            return None
        unit = rng.choice((1, 512, 512, 4 * KIB, self.cluster_size, self.cluster_size))
        most = min(self.limit, rng.choice((700, 4 * KIB, 4 * self.cluster_size, self.limit)))
        if clusters is not None:
            unit, most = clusters, min(most, 4 * clusters)
        offset = rng.randrange(self.size) // unit * unit
        length = max(1, rng.randrange(most) // unit) * unit
        length = min(length, self.size - offset)
        if any(offset < end and start < offset + length for start, end in self._busy):
            return None
        self._busy.append((offset, offset + length))
        for watcher in self.watchers:
            watcher.append((offset, offset + length))
        return offset, length

    def under_way(self) -> list[tuple[int, int]]:
        """Where requests are."""
        return list(self._busy)

    def _give(self, offset: int, length: int) -> None:
        self._busy.remove((offset, offset + length))

    def _fails(self, error: OSError) -> None:
        if not self.machine.injected:
            raise error

    def _known(self, offset: int, length: int) -> bool:
        return not any(offset < end and start < offset + length for start, end in self.unknown)

    async def _change(self, kind: str, offset: int, data: bytes) -> None:
        """Make a range ``data`` in the way of ``kind``."""
        number = self.machine.number()
        length = len(data)
        self.machine.note("begin", number, offset, data)
        found = b""
        try:
            if kind == "write":
                await write_as_export(self.backend, offset, data)
            elif kind == "compressed":
                await self._compress(offset, data)
            elif kind == "zeroes":
                unmap = self.random.random() < 0.5
                await self.backend.write_zeroes(offset, length, may_unmap=unmap)
            else:
                await self.backend.discard(offset, length)
                data = found = bytes(await self.backend.read(offset, length))
                if not self._known(offset, length):
                    # What is read now may be half of a failed write, which no flush covers.
                    self.machine.note("failed", number)
                    self.model[offset : offset + length] = data
                    return
        except OSError as error:
            self.machine.note("failed", number)
            self.unknown.append((offset, offset + length))
            self._fails(error)
        else:
            self.machine.note("done", number, 0, found)
            self.model[offset : offset + length] = data
        finally:
            self._give(offset, length)

    async def _write(self) -> None:
        if (place := self._take()) is not None:
            # Zeros: what detect-zeroes looks for.
            zero = self.random.random() < 0.1
            data = bytes(place[1]) if zero else self.random.randbytes(place[1])
            if self.random.random() < 0.1:
                data = bytes(place[1] // 2) + data[place[1] // 2 :]
            await self._change("write", place[0], data)

    async def _pack(self) -> None:
        """Compressed clusters, as who fills an image does."""
        size = self.backend.node.driver.cluster_size or self.cluster_size
        if not self.can_compress() or (place := self._take(size)) is None:
            return
        piece = self.random.randbytes(self.random.choice((8, 200, 4096)))
        data = (piece * (place[1] // len(piece) + 1))[: place[1]]
        await self._change("compressed", place[0], data)

    async def _compress(self, offset: int, data: bytes) -> None:
        try:
            await self.backend.write_compressed(offset, data)
        except OSError as error:
            # Another image may be on top by now, with other clusters, or without compression.
            if error.errno not in (EINVAL, ENOTSUP):
                raise
            await self.backend.write(offset, data)

    async def _zeroes(self) -> None:
        if (place := self._take()) is not None:
            await self._change("zeroes", place[0], bytes(place[1]))

    async def _discard(self) -> None:
        if (place := self._take()) is not None:
            await self._change("discard", place[0], bytes(place[1]))

    async def _flush(self) -> None:
        if not self._going.is_set():
            return
        number = self.machine.number()
        self.machine.note("sync", number)
        self._busy.append((0, 0))
        try:
            await self.backend.flush()
        except OSError as error:
            self._fails(error)
        else:
            self.machine.note("synced", number)
        finally:
            self._give(0, 0)

    async def _read(self) -> None:
        if (place := self._take()) is None:
            return
        offset, length = place
        try:
            data = self.backend.read_nowait(offset, length)
            if data is None:
                data = await self.backend.read(offset, length)
            if self._known(offset, length):
                assert bytes(data) == self.model[offset : offset + length], (
                    f"a guest read wrong bytes at {offset:#x}+{length:#x}"
                )
        except OSError as error:
            self._fails(error)
        finally:
            self._give(offset, length)

    async def resize(self, size: int) -> None:
        """block_resize while the guest waits."""
        async with self.halted():
            number = self.machine.number()
            self.machine.note("resize", number, size)
            try:
                await self.backend.graph.resize(self.backend.node, size)
            except OSError as error:
                # The old size, or the new one: it stays open.
                self.unknown.append((min(self.size, size), len(self.model)))
                self._fails(error)
                return
            self.machine.note("resized", number)
            low = min(size, self.size)
            self.model[low:] = bytes(len(self.model) - low)
            self.size = size
