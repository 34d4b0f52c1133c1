"""block-commit of the active image over images in memory, while guests write to it."""

import asyncio
import random
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.storage.driver import Permission
from tests.unit.jobs.test_commit import WRITE, is_free
from tests.unit.jobs.test_stream import KIB, SIZE, Chain, backing, names

READY = ["created", "running", "ready", "READY"]
ENDED = ["waiting", "pending", "COMPLETED", "concluded", "null"]


class Commits(Chain):
    """A chain with a guest's drive on its active image."""

    async def prepared(self, *layers):
        for number, (name, *_) in enumerate(layers):
            assert number >= 0 and name
        await self.make(*layers)
        self.top = self.graph.nodes[layers[-1][0]]
        self.drive = await self.graph.attach(self.top, WRITE, name="virtio0")
        self.model = bytearray(await self.drive.read(0, self.top.length))
        self.random = random.Random(str(layers))
        return self

    async def guest(self, count):
        """Requests of a guest, several at a time."""
        size = len(self.model)

        async def lane(low, high):
            for _ in range(count):
                offset = self.random.randrange(low, high)
                length = min(self.random.choice((512, 4096, 9000)), high - offset)
                if self.random.randrange(5) == 0:
                    await self.drive.write_zeroes(offset, length, may_unmap=True)
                    data = bytes(length)
                else:
                    data = self.random.randbytes(length)
                    await self.drive.write(offset, data)
                self.model[offset : offset + length] = data
                await asyncio.sleep(0)

        await asyncio.gather(lane(0, size // 2), lane(size // 2, size))


async def usual():
    layers = (("base", SIZE, 4 * KIB), ("mid", SIZE, 4 * KIB), ("top", SIZE, 4 * KIB))
    return await Commits().prepared(*layers)


async def test_the_users_go_on_with_the_base():
    bench = await usual()
    user = await bench.graph.attach(bench.top, Permission.CONSISTENT_READ)
    job = await bench.commit("virtio0", base_node="base")
    await bench.end(job, "ready")
    assert bench.course("c") == READY
    await bench.guest(20)
    bench.scheduler.complete(job)
    await bench.end(job)
    assert bench.course("c") == READY + ENDED
    base = bench.graph.nodes["base"]
    assert bench.drive.node is user.node is base
    assert await bench.drive.read(0, SIZE) == bench.model
    assert base.driver.durable == base.driver.clusters
    assert backing(bench, "top") == "mid" and backing(bench, "mid") == "base"
    await bench.guest(5)
    assert await bench.drive.read(0, SIZE) == bench.model
    assert names(bench) == ["base", "mid", "top"] and not base.op_blockers
    with pytest.raises(BlockError, match="Permission conflict on node 'base'"):
        await bench.graph.attach(bench.top, Permission.CONSISTENT_READ)  # reads nonsense now
    await bench.graph.delete("top")
    await bench.graph.delete("mid")
    await bench.close()


@pytest.mark.parametrize("seed", range(30))
async def test_sizes_of_all_kinds(seed):
    rng = random.Random(seed)
    layers = []
    for name in "abcde"[: rng.randrange(2, 6)]:
        cluster = rng.choice((512, 4096, 16384))
        layers.append((name, rng.randrange(4, 40) * 4096 + rng.choice((0, 0, 512)), cluster))
    bench = await Commits().prepared(*layers)
    order = [name for name, *_ in layers]
    base = rng.randrange(len(order) - 1)
    job = await bench.commit("virtio0", base_node=order[base])
    guest = asyncio.create_task(bench.guest(rng.randrange(1, 40)))
    await bench.end(job, "ready")
    if rng.randrange(2):
        await guest
    bench.scheduler.complete(job)
    await bench.end(job)
    await guest
    assert bench.completion("c").get("error") is None
    assert bench.drive.node.name == order[base], seed
    length = len(bench.model)
    assert bytes(await bench.drive.read(0, length)) == bench.model, seed
    assert bench.drive.length >= length
    await bench.close()


@pytest.mark.parametrize("when", ["at once", "ready", "ready and force"])
async def test_without_a_switch_the_guest_stays(when):
    bench = await usual()
    job = await bench.commit("virtio0")
    guest = asyncio.create_task(bench.guest(20))
    if when != "at once":
        await bench.end(job, "ready")
    bench.scheduler.cancel(job, force=when.endswith("force"))
    await bench.end(job)
    await guest
    gentle = when == "ready"
    assert bench.course("c")[-3] == ("COMPLETED" if gentle else "CANCELLED")
    assert bench.drive.node is bench.top and backing(bench, "top") == "mid"
    assert await bench.drive.read(0, SIZE) == bench.model
    await bench.graph.detach(bench.drive)
    is_free(bench)
    await bench.close()


async def test_who_is_refused_meanwhile():
    bench = await usual()
    graph = bench.graph
    job = await bench.commit("virtio0", filter_node_name="flt", speed=1)
    assert graph.nodes["flt"].driver_class.driver_name == "mirror_top"
    busy = "Node 'mid' is busy: block device is in use by block job: commit"
    for call, message in (
        (bench.commit("top", "c2"), "Need a root block node"),
        (bench.stream("mid", "s"), busy),
        (graph.attach(graph.nodes["mid"], Permission.CONSISTENT_READ),
         "Permission conflict on node 'mid': permissions 'consistent read' are both required by "
         "an unnamed block device (uses node 'mid' as 'root' child) and unshared by "
         "commit job 'c' (uses node 'mid' as 'intermediate node' child)."),
        (graph.attach(graph.nodes["top"], Permission.CONSISTENT_READ),
         "Permission conflict on node 'mid': permissions 'consistent read' are both required by "
         "node 'top' (uses node 'mid' as 'backing' child) and unshared by "
         "commit job 'c' (uses node 'mid' as 'intermediate node' child)."),
        (graph.attach(graph.nodes["base"], WRITE), None),
        (graph.delete("mid"), busy),
        (graph.delete("flt"), "Node flt is in use"),
    ):  # fmt: skip
        with pytest.raises(BlockError) as caught:
            await call
        assert caught.value.message == message or message is None
    bench.scheduler.cancel(job, force=True)
    await bench.end(job)
    await bench.close()


async def test_a_read_only_base_becomes_what_the_top_was():
    bench = await usual()
    base = bench.graph.nodes["base"]
    await bench.graph.set_read_only(base, True)
    job = await bench.commit("virtio0")
    await bench.end(job, "ready")
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert base.read_only
    job = await bench.commit("virtio0")
    await bench.end(job, "ready")
    bench.scheduler.complete(job)
    await bench.end(job)
    assert not base.read_only and bench.drive.node is base
    await bench.guest(3)
    await bench.close()


@pytest.mark.parametrize(("where", "operation"), [("mid", "read"), ("base", "write")])
@pytest.mark.parametrize("policy", ["report", "stop"])
async def test_errors(where, operation, policy):
    bench = await usual()
    code = ENOSPC if where == "base" else EIO
    bench.graph.nodes[where].driver.faults[operation] = code
    job = await bench.commit("virtio0", on_error=BlockdevOnError(policy))
    if policy == "report":
        await bench.end(job)
        assert bench.completion("c").get("error")
        assert bench.drive.node is bench.top
    else:
        await bench.end(job, "paused")
        await bench.guest(3)
        bench.scheduler.resume(job)
        await bench.end(job, "ready")
        bench.scheduler.complete(job)
        await bench.end(job)
        assert bench.drive.node is bench.graph.nodes["base"]
    assert await bench.drive.read(0, SIZE) == bench.model
    await bench.close()


async def test_the_switch_fails_when_the_base_is_not_durable():
    bench = await usual()
    job = await bench.commit("virtio0")
    await bench.end(job, "ready")
    await bench.guest(3)
    bench.scheduler.complete(job)
    flush = bench.graph.nodes["base"].driver.flush
    calls = []

    async def fails():
        calls.append(1)
        if len(calls) > 1:
            raise OSError(EIO, "injected")
        await flush()

    bench.graph.nodes["base"].driver.flush = fails
    bench.graph.nodes["base"].flush = fails
    await bench.end(job)
    assert bench.completion("c")["error"] == "injected"
    assert bench.drive.node is bench.top and await bench.drive.read(0, SIZE) == bench.model
    await bench.close()


async def test_names_that_are_taken():
    bench = await usual()
    for options, message in (
        ({"filter_node_name": "mid"}, "Duplicate nodes with node-name='mid'"),
        ({"job_id": ""}, "Invalid job ID ''"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ):
        with pytest.raises(BlockError) as caught:
            await bench.commit("top", **options)
        assert caught.value.message == message
    await bench.graph.detach(bench.drive)
    is_free(bench)
    assert names(bench) == ["base", "mid", "top"]
    await bench.close()


async def test_what_earlier_jobs_left_over_is_in_nobodys_way():
    layers = ("base", "mid", "top", "act")
    bench = await Commits().prepared(*((name, SIZE, 4 * KIB) for name in layers))
    await bench.end(await bench.commit("virtio0", top_node="top"))
    assert backing(bench, "act") == "base" and backing(bench, "mid") == "base"
    for switch in (False, True):
        job = await bench.commit("virtio0")
        await bench.end(job, "ready")
        await bench.guest(3)
        with pytest.raises(BlockError, match="Permission conflict on node 'base'"):
            await bench.graph.attach(bench.graph.nodes["top"], Permission.CONSISTENT_READ)
        (bench.scheduler.complete if switch else bench.scheduler.cancel)(job)
        await bench.end(job)
        assert bench.completion("c").get("error") is None
    assert bench.drive.node is bench.graph.nodes["base"]
    assert await bench.drive.read(0, SIZE) == bench.model
    await bench.close()
