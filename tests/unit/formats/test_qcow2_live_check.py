"""The check of an image in use: verdicts of the other check, guests at work, leaks given back."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.check import CheckResult
from liveblockd.formats.qcow2.checking import check_image
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.live_check import LiveCheck
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2

K = 1024
SIZE = 4 << 20


WORKERS = 3


class Guest:
    """Random requests, three at a time, held off while the check wants quiet.

    ``disk`` is what must be read.
    """

    def __init__(self, image: Qcow2, rng: random.Random) -> None:
        self.image = image
        self.rng = rng
        self.disk = bytearray(image.length)
        self.done = 0
        self.stopping = False
        self._in_flight = 0
        self._change = asyncio.Condition()
        self._held = False

    async def work(self) -> None:
        await asyncio.gather(*(self._work(number) for number in range(WORKERS)))

    async def _work(self, number: int) -> None:
        while not self.stopping:
            async with self._change:
                await self._change.wait_for(lambda: not self._held)
            self._in_flight += 1
            await self.request(number)
            self._in_flight -= 1
            self.done += 1
            async with self._change:
                self._change.notify_all()

    async def request(self, part: int) -> None:
        rng, image = self.rng, self.image
        start, end = part * len(self.disk) // 4, (part + 1) * len(self.disk) // 4
        offset = rng.randrange(start, end, 512)
        length = min(end - offset, rng.choice((512, 4096, 20000, 70000)))
        what = rng.choice(("write", "write", "zero", "discard", "flush", "packed"))
        if what == "packed":
            size = image.cluster_size
            offset = offset // size * size
            data = rng.randbytes(size // 4) + bytes(size - size // 4)
            await image.write_compressed(offset, data)
            self.disk[offset : offset + size] = data
        elif what == "write":
            data = rng.randbytes(length)
            await image.write(offset, data)
            self.disk[offset : offset + length] = data
        elif what == "zero":
            await image.write_zeroes(offset, length, may_unmap=rng.random() < 0.7)
            self.disk[offset : offset + length] = bytes(length)
        elif what == "discard":
            await image.discard(offset, length)
            self.disk[offset : offset + length] = await image.read(offset, length)
        elif what == "flush":
            await image.flush()

    @asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        self._held = True
        async with self._change:
            await self._change.wait_for(lambda: not self._in_flight)
        yield
        self._held = False
        async with self._change:
            self._change.notify_all()


async def check(image: Qcow2, **options: Any) -> CheckResult:
    @asynccontextmanager
    async def quiet() -> AsyncIterator[None]:
        yield

    run = LiveCheck(image, options.pop("quiesced", quiet), fix_leaks=options.pop("fix", False),
                    **options)  # fmt: skip
    async for _ in run.scan():
        await asyncio.sleep(0)
    return run.result


async def leak(image: Qcow2, count: int) -> None:
    """Clusters that nobody will ever refer to."""
    for _ in range(count):
        await image._metadata.allocate(1)


def counts(result: CheckResult) -> dict[str, int]:
    return {k: v for k, v in vars(result).items() if isinstance(v, int)}


@pytest.mark.parametrize("seed", range(6))
async def test_guests_at_work(seed: int) -> None:
    rng = random.Random(seed)
    extended = seed % 3 == 2
    file = await new_qcow2(size=SIZE, cluster_size=16 * K if extended else rng.choice((512, 4096)),
                           refcount_bits=rng.choice((8, 16, 64)), extended_l2=extended)  # fmt: skip
    image = await open_qcow2(file, discard="unmap", autosync=0.001)
    guest = Guest(image, rng)
    for number in range(60):
        await guest.request(number % WORKERS)
    leaked = rng.choice((0, 3, 40))
    await leak(image, leaked)
    file.nowait = False

    async def slow() -> None:
        await asyncio.sleep(0)

    file.hook = lambda op, offset, length: slow()
    work = asyncio.create_task(guest.work())
    checks = 0
    while checks < 4 or guest.done < 40:
        window = (1 << 21, 700, 300)[checks % 3]
        result = await check(image, quiesced=guest.quiesced, window=window)
        assert (result.corruptions, result.leaks) == (0, leaked), result.messages
        checks += 1
    result = await check(image, quiesced=guest.quiesced, window=700, fix=True)
    assert (result.corruptions, result.leaks, result.leaks_fixed) == (0, 0, leaked)
    result = await check(image, quiesced=guest.quiesced)
    assert (result.corruptions, result.leaks) == (0, 0), result.messages
    guest.stopping = True
    await work
    assert image._metadata.watch is None
    assert bytes(await image.read(0, SIZE)) == guest.disk
    await image.close()
    file.hook, file.nowait = None, True
    assert (await check_image(file)).clean


@pytest.mark.parametrize("seed", range(3))
async def test_the_counts_of_the_other_check(seed: int) -> None:
    rng = random.Random(seed)
    file = await new_qcow2(size=SIZE, cluster_size=4096)
    image = await open_qcow2(file, discard="unmap")
    guest = Guest(image, rng)
    for number in range(60):
        await guest.request(number % WORKERS)
        if number in (20, 40):
            await image.create_snapshot(f"s{number}", date_nsec=0)
    await leak(image, seed * 5)
    await image.write(SIZE - 64 * K, b"\1" * 64 * K)  # behind them
    found = await check(image)
    await image.close()
    assert counts(found) == counts(await check_image(file))
    assert found.leaks == seed * 5


async def test_corruption_is_told_and_leaks_stay_then() -> None:
    file = await new_qcow2(size=SIZE, cluster_size=4096)
    image = await open_qcow2(file)
    await image.write(0, b"\1" * 40960)
    await leak(image, 4)
    entry = image._metadata.tables[0].view[3] & 0x00FF_FFFF_FFFF_FE00
    image._metadata.refcounts.blocks[0].fill(entry >> 12, 1, 0)
    result = await check(image, fix=True)
    assert result.corruptions == 2  # and the COPIED flag
    assert (result.leaks, result.leaks_fixed) == (4, 0)
    image._metadata.refcounts.blocks[0].fill(entry >> 12, 1, 1)
    assert (await check(image, fix=True)).leaks_fixed == 4
    await image.close()


async def test_a_snapshot_begins_it_anew() -> None:
    file = await new_qcow2(size=SIZE, cluster_size=4096)
    image = await open_qcow2(file)
    for offset in range(0, SIZE, 256 * K):
        await image.write(offset, b"\1" * 4096)
    snapshots = 0

    @asynccontextmanager
    async def quiet() -> AsyncIterator[None]:
        yield

    run = LiveCheck(image, quiet, fix_leaks=False)
    done = []
    async for _ in run.scan():
        done.append(run.done)
        if len(done) in (5, 11):
            await image.create_snapshot(f"s{len(done)}", date_nsec=0)
            await image.write(0, b"\2" * 4096)
            snapshots += 1
    assert snapshots == 2 and done != sorted(done)
    assert (run.result.corruptions, run.result.leaks) == (0, 0)
    await image.close()


async def test_one_at_a_time_and_it_lets_go() -> None:
    file = await new_qcow2(size=SIZE)
    image = await open_qcow2(file)
    await image.write(0, b"\1" * 4096)

    @asynccontextmanager
    async def quiet() -> AsyncIterator[None]:
        yield

    async with contextlib.aclosing(LiveCheck(image, quiet, fix_leaks=False).scan()) as first:
        for _ in range(3):
            await anext(first)
        assert image._metadata.watch is not None
        with pytest.raises(BlockError, match="being checked already"):
            await check(image)
    assert image._metadata.watch is None and not image.being_checked
    assert (await check(image)).clean
    await image.close()


async def test_closed_meanwhile() -> None:
    file = await new_qcow2(size=SIZE, cluster_size=512)
    image = await open_qcow2(file)
    await image.write(0, b"\1" * (1 << 20))

    @asynccontextmanager
    async def quiet() -> AsyncIterator[None]:
        yield

    with pytest.raises(BlockError, match="closed during the check"):
        async for _ in LiveCheck(image, quiet, fix_leaks=False).scan():
            await image.close()


async def test_nothing_is_given_back_while_the_header_is_uncertain() -> None:
    file = await new_qcow2(size=SIZE)
    image = await open_qcow2(file)
    await leak(image, 2)

    def fail(operation: str, offset: int, length: int) -> None:
        if operation == "write" and offset == 0:
            raise OSError(5, "Input/output error")

    file.hook = fail
    with pytest.raises(OSError, match="Input/output"):
        await image.change_backing_file("base", "raw")
    file.hook = None
    assert (await check(image, fix=True)).leaks_fixed == 0
    await image.change_backing_file("base", "raw")
    assert (await check(image, fix=True)).leaks_fixed == 2
    await image.close()
    assert isinstance(file, MemoryDriver) and (await check_image(file)).clean


async def test_an_image_that_shows_an_internal_snapshot() -> None:
    """Its L1 table is the snapshot's: the check would take the disk's clusters for leaks."""
    disk = await new_qcow2(size=SIZE, cluster_size=4 * K)
    image = await open_qcow2(disk)
    await image.write(0, b"a" * 64 * K)
    await image.create_snapshot("one", date_nsec=0)
    await image.write(0, b"b" * 64 * K)
    await image.close()
    image = await open_qcow2(disk, read_only=True)
    result = await check(image)
    assert (result.corruptions, result.leaks) == (0, 0)
    await image.load_snapshot("1")
    assert bytes(await image.read(0, 1)) == b"a"
    with pytest.raises(BlockError, match="shows one of its internal snapshots"):
        image.live_check(contextlib.asynccontextmanager(_quiet))
    await image.close()


async def _quiet() -> AsyncIterator[None]:
    yield
