"""The flat map in a graph of real images: block status and streams' plans, surgery, snapshots."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.graph import chain, surgery
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.storage.driver import Permission
from liveblockd.storage.flatmap import FlatMap
from tests.support.world import World

load_all_drivers()

SIZE = 1 << 20
BLOCK = 4096
GEOMETRIES = (
    {"cluster_size": 65536},
    {"cluster_size": 4096},
    {"cluster_size": 65536, "extended_l2": True},
    {"cluster_size": 512},
    {"cluster_size": 4096, "version": 2},
)


class Chains(World):
    """Chains of many layers."""

    async def add(self, name: str, backing: str | None, **more: object) -> Node:
        members = {
            "driver": "qcow2", "node-name": name, "backing": backing, "discard": "unmap",
            "file": {"driver": "file", "filename": str(self.directory / name)}, **more,
        }  # fmt: skip
        return await self.open(members)

    def sparse_file(self, name: str, rng: random.Random) -> None:
        with open(self.directory / name, "wb") as raw:
            raw.truncate(SIZE - 40000)
            for _ in range(5):
                raw.seek(rng.randrange(SIZE // 2))
                raw.write(rng.randbytes(20000))

    async def random_chain(self, rng: random.Random, depth: int) -> Node:
        """Layers a0 (the base; raw, with holes) to the top, each written to before the next."""
        self.sparse_file("raw", rng)
        file = {"driver": "file", "filename": str(self.directory / "raw")}
        members = {"driver": "raw", "node-name": "a0", "file": file, "read-only": True}
        node = await self.open(members)
        for number in range(1, depth):
            size = SIZE - rng.choice((0, 0, 512, 70 * 512, 300 * 512))
            await self.create(f"a{number}", size=size, **rng.choice(GEOMETRIES))
            node = await self.add(f"a{number}", f"a{number - 1}")
            for _ in range(6):
                offset = rng.randrange(size // 512 - 1) * 512
                length = min(size - offset, rng.choice((512, 4096, 50000 // 512 * 512)))
                match rng.choice(("write", "write", "zero", "discard", "pack")):
                    case "write":
                        await node.write(offset, rng.randbytes(length))
                    case "zero":
                        await node.write_zeroes(offset, length, may_unmap=True)
                    case "discard":
                        await node.discard(offset, length)
                    case "pack":
                        unit = node.driver.cluster_size or 512
                        start = offset // unit * unit
                        data = bytes([number]) * min(unit, size - start)
                        await node.driver.write_compressed(start, data)
            await node.flush()
        return node


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Chains]:
    world = Chains(tmp_path)
    yield world
    await world.end()


async def resolved(top: Node, base: Node | None, offset: int, length: int) -> list[chain.Run]:
    return [run async for run in chain.resolve(top, base, offset, length)]


@pytest.mark.parametrize("seed", range(8))
async def test_resolve_says_the_same_with_and_without_the_map(
    world: Chains, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    top = await world.random_chain(rng, 7)
    layers = chain.chain(top)
    questions = [(top, None, 0, top.length)]
    for _ in range(20):
        first = rng.randrange(len(layers))
        base = rng.choice([None, *layers[first + 1 :]])
        offset = rng.randrange(layers[first].length)
        questions.append(
            (layers[first], base, offset, rng.randrange(1, layers[first].length - offset + 1))
        )
    with_map = [await resolved(*question) for question in questions]
    assert top.driver.below is not None and top.driver.below._spans, "the map was used"

    async def unknown(*_: object) -> None:
        return None

    monkeypatch.setattr(FlatMap, "runs", unknown)
    for question, found in zip(questions, with_map, strict=True):
        assert found == await resolved(*question), f"seed {seed}, {question}"
        assert sum(run.length for run in found) == question[3]


async def test_surgery_is_seen_at_once(world: Chains) -> None:
    top = None
    for number in range(6):  # each has a piece of its own
        await world.create(f"a{number}", size=SIZE, cluster_size=4096)
        top = await world.add(f"a{number}", top and top.name)
        await top.write(number * 8192, bytes([number + 1]) * 8192)
    assert top is not None
    user = await world.graph.attach(top)
    layers = chain.chain(top)

    async def content() -> bytes:
        return bytes(await user.read(0, top.length))

    before = await content()
    above = await surgery.insert_filter(world.graph, layers[3])
    assert await content() == before
    await surgery.remove_filter(world.graph, above)
    assert await content() == before
    # A layer in the middle goes, far below the one that is read.
    await surgery.replace_backing(world.graph, layers[2], layers[4])
    after = await content()
    assert after != before
    await surgery.replace_backing(world.graph, layers[2], layers[3])
    assert await content() == before
    await surgery.replace_backing(world.graph, layers[0], None)
    assert top.driver.below is not None and not top.driver.below._spans
    assert await content() != before


class Guest:
    """Writes and reads of blocks, one at a time for each of them."""

    def __init__(self, backend: Backend, seed: int) -> None:
        self.backend = backend
        self.rng = random.Random(seed)
        self.blocks = {n: bytes(BLOCK) for n in range(SIZE // BLOCK)}
        self.busy: set[int] = set()
        self.ended = False
        self.reads = 0

    async def work(self) -> None:
        while not self.ended:
            block = self.rng.choice([b for b in self.blocks if b not in self.busy])
            self.busy.add(block)
            if self.rng.random() < 0.3:
                data = self.rng.randbytes(16) * (BLOCK // 16)
                await self.backend.write(block * BLOCK, data)
                self.blocks[block] = data
            data = self.backend.read_nowait(block * BLOCK, BLOCK) or b""
            if not data:
                data = await self.backend.read(block * BLOCK, BLOCK)
            assert bytes(data) == self.blocks[block], f"block {block}"
            self.reads += 1
            self.busy.discard(block)
            await asyncio.sleep(0)


async def test_snapshots_under_load(world: Chains) -> None:
    await world.create("a0", size=SIZE, cluster_size=65536)
    node = await world.add("a0", None)
    permissions = Permission.CONSISTENT_READ | Permission.WRITE
    user = await world.graph.attach(node, permissions, name="drive")
    guest = Guest(user, seed=9)
    workers = [asyncio.create_task(guest.work()) for _ in range(4)]
    for number in range(1, 25):
        await asyncio.sleep(0.02)
        await world.create(f"a{number}", size=SIZE, **GEOMETRIES[number % len(GEOMETRIES)])
        await world.add(f"a{number}", None)
        overlay = world.graph.find(f"a{number}")
        await surgery.append_overlay(world.graph, user.node, overlay)
        assert user.node is overlay
    guest.ended = True
    await asyncio.gather(*workers)
    assert len(chain.chain(user.node)) == 25 and guest.reads > 100
    for block, data in guest.blocks.items():
        assert bytes(await user.read(block * BLOCK, BLOCK)) == data
