"""The flat map of a chain: the bytes of the slow path, whatever changes below, in one read.

The oracle walks ``map`` of each layer, which knows nothing of the flat map.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from itertools import pairwise

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.raw import Raw
from liveblockd.storage import flatmap, spans
from liveblockd.storage.driver import BlockDriver, BlockIO, ExtentKind
from liveblockd.storage.flatmap import FlatMap
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2
from tests.unit.formats.test_qcow2_concurrency import LateDisk

BLOCK = 512
SIZE = 256 << 10


async def walk(node: BlockIO | None, offset: int, length: int) -> bytes:
    """What a range reads as, found layer by layer without any map of the chain."""
    if node is None:
        return bytes(length)
    there = max(0, min(length, node.length - offset))
    found = bytearray()
    while len(found) < there:
        position = offset + len(found)
        for extent in await node.map(position, there - len(found)):
            at, part = offset + len(found), extent.length
            if extent.kind is ExtentKind.UNALLOCATED:
                found += await walk(node.children.get("backing"), at, part)
            elif extent.kind is ExtentKind.ZERO:
                found += bytes(part)
            elif isinstance(node, Qcow2) and extent.kind is ExtentKind.DATA:
                file = node._metadata.data
                data = await file.read(extent.host_offset, min(part, file.length))
                found += bytes(data).ljust(part, b"\0")
            else:  # a cluster that only the layer can unpack
                found += bytes(await node.read(at, part))
    return bytes(found).ljust(length, b"\0")


class Chain:
    """Images in memory; ``layers[0]`` is the bottom."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.layers: list[BlockDriver] = []
        self.disks: list[MemoryDriver] = []

    async def add(self, size: int, *, late: bool = False, **options: object) -> Qcow2:
        disk = LateDisk(self.rng.randrange(1 << 30)) if late else MemoryDriver()
        if isinstance(disk, LateDisk):
            disk.slow = False
        await new_qcow2(disk, size=size, **options)
        below = self.layers[-1] if self.layers else None
        layer = await open_qcow2(disk, below, discard="unmap")
        if isinstance(disk, LateDisk):
            disk.slow = True
        self.layers.append(layer)
        self.disks.append(disk)
        return layer

    async def random_layers(self, count: int, *, late: bool = False) -> None:
        rng = self.rng
        if rng.random() < 0.4:
            disk = MemoryDriver(SIZE - rng.choice((0, 512, 7000 // 512 * 512)))
            self.layers.append(Raw({"file": disk}, 0, None))
            self.layers[0].read_only = False
            self.disks.append(disk)
            await disk.write(0, rng.randbytes(disk.length))
        for _ in range(count):
            options = rng.choice(
                (
                    {"cluster_size": 512},
                    {"cluster_size": 4096},
                    {"cluster_size": 65536},
                    {"cluster_size": 16384, "extended_l2": True},
                    {"cluster_size": 65536, "extended_l2": True},
                    {"cluster_size": 4096, "version": 2},
                )
            )
            size = SIZE - rng.choice((0, 0, 0, 512, 3 * 512, 40 * 512, 100 * 512))
            await self.add(size, late=late, **options)

    @property
    def top(self) -> Qcow2:
        top = self.layers[-1]
        assert isinstance(top, Qcow2)
        return top

    def link(self, above: BlockDriver, below: BlockDriver | None) -> None:
        """Surgery, as the graph does it."""
        if below is None:
            above.children.pop("backing", None)
        else:
            above.children["backing"] = below
        above.restructured()

    async def change(self, low: int = 0, high: int | None = None) -> None:
        """A random request to a random layer, within ``[low, high)``."""
        rng = self.rng
        layer = rng.choice(self.layers)
        end = min(layer.length, SIZE if high is None else high)
        if end <= low:
            return
        offset = low + rng.randrange((end - low) // BLOCK) * BLOCK
        length = min(rng.choice((512, 512, 2048, 4096, 20480, 70000 // 512 * 512)), end - offset)
        match rng.choice(("write", "write", "zero", "discard", "populate", "pack")):
            case "zero":
                await layer.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            case "discard":
                await layer.discard(offset, length)
            case "populate" if isinstance(layer, Qcow2):
                assert layer.cluster_size
                start = offset // layer.cluster_size * layer.cluster_size
                if start >= low:
                    whole = min(layer.length - start, layer.cluster_size)
                    below = layer.children.get("backing")
                    await layer.populate(start, await walk(below, start, whole))
            case "pack" if isinstance(layer, Qcow2) and high is None:
                assert layer.cluster_size
                start = offset // layer.cluster_size * layer.cluster_size
                whole = min(layer.length - start, layer.cluster_size)
                await layer.write_compressed(start, bytes([rng.randrange(256)]) * whole)
            case _:
                stamp = rng.randbytes(8)
                await layer.write(offset, stamp * (length // 8))

    async def forget_tables(self) -> None:
        """Let no layer have an L2 table in memory."""
        for layer in self.layers:
            await layer.flush()
            if isinstance(layer, Qcow2):
                assert not layer._metadata.dirty_tables
                layer._metadata.tables.clear()

    async def restructure(self) -> None:
        """Surgery, a resize, a snapshot."""
        rng = self.rng
        images = [layer for layer in self.layers if isinstance(layer, Qcow2)]
        match rng.choice(("drop", "resize", "snapshot", "apply", "bottom")):
            case "drop" if len(self.layers) > 2:
                gone = rng.randrange(1, len(self.layers) - 1)
                self.link(self.layers[gone + 1], self.layers[gone - 1])
                del self.layers[gone], self.disks[gone]
            case "resize":
                with suppress(BlockError):  # version 2 with snapshots
                    await rng.choice(self.layers).truncate(SIZE - rng.randrange(60) * BLOCK)
            case "snapshot":
                await rng.choice(images).create_snapshot("s", date_nsec=0)
            case "apply":
                image = rng.choice(images)
                if image.list_snapshots():
                    await image.apply_snapshot(image.list_snapshots()[-1].id)
            case "bottom":
                disk = MemoryDriver(SIZE // 2)
                await disk.write(0, rng.randbytes(SIZE // 2))
                below: BlockDriver | None = disk if rng.random() < 0.5 else None
                bottom = self.layers[0]
                if isinstance(bottom, Qcow2):
                    self.link(bottom, below)

    async def compare(self) -> None:
        """Every layer reads as the walk says; through both paths, whole and in parts."""
        for number, layer in enumerate(self.layers):
            length = layer.length
            wanted = await walk(layer, 0, length)
            where = f"seed {self.seed}, layer {number} of {len(self.layers)}"
            assert bytes(await layer.read(0, length)) == wanted, where
            for _ in range(12):
                offset = self.rng.randrange(length)
                part = min(length - offset, self.rng.choice((1, 512, 4096, 30000, 150000)))
                data = layer.read_nowait(offset, part)
                if data is None:
                    data = await layer.read(offset, part)
                assert bytes(data) == wanted[offset : offset + part], (where, offset, part)


async def play(seed: int, steps: int) -> None:
    chain = Chain(seed)
    await chain.random_layers(chain.rng.randrange(2, 6))
    for _ in range(steps):
        await chain.compare()
        for _ in range(chain.rng.randrange(4)):
            await chain.change()
            # Maps are made, and have to keep up, between the changes too.
            await chain.top.read(0, chain.top.length)
        if chain.rng.random() < 0.2:
            await chain.restructure()
    await chain.compare()
    for layer in reversed(chain.layers):
        await layer.close()


@pytest.mark.parametrize("seed", range(12))
async def test_random_changes_of_every_layer(seed: int) -> None:
    await play(seed, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1300))
async def test_many_random_changes_of_every_layer(seed: int) -> None:
    await play(seed, 25)


@pytest.mark.parametrize("what", ["layer_changed", "_clipped", "reset"])
async def test_the_random_changes_notice_a_map_that_does_not_keep_up(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    broken = (lambda _, run, __: [run]) if what == "_clipped" else lambda *_: None
    monkeypatch.setattr(FlatMap, what, broken)
    seen = 0
    for seed in range(12):
        try:
            await play(seed, 12)
        except (AssertionError, OSError):
            seen += 1
    assert seen >= 1, f"nobody notices that {what} does nothing"


async def concurrently(seed: int, rounds: int) -> None:
    """Changes of disjoint ranges of every layer, and reads of all: each sees before or after."""
    chain = Chain(seed)
    await chain.random_layers(4, late=True)
    top = chain.top
    region = 64 << 10  # a cluster of the coarsest layer: copies on write touch no other region
    for _ in range(rounds):
        before = await walk(top, 0, top.length)
        flat = top.below
        if chain.rng.random() < 0.7:  # maps are made, of tables on disk, while layers change
            flat.reset()
            await chain.forget_tables()
        regions = range(0, SIZE, region)
        reads = []

        async def read(offset: int, length: int) -> tuple[int, bytes]:
            return offset, bytes(await top.read(offset, length))

        for _ in range(6):
            offset = chain.rng.randrange(top.length // BLOCK) * BLOCK
            reads.append(read(offset, min(chain.rng.choice((512, 8192)), top.length - offset)))
        changes = [chain.change(low, low + region) for low in regions]
        done = await asyncio.gather(*reads, *changes)
        after = await walk(top, 0, top.length)
        for result in done:
            if result is None:
                continue
            offset, data = result
            for at in range(0, len(data), BLOCK):
                part, low = data[at : at + BLOCK], offset + at
                known = {before[low : low + len(part)], after[low : low + len(part)]}
                assert part in known, f"seed {seed}: stale or torn at {low}"
        assert bytes(await top.read(0, top.length)) == after, f"seed {seed}"
    for layer in reversed(chain.layers):
        await layer.close()


@pytest.mark.parametrize("seed", range(8))
async def test_reads_while_every_layer_changes(seed: int) -> None:
    await concurrently(seed, 10)


async def test_changes_while_a_map_is_made_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without what came meanwhile: the test above sees it."""
    plain = FlatMap._make

    async def forgetful(self: FlatMap, index: int, build: flatmap._Build) -> spans.Span | None:
        class Nothing(list):  # type: ignore[type-arg]
            def append(self, _: object) -> None:
                pass

        build.changes = Nothing()
        return await plain(self, index, build)

    monkeypatch.setattr(FlatMap, "_make", forgetful)
    seen = 0
    for seed in range(30):
        try:
            await concurrently(seed, 10)
        except AssertionError:
            seen += 1
            break
    assert seen


# -- what it is for


async def deep(count: int, **options: object) -> tuple[Chain, bytes]:
    """A chain in which every layer has something of its own, and what it reads as."""
    chain = Chain(count)
    for number in range(count):
        layer = await chain.add(SIZE, **{"cluster_size": 4096, **options})
        await layer.write(number * 4096 % SIZE, bytes([number % 255 + 1]) * 4096)
        await layer.flush()
    return chain, await walk(chain.top, 0, SIZE)


async def test_depth_costs_one_read_of_one_file() -> None:
    chain, wanted = await deep(32)
    top = chain.top
    assert top.read_nowait(0, 4096) is None, "the map is not there yet"
    assert bytes(await top.read(0, SIZE)) == wanted
    for disk in chain.disks:
        disk.log.clear()
    for number in range(32):
        at = number * 4096 + 512
        assert bytes(top.read_nowait(at, 1024) or b"") == wanted[at : at + 1024]
        reads = [r for disk in chain.disks for r in disk.log if r.operation == "read"]
        assert len(reads) == number + 1, "one read, of the layer that has it"
        assert len([r for r in chain.disks[number].log if r.operation == "read"]) == 1


async def test_adjacent_clusters_of_one_layer_are_one_read() -> None:
    chain = Chain(0)
    base = await chain.add(SIZE, cluster_size=4096)
    await base.write(0, bytes(range(256)) * 256)
    for _ in range(3):
        await chain.add(SIZE, cluster_size=4096)
    await chain.top.read(0, 1)
    chain.disks[0].log.clear()
    assert bytes(chain.top.read_nowait(512, 60000) or b"") == (bytes(range(256)) * 256)[512:60512]
    assert len(chain.disks[0].log) == 1


async def test_no_stack_is_needed_for_a_thousand_layers() -> None:
    chain, wanted = await deep(1000)
    assert bytes(await chain.top.read(0, SIZE)) == wanted
    assert bytes(chain.top.read_nowait(SIZE // 2, 512) or b"") == wanted[SIZE // 2 :][:512]
    assert all(len(layer._metadata.tables) <= 1 for layer in chain.layers)


async def test_what_changes_in_a_layer_below_is_put_into_the_map() -> None:
    chain, _ = await deep(8)
    top, base = chain.top, chain.layers[0]
    await top.read(0, SIZE)
    kept = dict(top.below._spans)
    await base.write(200 << 10, b"new" * 1000)
    assert bytes(top.read_nowait(200 << 10, 3000) or b"") == b"new" * 1000
    assert top.below._spans == kept, "without making it anew"
    await base.write_zeroes(200 << 10, 4096)
    assert bytes(top.read_nowait(200 << 10, 3000) or b"") == bytes(3000)
    assert top.below._spans == kept


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatmap, "POOL", pool := spans.SpanPool(300_000))
    base = await open_qcow2(await new_qcow2(size=1 << 40))
    for number in range(20):
        await base.write(number << 35, b"x" * 512)
    top = await open_qcow2(await new_qcow2(size=1 << 40), base)
    for number in range(20):
        assert bytes(await top.read(number << 35, 512)) == b"x" * 512
    assert 0 < pool.size <= 300_000
    assert pool.size == sum(span.size for span in top.below._spans.values())
    await top.close()
    assert pool.size == 0 and not base._map_watchers


async def test_a_layer_that_cannot_be_read_fails_only_those_who_need_it() -> None:
    chain, wanted = await deep(4)
    middle, disk = chain.layers[1], chain.disks[1]
    middle._metadata.tables.clear()

    def refuse(operation: str, offset: int, length: int) -> None:
        if operation == "read":
            raise OSError(5, "bad sector")

    disk.hook = refuse
    above = [0, 0, 2, 3]
    for number in (2, 3):
        at = above[number] * 4096
        assert bytes(await chain.top.read(at, 4096)) == wanted[at : at + 4096]
    with pytest.raises(OSError, match="bad sector"):
        await chain.top.read(0, 4096)
    disk.hook = None
    assert bytes(await chain.top.read(0, SIZE)) == wanted


async def test_runs_of_the_map() -> None:
    chain, _ = await deep(3)
    for below, above in pairwise(chain.layers):
        assert above.children["backing"] is below
    runs = await chain.top.below.runs(0, SIZE)
    assert runs is not None
    assert [(run.length, run.layer, run.kind) for run in runs] == [
        (4096, 1, 2), (4096, 0, 2), (SIZE - 8192, 0, 0),
    ]  # fmt: skip
