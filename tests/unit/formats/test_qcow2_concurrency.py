"""Many requests at once on a disk that takes its time, fails, or is cut off: judged by history.

Each guest operation is noted with when it began and ended. What a read returns, or what a disk
holds after a power cut, must be a value that some order of the overlapping operations explains.
"""

from __future__ import annotations

import asyncio
import random
import struct
from dataclasses import dataclass, field
from errno import EIO, ENOSPC

import numpy as np
import pytest

from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.storage.driver import Buffer
from tests.support.begun import write_as_export
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2
from tests.support.qcow2_oracle import Oracle

BLOCK = 256  # bytes; the unit in which history is kept
FOREVER = 1 << 60


class LateDisk(MemoryDriver):
    """Requests take effect some turns of the loop after they began, and end some turns later."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.events: list[tuple[str, int, bytes, int]] = []  # kind, offset, data, request number
        self.requests = 0
        self.failures = 0.0
        self.slow = True
        self.begins = seed % 2 == 0

    async def _turns(self) -> None:
        if self.slow:
            for _ in range(self.random.choice((0, 0, 1, 1, 2, 5, 12))):
                await asyncio.sleep(0)

    def _fail(self, operation: str) -> None:
        if self.failures and self.random.random() < self.failures:
            raise OSError(self.random.choice((EIO, ENOSPC)), f"injected into {operation}")

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if self.random.random() < 0.7:
            return None
        return super().read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self.random.random() < 0.7:
            return False
        self._fail("write_nowait")
        number = self._begin("write", offset, bytes(data))
        assert super().write_nowait(offset, data)
        self._end(number)
        return True

    async def read(self, offset: int, length: int) -> Buffer:
        await self._turns()
        self._fail("read")
        data = await super().read(offset, length)
        await self._turns()
        return data

    async def write(self, offset: int, data: Buffer) -> None:
        number = self._begin("write", offset, bytes(data))
        await self._turns()
        if self.failures and self.random.random() < self.failures:
            part = self.random.randrange(len(data) // 512 + 1) * 512
            await super().write(offset, bytes(data[:part]))
            raise OSError(EIO, "injected into write")
        await super().write(offset, data)
        await self._turns()
        self._end(number)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        await self.write(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        await self.write(offset, b"\xdd" * length)  # what a discard leaves is anybody's guess

    async def flush(self) -> None:
        number = self._begin("flush", 0, b"")
        await self._turns()
        self._fail("flush")
        await super().flush()
        await self._turns()
        self._end(number)

    def _begin(self, kind: str, offset: int, data: bytes) -> int:
        self.requests += 1
        self.events.append((kind, offset, data, self.requests))
        return self.requests

    def _end(self, number: int) -> None:
        self.events.append(("end", 0, b"", number))


def cut(initial: bytes, events: list[tuple[str, int, bytes, int]], rng: random.Random) -> bytes:
    """A disk after a power cut behind ``events``: what was flushed, some sectors of the rest."""
    begun: dict[int, tuple[str, int, bytes]] = {}
    ended: list[int] = []
    covered_by: dict[int, set[int]] = {}  # flush -> writes that had ended when it began
    durable: set[int] = set()
    for kind, offset, data, number in events:
        if kind == "end":
            ended.append(number)
            durable |= covered_by.get(number, set())
            continue
        begun[number] = (kind, offset, data)
        if kind == "flush":
            covered_by[number] = {n for n in ended if begun[n][0] == "write"}
    disk = bytearray(initial)
    keep = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    for number, (kind, offset, data) in begun.items():
        if kind != "write":
            continue
        if len(disk) < offset + len(data):
            disk.extend(bytes(offset + len(data) - len(disk)))
        if number in durable:
            disk[offset : offset + len(data)] = data
            continue
        position = 0
        while position < len(data):
            step = min(512 - (offset + position) % 512, len(data) - position)
            if rng.random() < keep:
                disk[offset + position : offset + position + step] = data[
                    position : position + step
                ]
            position += step
    return bytes(disk)


@dataclass
class Operation:
    value: int
    start: int
    end: int = FOREVER
    surely: bool = True  # False: it may or may not have had an effect


@dataclass
class History:
    """Values of the blocks of a disk over time."""

    blocks: list[list[Operation]]
    clock: int = 1
    flushes: list[tuple[int, int]] = field(default_factory=list)

    def now(self) -> int:
        self.clock += 1
        return self.clock

    def begin(self, offset: int, length: int, value: int, *, surely: bool = True) -> Operation:
        operation = Operation(value, self.now(), surely=surely)
        for block in range(offset // BLOCK, (offset + length) // BLOCK):
            self.blocks[block].append(operation)
        return operation

    def explain(self, block: int, value: int, start: int, end: int) -> bool:
        """Whether somebody who looked between ``start`` and ``end`` can see ``value``."""
        operations, last = self.blocks[block], 0
        # What was over before the last that surely began and ended by then is overwritten.
        for o in operations:
            if o.surely and o.end < start and o.start > last:
                last = o.start
        for o in reversed(operations):
            if o.value == value and o.start <= end and o.end >= last:
                return True
        return False

    def check(self, data: bytes, offset: int, start: int, end: int, what: str) -> None:
        assert len(data) % BLOCK == 0 == offset % BLOCK
        grid = np.frombuffer(data, "<u4").reshape(-1, BLOCK // 4)
        whole = (grid == grid[:, :1]).all(axis=1).tolist()
        first = offset // BLOCK
        for block, (value, same) in enumerate(zip(grid[:, 0].tolist(), whole, strict=True), first):
            assert same and self.explain(block, value, start, end), (
                f"{what}: block {block} (offset {block * BLOCK:#x}) reads "
                f"{grid[block - first, :2].tobytes().hex()}.., "
                f"history {self.blocks[block][-6:]}"
            )


def pattern(value: int, length: int) -> bytes:
    return struct.pack("<I", value) * (length // 4)


class Guest:
    """Random requests to one image."""

    def __init__(self, image: Qcow2, history: History, rng: random.Random, below: bytes) -> None:
        self.image = image
        self.history = history
        self.rng = rng
        self.below = below
        self.values = 1000
        self.failed = 0

    def _range(self, granularity: int = BLOCK) -> tuple[int, int]:
        size = self.image.length
        offset = self.rng.randrange(0, size, granularity)
        most = self.rng.choice((BLOCK, 4 * BLOCK, 16 * BLOCK, size))
        length = self.rng.randrange(granularity, max(granularity, most) + 1, granularity)
        return offset, min(length, size - offset)

    async def step(self) -> None:
        kind = self.rng.choices(
            ("write", "read", "discard", "zero", "flush", "populate", "map", "compressed"),
            (10, 8, 2, 3, 1.5, 4, 1, 2),
        )[0]
        await getattr(self, kind)()

    async def write(self) -> None:
        offset, length = self._range()
        self.values += 1
        data = pattern(self.values, length)
        operation = self.history.begin(offset, length, self.values)
        try:
            if not self.image.write_nowait(offset, data):
                await write_as_export(self.image, offset, data)
        except OSError:
            self.failed += 1
            operation.surely = False
        operation.end = self.history.now()

    async def compressed(self) -> None:
        assert self.image.cluster_size is not None
        offset, length = self._range(self.image.cluster_size)
        self.values += 1
        operation = self.history.begin(offset, length, self.values)
        try:
            await self.image.write_compressed(offset, pattern(self.values, length))
        except OSError:
            self.failed += 1
            operation.surely = False
        operation.end = self.history.now()

    async def zero(self) -> None:
        offset, length = self._range()
        operation = self.history.begin(offset, length, 0)
        try:
            await self.image.write_zeroes(offset, length, may_unmap=self.rng.random() < 0.5)
        except OSError:
            self.failed += 1
            operation.surely = False
        operation.end = self.history.now()

    async def discard(self) -> None:
        offset, length = self._range()
        operation = self.history.begin(offset, length, 0, surely=False)
        try:
            await self.image.discard(offset, length)
        except OSError:
            self.failed += 1
        operation.end = self.history.now()

    async def read(self) -> None:
        offset, length = self._range()
        start = self.history.now()
        try:
            data = self.image.read_nowait(offset, length)
            if data is None:
                data = await self.image.read(offset, length)
        except OSError:
            self.failed += 1
            return
        assert len(data) == length
        self.history.check(bytes(data), offset, start, self.history.now(), "read")

    async def flush(self) -> None:
        start = self.history.now()
        try:
            await self.image.flush()
        except OSError:
            self.failed += 1
        else:
            self.history.flushes.append((start, self.history.now()))

    async def populate(self) -> None:
        assert self.image.cluster_size is not None
        offset, length = self._range(self.image.cluster_size)
        if self.image.children.get("backing") is None:
            return
        data = self.below[offset : offset + length].ljust(length, b"\0")
        try:
            await self.image.populate(offset, data)
        except OSError:
            self.failed += 1

    async def map(self) -> None:
        offset, length = self._range()
        try:
            extents = await self.image.map(offset, length)
        except OSError:
            self.failed += 1
            return
        assert 0 < sum(e.length for e in extents) <= length


@dataclass
class World:
    """An image, its disk, and everything that was done to it."""

    disk: LateDisk
    image: Qcow2
    history: History
    guest: Guest
    below: bytes
    initial: bytes


CONFIGURATIONS = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 32},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 512, "version": 2},
]
#: subclusters of 512 bytes, twice a block of the history
EXTENDED = {"cluster_size": 16384, "extended_l2": True, "version": 3}


def seeds(first: int, *, plain: int, extended: int) -> pytest.MarkDecorator:
    """So many seeds with any plain configuration, and then so many with subclusters."""
    runs = [
        (first + number, EXTENDED if number >= plain else {}) for number in range(plain + extended)
    ]
    names = [f"{seed}{'-extended' if options else ''}" for seed, options in runs]
    return pytest.mark.parametrize(("seed", "options"), runs, ids=names)


async def make_world(seed: int, *, with_backing: bool = True, **overrides: int) -> World:
    rng = random.Random(seed)
    options: dict[str, int] = {**rng.choice(CONFIGURATIONS), **overrides}
    cluster_size = options["cluster_size"]
    clusters = (3, 5, 9) if "extended_l2" in options else (24, 40, 100)
    size = rng.choice(clusters) * max(cluster_size, 2048) + rng.choice((0, 512))
    blocks = size // BLOCK
    below_blocks = rng.choice((blocks, blocks // 2 + 1, blocks + 7)) if with_backing else 0
    # Some of what is below is zeros.
    numbers = [rng.choice((0, n + 1, n + 1)) for n in range(below_blocks)]
    below = b"".join(pattern(n, BLOCK) for n in numbers)
    disk = LateDisk(seed)
    disk.slow = False
    backing = "below" if with_backing else None
    await new_qcow2(disk, size=size, backing_file=backing, **options)
    initial = disk.content()
    disk.events.clear()
    disk.slow = True
    image = await open_qcow2(
        disk,
        MemoryDriver.of(below, nowait=rng.random() < 0.5) if with_backing else None,
        l2_cache_size=cluster_size * 4,
        pass_discard_request=rng.random() < 0.5,
    )
    history = History(
        [[Operation(numbers[n] if n < below_blocks else 0, 0, 0)] for n in range(blocks)]
    )
    guest = Guest(image, history, rng, below)
    return World(disk, image, history, guest, below, initial)


async def work(world: World, steps: int, at_once: int) -> None:
    """``steps`` operations, ``at_once`` of them at a time."""
    left = steps

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await world.guest.step()

    await asyncio.gather(*(worker() for _ in range(at_once)))


def judge(world: World) -> Oracle:
    """The image after a clean close: sound, nothing leaked, the guest's data in it."""
    oracle = Oracle(world.disk.content())
    assert not oracle.errors, oracle.errors[:5]
    now = world.history.now()
    world.history.check(oracle.read(world.below), 0, now, now, "closed image")
    return oracle


