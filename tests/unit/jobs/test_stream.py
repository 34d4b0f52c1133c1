"""block-stream over images in memory: what it copies, refuses and leaves behind."""

import asyncio
import random
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import surgery
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.storage.driver import Permission
from liveblockd.storage.snapshot_info import SnapshotInfo
from tests.simulation.bench import Bench
from tests.simulation.overlay import ZERO
from tests.support.workers import InlineWorkers

KIB = 1024
SIZE = 256 * KIB
GOOD = ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]


class Chain(Bench):
    """Images base <- mid <- top, each with some clusters of its own."""

    def __init__(self):
        super().__init__(InlineWorkers())

    async def make(self, *layers):
        """Layers (name, size, cluster size), the lowest first."""
        below = None
        for number, (name, size, cluster_size) in enumerate(layers):
            members = {"driver": "overlay", "node-name": name, "size": size, "seed": number}
            node = await self.open(**members, **{"cluster-size": cluster_size, "backing": below})
            for cluster in range(-(-size // cluster_size)):
                kind = random.Random(f"{name} {cluster}").randrange(4)
                if kind < 2:
                    node.driver.clusters[cluster] = bytes([16 * number + 1 + cluster % 15]) * (
                        cluster_size
                    )
                elif kind == 2:
                    node.driver.clusters[cluster] = ZERO
            below = name
        return self

    async def content(self, name):
        node = self.graph.nodes[name]
        return bytes(await node.read(0, node.length))


async def usual():
    return await Chain().make(
        ("base", SIZE, 4 * KIB), ("mid", SIZE, 4 * KIB), ("top", SIZE, 4 * KIB)
    )


def names(bench):
    return sorted(bench.graph.nodes)


def backing(bench, name):
    node = bench.graph.nodes[name].backing
    return node and node.name


async def test_whole_chain():
    bench = await usual()
    before = await bench.content("top")
    job = await bench.stream("top")
    assert bench.course() == ["created", "running"]
    await bench.end(job)
    assert bench.course() == GOOD
    assert bench.completion() == {
        "type": "stream", "device": "s", "len": SIZE, "offset": SIZE, "speed": 0
    }  # fmt: skip
    assert backing(bench, "top") is None
    assert bench.graph.nodes["top"].driver.durable_header == (None, None)
    assert await bench.content("top") == before
    assert names(bench) == ["base", "mid", "top"], "the monitor owns them"
    for name in ("mid", "base"):
        await bench.graph.delete(name)
    assert not bench.scheduler.jobs
    await bench.close()


@pytest.mark.parametrize("how", [{"base_node": "base"}, {"bottom": "mid"}])
async def test_down_to_a_base(how):
    bench = await usual()
    before = await bench.content("top")
    await bench.end(await bench.stream("top", **how, backing_file="./elsewhere.img"))
    assert bench.course() == GOOD
    assert backing(bench, "top") == "base"
    assert bench.graph.nodes["top"].driver.durable_header == ("./elsewhere.img", "overlay")
    assert await bench.content("top") == before
    clusters = bench.graph.nodes["top"].driver.clusters
    mid = bench.graph.nodes["mid"].driver.clusters
    base = bench.graph.nodes["base"].driver.clusters
    only_base = set(base) - set(mid)
    assert only_base - set(clusters), "what only the base holds was not copied"
    await bench.close()


@pytest.mark.parametrize("seed", range(60))
async def test_sizes_of_all_kinds(seed):
    """Clusters and lengths differ: nothing of a longer image below may shine through."""
    rng = random.Random(seed)
    layers = []
    for name in "abcde"[: rng.randrange(2, 6)]:
        cluster = rng.choice((512, 4096, 16384))
        layers.append((name, rng.randrange(1, 40) * 4096 + rng.choice((0, 0, 512)), cluster))
    bench = await Chain().make(*layers)
    order = [name for name, *_ in layers]
    top = rng.randrange(1, len(order))
    base = rng.choice([None, *order[:top]])
    before = {name: await bench.content(name) for name in order}
    job = await bench.stream(order[top], base_node=base)
    await bench.end(job)
    assert bench.completion().get("error") is None, seed
    assert backing(bench, order[top]) == base, seed
    for name in order:
        assert await bench.content(name) == before[name], (seed, name)
    await bench.close()


async def test_internal_snapshots_are_warned_of(monkeypatch, caplog):
    bench = await usual()
    info = SnapshotInfo("1", "before", 0, 0, 0, 0, None, SIZE)
    driver = bench.graph.nodes["top"].driver
    monkeypatch.setattr(driver, "list_snapshots", lambda: [info], raising=False)
    await bench.end(await bench.stream("top"))
    assert "internal snapshots of node 'top' (before) lose" in caplog.text
    await bench.close()


async def test_nothing_to_do():
    bench = await usual()
    for number, (device, options) in enumerate(
        (("base", {}), ("top", {"base_node": "mid"}), ("top", {"bottom": "top"}))
    ):
        await bench.stream(device, f"n{number}", **options)
        assert bench.course(f"n{number}") == GOOD, "before the return"
        assert bench.completion(f"n{number}")["len"] == 0
    assert backing(bench, "top") == "mid"
    await bench.close()


async def test_the_filter_and_what_is_blocked():
    bench = await usual()
    drive = await bench.graph.attach(
        bench.graph.nodes["top"], Permission.CONSISTENT_READ | Permission.WRITE, name="virtio0"
    )
    job = await bench.stream("mid", speed=1, filter_node_name="flt")
    assert backing(bench, "top") == "flt"
    for call, message in (
        (bench.stream("top", "s2"), "Node 'flt' is busy"),
        (bench.stream("virtio0", "s2"), "Node 'flt' is busy"),
        (bench.stream("mid", "s2"), "Node 'mid' is busy"),
        (bench.stream("base", "s2"), "Node 'base' is busy"),
        (bench.graph.delete("base"), "Node 'base' is busy"),
        (bench.graph.delete("flt"), "Node flt is in use"),
    ):
        with pytest.raises(BlockError) as caught:
            await call
        assert caught.value.message.startswith(message)
    reason = ": block device is in use by block job: stream"
    with pytest.raises(BlockError, match=f"Node 'mid' is busy{reason}"):
        await bench.stream("mid", "s3")
    assert bench.course("s2") == bench.course("s3") == []
    bench.scheduler.set_speed(job, 0)
    await bench.end(job)
    assert "flt" not in bench.graph.nodes
    assert backing(bench, "top") == "mid" and backing(bench, "mid") is None
    await bench.graph.delete("base")
    await bench.graph.detach(drive)
    await bench.close()


REFUSALS = [
    ({"device": "ghost"}, "Cannot find device='ghost' nor node-name='ghost'"),
    ({"job_id": ""}, "Invalid job ID ''"),
    ({"job_id": "1st"}, "Invalid job ID '1st'"),
    (
        {"base": "x", "base_node": "base"},
        "'base' and 'base-node' cannot be specified at the same time",
    ),
    ({"base": "x", "bottom": "mid"}, "'base' and 'bottom' cannot be specified at the same time"),
    (
        {"bottom": "mid", "base_node": "base"},
        "'bottom' and 'base-node' cannot be specified at the same time",
    ),
    ({"base": "nowhere"}, "Can't find 'nowhere' in the backing chain"),
    ({"base": ""}, "Can't find '' in the backing chain"),
    ({"base_node": "ghost"}, "Cannot find device='' nor node-name='ghost'"),
    ({"base_node": "top"}, "Node 'top' is not a backing image of 'top'"),
    ({"device": "mid", "base_node": "top"}, "Node 'top' is not a backing image of 'mid'"),
    ({"bottom": "ghost"}, "Cannot find device='' nor node-name='ghost'"),
    ({"device": "mid", "bottom": "top"}, "Node 'top' is not in a chain starting from 'mid'"),
    ({"backing_file": "x"}, "backing file specified, but streaming the entire chain"),
    ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    (
        {"filter_node_name": "top"},
        "Could not create node: Duplicate nodes with node-name='top'",
    ),
    ({"filter_node_name": "9x"}, "Could not create node: Invalid node-name: '9x'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
async def test_refusals_leave_nothing(options, message):
    bench = await usual()
    options = {"device": "top", "job_id": "s"} | options
    with pytest.raises(BlockError) as caught:
        await bench.stream(**options)
    assert caught.value.message == message
    assert bench.course() == (["created", "null"] if "speed" in options else [])
    assert names(bench) == ["base", "mid", "top"] and not bench.graph.backends
    for node in bench.graph.nodes.values():
        assert not node.op_blockers and all(not e.frozen for e in node.children.values())
    await bench.end(await bench.stream("top"))
    assert bench.course()[-len(GOOD) :] == GOOD
    await bench.close()


async def test_cancel_keeps_the_chain():
    bench = await usual()
    before = await bench.content("top")
    job = await bench.stream("top", speed=1)
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert bench.course()[2:] == ["aborting", "CANCELLED", "concluded", "null"]
    assert backing(bench, "top") == "mid" and await bench.content("top") == before
    assert not bench.graph.nodes["base"].op_blockers
    await bench.end(await bench.stream("top"))
    assert await bench.content("top") == before
    await bench.close()


async def test_pending_and_concluded_hold_the_nodes():
    bench = await usual()
    job = await bench.stream("top", auto_finalize=False, auto_dismiss=False)
    await bench.end(job, "pending")
    top = bench.graph.nodes["top"]
    assert top.driver.durable_header == (None, None) and top.backing.name == "mid"
    await bench.scheduler.finalize(job)
    assert top.backing is None and job.status == "concluded"
    with pytest.raises(BlockError, match="Node 'base' is busy: block device is in use by block"):
        await bench.stream("base", "t")
    await bench.scheduler.dismiss(job)
    await bench.graph.delete("mid")
    await bench.graph.delete("base")
    await bench.close()


@pytest.mark.parametrize(
    ("where", "operation", "told"),
    [("mid", "read", "read"), ("mid", "map", "read"), ("top", "populate", "write")],
)
@pytest.mark.parametrize("policy", ["report", "stop", "ignore"])
async def test_errors(where, operation, told, policy):
    bench = await usual()
    before = await bench.content("top")
    code = ENOSPC if operation == "populate" else EIO
    bench.graph.nodes[where].driver.faults[operation] = code
    job = await bench.stream("top", on_error=BlockdevOnError(policy))
    if policy == "stop":
        await bench.end(job, "paused")
        assert job.io_status == ("nospace" if code == ENOSPC else "failed")
        bench.scheduler.resume(job)
    await bench.end(job)
    errors = [data for name, data in bench.events if name == "BLOCK_JOB_ERROR"]
    assert errors == [{"device": "s", "operation": told, "action": policy}]
    failed = policy != "stop"
    assert (bench.completion().get("error") is not None) == failed
    assert backing(bench, "top") == ("mid" if failed else None)
    assert await bench.content("top") == before
    await bench.close()


@pytest.mark.parametrize("operation", ["flush", "header"])
async def test_an_error_at_the_end(operation):
    bench = await usual()
    before = await bench.content("top")
    bench.graph.nodes["top"].driver.faults[operation] = EIO
    await bench.end(await bench.stream("top"))
    assert bench.completion()["error"] == "injected"
    assert backing(bench, "top") == "mid" and await bench.content("top") == before
    assert not bench.graph.nodes["base"].op_blockers
    await bench.end(await bench.stream("top"))
    assert backing(bench, "top") is None
    await bench.close()


async def test_completed_comes_after_the_header_is_durable():
    bench = await usual()
    driver = bench.graph.nodes["top"].driver
    driver.header = driver.durable_header = ("mid", "overlay")
    seen = []

    def note(event):
        if event.name == "BLOCK_JOB_COMPLETED":
            seen.append((driver.durable_header, driver.durable == driver.clusters))

    bench.publisher.subscribe(note)
    await bench.end(await bench.stream("top"))
    assert seen == [((None, None), True)]
    await bench.close()


async def test_who_hears_null_may_use_the_nodes():
    bench = await usual()
    seen = []

    def note(event):
        if event.data().get("status") == "null":
            seen.append([list(node.op_blockers) for node in bench.graph.nodes.values()])

    bench.publisher.subscribe(note)
    await bench.end(await bench.stream("top"))
    assert seen == [[[], [], []]]
    await bench.close()


async def test_links_are_frozen_meanwhile():
    bench = await usual()
    nodes = bench.graph.nodes
    job = await bench.stream("top", bottom="mid", speed=1)
    with pytest.raises(BlockError, match="Cannot change frozen 'backing' link from 'top' to 'mid'"):
        await surgery.replace_backing(bench.graph, nodes["top"], nodes["base"])
    assert not nodes["mid"].children["backing"].frozen, "the base may be replaced"
    bench.scheduler.set_speed(job, 0)
    await bench.end(job)
    assert not nodes["top"].children["backing"].frozen
    await bench.close()


async def test_two_streams_in_one_chain():
    """The upper one may end first or last: its new backing is what then lies below ``bottom``."""
    for first in ("low", "up"):
        bench = await Chain().make(*((name, SIZE, 4 * KIB) for name in ("a", "b", "c", "d", "e")))
        before = {name: await bench.content(name) for name in "abcde"}
        low = await bench.stream("c", "low", speed=1)  # into c: b and a
        # Into e: d. ``base_node`` would be below the filter of the other one.
        up = await bench.stream("e", "up", bottom="d", speed=1)
        order = [low, up] if first == "low" else [up, low]
        for job in order:
            bench.scheduler.set_speed(job, 0)
            await bench.end(job)
        assert backing(bench, "e") == "c" and backing(bench, "c") is None
        assert names(bench) == list("abcde")
        for name in "abcde":
            assert await bench.content(name) == before[name]
        await bench.close()


async def test_guests_write_meanwhile():
    bench = await usual()
    top = bench.graph.nodes["top"]
    guest = await bench.graph.attach(
        top, Permission.CONSISTENT_READ | Permission.WRITE, name="virtio0"
    )
    model = bytearray(await bench.content("top"))
    rng = random.Random(1)
    job = await bench.stream("virtio0", "virtio0")
    while job.status != "null":
        offset = rng.randrange(SIZE - 5000)
        data = rng.randbytes(rng.randrange(1, 5000))
        await guest.write(offset, data)
        model[offset : offset + len(data)] = data
        assert await guest.read(0, SIZE) == model
    assert await guest.read(0, SIZE) == model and top.backing is None
    assert guest.node is top
    await bench.close()


async def test_a_client_that_vanishes_during_the_start():
    large = 1024 * KIB
    bench = await Chain().make(*((name, large, 64 * KIB) for name in ("base", "mid", "top")))
    top = bench.graph.nodes["top"].driver
    clusters = dict(top.clusters)
    for turns in range(40):
        start = asyncio.create_task(bench.stream("top", f"s{turns}", speed=1))
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        jobs = tuple(bench.scheduler.jobs.values())
        assert [job.status for job in jobs] in ([], ["running"]), turns
        await bench.scheduler.cancel_all()
        assert not bench.graph.nodes["base"].op_blockers
        assert names(bench) == ["base", "mid", "top"]
        top.clusters = dict(clusters)  # what a cancelled stream copied stays copied
    assert bench.course("s39")[-3:] == ["CANCELLED", "concluded", "null"]
    await bench.close()
