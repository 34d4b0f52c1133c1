"""copy-before-write and snapshot-access: the disk as it was, read while a guest writes."""

import asyncio
import random
from errno import EACCES, ENOTSUP

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.graph import dirty
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.simulation.overlay import OverlayDriver
from tests.support.workers import InlineWorkers

load_all_drivers()
assert OverlayDriver.driver_name == "overlay"
KIB = 1024
CLUSTER = 64 * KIB
SIZE = 12 * CLUSTER + 4 * KIB


class Fleecing(Bench):
    """A guest above ``cbw`` above ``disk``; ``past`` is read meanwhile."""

    def __init__(self, seed=0):
        super().__init__(InlineWorkers())
        self.random = random.Random(seed)

    async def make(self, *, backed=False, writable=False, cluster_size=4 * KIB, **options):
        members = {"driver": "overlay", "size": SIZE, "seed": 3, "cluster-size": cluster_size}
        disk = await self.open(**members, **{"node-name": "disk"})
        for cluster in range(SIZE // cluster_size):
            if self.random.randrange(4):
                disk.driver.clusters[cluster] = bytes([cluster % 255 + 1]) * cluster_size
        backing = {"backing": "disk"} if backed else {}
        await self.open(**members, **{"node-name": "temp"}, **backing)
        if "bitmap" in options:
            dirty.add(self.graph, "disk", "b0", granularity=CLUSTER)
            disk.find_bitmap("b0").set(*options.pop("bitmap"))
            options["bitmap"] = {"node": "disk", "name": "b0"}
        cbw = await self.open(
            driver="copy-before-write", node_name="cbw", file="disk", target="temp",
            discard="unmap", **options,
        )  # fmt: skip
        past = await self.open(
            driver="snapshot-access", node_name="past", file="cbw",
            read_only=not writable, discard="unmap",
        )  # fmt: skip
        self.then = bytes(await disk.read(0, SIZE))
        self.guest = await self.graph.attach(cbw, Permission.CONSISTENT_READ | Permission.WRITE)
        used = Permission.CONSISTENT_READ
        if writable:
            used |= Permission.WRITE
        self.reader = await self.graph.attach(past, used)
        return self

    async def close(self):
        await self.graph.detach(self.reader)
        await self.graph.detach(self.guest)
        await super().close()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("backed", [False, True])
async def test_readers_see_the_past_and_the_guest_what_it_wrote(seed, backed):
    bench = await Fleecing(seed).make(
        backed=backed, cluster_size=(512, 4 * KIB, 128 * KIB)[seed % 3]
    )
    model = bytearray(bench.then)
    ended = asyncio.Event()

    async def guest():
        for _ in range(40):
            offset = bench.random.randrange(SIZE)
            length = min(SIZE - offset, bench.random.choice((1, 512, 5000, 200_000)))
            kind = bench.random.randrange(4)
            if kind < 2:
                data = bench.random.randbytes(length)
                model[offset : offset + length] = data
                await bench.guest.write(offset, data)
            elif kind == 2:
                model[offset : offset + length] = bytes(length)
                await bench.guest.write_zeroes(offset, length, may_unmap=True)
            else:
                await bench.guest.discard(offset, length)
                model[offset : offset + length] = await bench.guest.read(offset, length)
        ended.set()

    async def reader():
        while not ended.is_set():
            offset = bench.random.randrange(SIZE)
            length = min(SIZE - offset, bench.random.choice((1, 512, 5000, 300_000)))
            got = bytes(await bench.reader.read(offset, length))
            assert got == bench.then[offset : offset + length]
            position = offset
            for run in await bench.reader.block_status(offset, length):
                end = min(offset + length, position + run.length)
                if run.zero:
                    assert not any(bench.then[position:end])
                position = end
            for _ in range(bench.random.randrange(12)):  # of the many turns that a write takes
                await asyncio.sleep(0)

    async def old_way():
        """Through the target itself, whose backing node is the disk."""
        user = await bench.graph.attach(bench.graph.nodes["temp"])
        while not ended.is_set():
            offset = bench.random.randrange(SIZE)
            length = min(SIZE - offset, bench.random.choice((1, 512, 5000)))
            got = bytes(await user.read(offset, length))
            assert got == bench.then[offset : offset + length]
        await bench.graph.detach(user)

    async with asyncio.timeout(100):
        await asyncio.gather(guest(), reader(), *([old_way(), old_way()] if backed else [reader()]))
    assert bytes(await bench.guest.read(0, SIZE)) == model
    assert bytes(await bench.reader.read(0, SIZE)) == bench.then
    await bench.close()


async def test_each_cluster_is_copied_once():
    bench = await Fleecing().make()
    temp = bench.graph.nodes["temp"]
    stored = []
    write, erase = temp.driver.write, temp.driver.write_zeroes

    async def counted(offset, data):
        stored.append((offset, len(data)))
        await write(offset, data)

    async def erased(offset, length, **options):
        stored.append((offset, length))
        await erase(offset, length, **options)

    temp.driver.write, temp.driver.write_zeroes = counted, erased
    temp._hand_on()
    await asyncio.gather(*(bench.guest.write(n * 512, b"x" * 512) for n in range(256)))
    assert sum(length for _, length in stored) == 2 * CLUSTER
    assert len({offset for offset, _ in stored}) == len(stored)
    await bench.close()


async def test_only_what_the_bitmap_says_can_be_read():
    bench = await Fleecing().make(bitmap=(CLUSTER, CLUSTER))
    assert bytes(await bench.reader.read(CLUSTER, CLUSTER)) == bench.then[CLUSTER : 2 * CLUSTER]
    for offset in (0, 2 * CLUSTER - 1):
        with pytest.raises(OSError) as caught:
            await bench.reader.read(offset, 2)
        assert caught.value.errno == EACCES
    await bench.guest.write(0, b"free")
    assert not bench.graph.nodes["temp"].driver.clusters, "nobody wants to read that"
    await bench.close()


async def test_a_discard_of_the_past_gives_up_its_keeping():
    bench = await Fleecing().make(writable=True)
    await bench.guest.write(0, b"x")
    assert bench.graph.nodes["cbw"].driver.core.todo.count == -(-SIZE // CLUSTER) - 1
    await bench.reader.discard(0, 3 * CLUSTER - 1)
    for offset in (0, CLUSTER):
        with pytest.raises(OSError) as caught:
            await bench.reader.read(offset, 512)
        assert caught.value.errno == EACCES
    await bench.guest.write(CLUSTER, b"x")
    await bench.reader.read(2 * CLUSTER, CLUSTER)  # not all of it was discarded
    with pytest.raises(OSError) as caught:
        await bench.reader.write(0, b"x")
    assert caught.value.errno == ENOTSUP
    await bench.close()


async def test_a_broken_snapshot_lets_the_guest_write():
    bench = await Fleecing().make(on_cbw_error="break-snapshot")
    bench.graph.nodes["temp"].driver.faults = {"write": 28}
    await bench.guest.write(0, b"new")
    with pytest.raises(OSError) as caught:
        await bench.reader.read(5 * CLUSTER, 512)
    assert caught.value.errno == EACCES
    await bench.close()


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
async def test_a_write_does_not_wait_forever(policy):
    bench = await Fleecing().make(on_cbw_error=policy, cbw_timeout=1)
    bench.graph.nodes["cbw"].driver.core.timeout = 0.01
    temp, gate = bench.graph.nodes["temp"].driver, asyncio.Event()
    erase, write = temp.write_zeroes, temp.write

    async def slow(offset, data):
        await gate.wait()
        await write(offset, data)

    temp.write, temp.write_zeroes = slow, lambda *a, **k: slow(a[0], bytes(a[1]))
    bench.graph.nodes["temp"]._hand_on()
    del erase
    request = bench.guest.write(0, b"new")
    if policy == "break-snapshot":
        await request
    else:
        with pytest.raises(TimeoutError):
            await request
    gate.set()
    await bench.graph.nodes["cbw"].driver.core.idle()
    assert bytes(await bench.guest.read(0, 3)) == (
        b"new" if policy == "break-snapshot" else bench.then[:3]
    )
    await bench.close()


async def test_refused():
    bench = await Fleecing().make()
    with pytest.raises(BlockError, match="needs a copy-before-write node"):
        await bench.open(driver="snapshot-access", node_name="x", file="temp")
    with pytest.raises(BlockError, match="Permission conflict"):
        await bench.graph.attach(bench.graph.nodes["disk"], Permission.WRITE)
    await bench.open(driver="null-co", node_name="small", size=CLUSTER)
    await bench.open(driver="null-co", node_name="big", size=SIZE)
    members = {"driver": "copy-before-write", "node_name": "y", "file": "big"}
    with pytest.raises(BlockError, match="smaller than the source"):
        await bench.open(**members, target="small")
    with pytest.raises(BlockError, match="power of 2"):
        await bench.open(**members, target="temp", min_cluster_size=70_000)
    with pytest.raises(BlockError, match="Dirty bitmap 'no' not found"):
        await bench.open(**members, target="temp", bitmap={"node": "disk", "name": "no"})
    assert "y" not in bench.graph.nodes
    await bench.close()