@seeds(0, plain=30, extended=14)
async def test_overlapping_requests(seed: int, options: dict[str, int]) -> None:
    world = await make_world(seed, with_backing=seed % 5 != 4, **options)
    await work(world, steps=250, at_once=8)
    await world.image.close()
    assert world.guest.failed == 0
    assert not judge(world).leaks


@seeds(100, plain=20, extended=8)
async def test_failing_file(seed: int, options: dict[str, int]) -> None:
    world = await make_world(seed, **options)
    world.disk.failures = 0.05
    await work(world, steps=200, at_once=6)
    assert world.guest.failed
    world.disk.failures = 0.0
    await work(world, steps=40, at_once=4)
    await world.image.close()
    judge(world)  # leaks are allowed after errors, damage is not


@seeds(200, plain=15, extended=7)
async def test_cancelled_callers(seed: int, options: dict[str, int]) -> None:
    """A request whose caller is cancelled may or may not happen, and harms nothing else."""
    world = await make_world(seed, **options)
    rng = world.guest.rng
    tasks: set[asyncio.Task[None]] = set()
    for _ in range(150):
        task = asyncio.create_task(world.guest.step())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if tasks and rng.random() < 0.3:
            rng.choice(sorted(tasks, key=id)).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [r for r in results if isinstance(r, AssertionError)], results
    for operations in world.history.blocks:
        for operation in operations:
            if operation.end == FOREVER:
                operation.surely = False
    await world.image.close()
    assert not judge(world).leaks


async def stream(world: World) -> None:
    """What block-stream does to the image: everything from below, then the header."""
    size, cluster_size = world.image.length, world.image.cluster_size
    assert cluster_size is not None
    chunk = cluster_size * 5
    for offset in range(0, size, chunk):
        length = min(chunk, size - offset)
        data = world.below[offset : offset + length].ljust(length, b"\0")
        if any(data):
            await world.image.populate(offset, data)
        else:
            await world.image.populate_zeroes(offset, length)
    await world.image.change_backing_file(None, None)
    world.image.children.pop("backing")


def check_cuts(world: World, rng: random.Random, cuts: int) -> None:
    """Power cuts at random moments: sound images, and every flushed byte as it was."""
    events, marks = world.disk.events, world.marks  # type: ignore[attr-defined]
    for _ in range(cuts):
        at = rng.randrange(len(events) + 1)
        disk = cut(world.initial, events[:at], rng)
        oracle = Oracle(disk)
        assert not oracle.errors, f"cut at {at} of {len(events)}: {oracle.errors[:5]}"
        moment = marks[at] if at < len(marks) else world.history.clock
        flushed = max((s for s, e in world.history.flushes if e <= moment), default=0)
        world.history.check(oracle.read(world.below), 0, flushed, moment, f"cut at {at}")


def watch(world: World) -> None:
    """Note the guest's clock at every event of the disk."""
    marks: list[int] = []

    class Noting(list):  # type: ignore[type-arg]
        def append(self, event: object) -> None:
            super().append(event)
            marks.append(world.history.now())

    world.disk.events = Noting()
    world.marks = marks  # type: ignore[attr-defined]


@seeds(300, plain=25, extended=14)
async def test_power_cuts(seed: int, options: dict[str, int]) -> None:
    world = await make_world(seed, **options)
    watch(world)
    await work(world, steps=80, at_once=5)
    await asyncio.gather(work(world, steps=40, at_once=3), stream(world))
    await work(world, steps=20, at_once=3)
    await world.guest.flush()
    check_cuts(world, random.Random(seed), 60)
    await world.image.close()
    assert not judge(world).leaks
