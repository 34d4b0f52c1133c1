"""block-commit of intermediate images over images in memory: what it copies, refuses, leaves."""

import asyncio
import random
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import surgery
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.storage.driver import Permission
from tests.unit.jobs.test_stream import GOOD, KIB, SIZE, Chain, backing, names

WRITE = Permission.CONSISTENT_READ | Permission.WRITE


async def usual(layers=("base", "mid", "top", "act")):
    return await Chain().make(*((name, SIZE, 4 * KIB) for name in layers))


def is_free(bench):
    """Nothing of a job is left in the graph."""
    assert not bench.graph.backends
    for node in bench.graph.nodes.values():
        assert not node.op_blockers
        assert all(not e.frozen and not e.committed for e in node.children.values())


@pytest.mark.parametrize("how", [{"top_node": "top", "base_node": "base"}, {"top_node": "top"}])
async def test_two_layers_into_the_lowest(how):
    bench = await usual()
    before = await bench.content("act")
    expected = await bench.content("top")
    job = await bench.commit("act", **how)
    assert bench.course("c") == ["created", "running"]
    await bench.end(job)
    assert bench.course("c") == GOOD
    assert bench.completion("c") == {
        "type": "commit", "device": "c", "len": SIZE, "offset": SIZE, "speed": 0
    }  # fmt: skip
    assert backing(bench, "act") == "base" and backing(bench, "top") == "mid"
    assert await bench.content("act") == before
    assert await bench.content("base") == await bench.content("top") == expected
    assert bench.graph.nodes["act"].driver.durable_header[1] == "overlay"
    base = bench.graph.nodes["base"].driver
    assert base.durable == base.clusters
    assert names(bench) == ["act", "base", "mid", "top"], "the monitor owns them"
    is_free(bench)
    await bench.close()


async def test_what_the_base_holds_alone_is_not_touched():
    bench = await usual()
    base = bench.graph.nodes["base"]
    bitmap = DirtyBitmap(SIZE, 4 * KIB, name="b")
    base.add_bitmap(bitmap)
    above = set(bench.graph.nodes["mid"].driver.clusters) | set(
        bench.graph.nodes["top"].driver.clusters
    )
    await bench.end(await bench.commit("act", top_node="top"))
    written = {n for n in range(SIZE // (4 * KIB)) if bitmap.is_dirty(n * 4 * KIB)}
    assert written == above
    assert written - set(bench.graph.nodes["act"].driver.clusters)
    await bench.close()


@pytest.mark.parametrize("seed", range(60))
async def test_sizes_of_all_kinds(seed):
    """Clusters and lengths differ: what a longer base holds may not come to light."""
    rng = random.Random(seed)
    layers = []
    for name in "abcdef"[: rng.randrange(3, 7)]:
        cluster = rng.choice((512, 4096, 16384))
        layers.append((name, rng.randrange(1, 40) * 4096 + rng.choice((0, 0, 512)), cluster))
    bench = await Chain().make(*layers)
    order = [name for name, *_ in layers]
    top = rng.randrange(1, len(order) - 1)
    base = rng.randrange(top)
    before = {name: await bench.content(name) for name in order}
    job = await bench.commit(order[-1], top_node=order[top], base_node=order[base])
    await bench.end(job)
    assert bench.completion("c").get("error") is None, seed
    assert backing(bench, order[top + 1]) == order[base], seed
    for name in order[:base] + order[top:]:
        assert await bench.content(name) == before[name], (seed, name)
    length = len(before[order[top]])
    assert (await bench.content(order[base]))[:length] == before[order[top]], seed
    await bench.close()


async def test_who_uses_what_meanwhile():
    bench = await usual()
    graph, nodes = bench.graph, bench.graph.nodes
    drive = await graph.attach(nodes["act"], WRITE, name="virtio0")
    job = await bench.commit("virtio0", top_node="top", speed=1, filter_node_name="flt")
    assert backing(bench, "act") == "flt" and nodes["flt"].driver_class.driver_name == "commit_top"
    busy = "Node '{}' is busy: block device is in use by block job: commit"
    for call, message in (
        (bench.commit("virtio0", "c2", top_node="top"), "Need a root block node"),
        (bench.stream("act", "s"), busy.format("act")),
        (bench.stream("top", "s"), busy.format("top")),
        (bench.stream("base", "s"), busy.format("base")),
        (graph.delete("mid"), busy.format("mid")),
        (graph.delete("flt"), "Node 'flt' is busy: node is used as backing hd of 'act'"),
        (
            surgery.replace_backing(graph, nodes["mid"], None),
            "Cannot change frozen 'backing' link from 'mid' to 'base'",
        ),
        (
            graph.attach(nodes["mid"], Permission.CONSISTENT_READ),
            "Permission conflict on node 'mid': permissions 'consistent read' are both required by "
            "an unnamed block device (uses node 'mid' as 'root' child) and unshared by "
            "commit job 'c' (uses node 'mid' as 'intermediate node' child).",
        ),
        (
            graph.attach(nodes["base"], WRITE),
            "Permission conflict on node 'base': permissions 'write' are both required by "
            "an unnamed block device (uses node 'base' as 'root' child) and unshared by "
            "an unnamed block device (uses node 'base' as 'root' child).",
        ),
    ):
        with pytest.raises(BlockError) as caught:
            await call
        assert caught.value.message == message
    reader = await graph.attach(nodes["base"], Permission.CONSISTENT_READ)
    await graph.detach(reader)
    bench.scheduler.set_speed(job, 0)
    await bench.end(job)
    await graph.detach(drive)
    is_free(bench)
    with pytest.raises(BlockError, match="Permission conflict on node 'base'"):
        await graph.attach(nodes["base"], WRITE)  # as ever: it is a backing node
    await bench.close()


@pytest.mark.parametrize("where", ["mid", "base"])
async def test_a_sibling_that_reads_what_would_change_is_in_the_way(where):
    bench = await usual()
    sibling = await bench.open(**{"driver": "overlay", "node-name": "sib", "size": SIZE,
                                  "cluster-size": 4096, "backing": where})  # fmt: skip
    user = await bench.graph.attach(sibling, Permission.CONSISTENT_READ)
    with pytest.raises(BlockError, match=f"Permission conflict on node '{where}'"):
        await bench.commit("act", top_node="top")
    assert bench.course("c") == ["created", "null"]
    await bench.graph.detach(user)
    is_free(bench)
    await bench.close()


async def test_every_overlay_is_led_to_the_base():
    bench = await usual()
    await bench.open(**{"driver": "overlay", "node-name": "sib", "size": SIZE,
                        "cluster-size": 4096, "backing": "top"})  # fmt: skip
    before = [await bench.content(name) for name in ("act", "sib")]
    await bench.end(await bench.commit("act", top_node="top", backing_file="./b.img"))
    for name, was in zip(("act", "sib"), before, strict=True):
        assert backing(bench, name) == "base"
        assert bench.graph.nodes[name].driver.durable_header == ("./b.img", "overlay")
        assert await bench.content(name) == was
    await bench.close()


REFUSALS = [
    ({"device": "ghost"}, "Device 'ghost' not found"),
    ({"device": "mid"}, "Need a root block node"),
    ({"job_id": ""}, "Invalid job ID ''"),
    ({"top": "x"}, "'top-node' and 'top' are mutually exclusive"),
    ({"base": "x", "base_node": "base"}, "'base-node' and 'base' are mutually exclusive"),
    ({"top_node": None, "top": "x"}, "Top image file x not found"),
    ({"top_node": "ghost"}, "Cannot find device='' nor node-name='ghost'"),
    ({"base_node": "act"}, "'act' is not in this backing file chain"),
    ({"base": "x"}, "Can't find 'x' in the backing chain"),
    ({"top_node": "base", "base_node": "mid"}, "'mid' is not in this backing file chain"),
    ({"base_node": "top"}, "cannot commit an image into itself"),
    (
        {"top_node": "act", "backing_file": "x"},
        "'backing-file' specified, but 'top' is the active layer",
    ),
    ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ({"filter_node_name": "top"}, "Duplicate nodes with node-name='top'"),
    ({"filter_node_name": "9x"}, "Invalid node-name: '9x'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSALS)
async def test_refusals_leave_nothing(options, message):
    bench = await usual()
    options = {"device": "act", "job_id": "c", "top_node": "top"} | options
    with pytest.raises(BlockError) as caught:
        await bench.commit(**options)
    assert caught.value.message == message
    created = "speed" in options or "filter_node_name" in options
    assert bench.course("c") == (["created", "null"] if created else [])
    assert names(bench) == ["act", "base", "mid", "top"]
    is_free(bench)
    await bench.end(await bench.commit("act", top_node="top"))
    assert bench.course("c")[-len(GOOD) :] == GOOD
    await bench.close()


@pytest.mark.parametrize("when", ["at once", "later", "pending"])
async def test_cancel_leaves_the_chain(when):
    bench = await usual()
    before = {name: await bench.content(name) for name in ("act", "top")}
    job = await bench.commit("act", top_node="top", auto_finalize=False)
    if when == "later":
        await bench.end(job, "pending") if job.length == 0 else None
        while job.offset == 0:
            await job.scheduler.clock.sleep(0)
    elif when == "pending":
        await bench.end(job, "pending")
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert bench.course("c")[-4:] == ["aborting", "CANCELLED", "concluded", "null"]
    assert backing(bench, "act") == "top"
    for name, was in before.items():
        assert await bench.content(name) == was
    is_free(bench)
    await bench.end(await bench.commit("act", top_node="top"))
    assert await bench.content("act") == before["act"]
    await bench.close()


@pytest.mark.parametrize(
    ("where", "operation", "told"),
    [("mid", "read", "read"), ("top", "map", "read"), ("base", "write", "write")],
)
@pytest.mark.parametrize("policy", ["report", "stop", "ignore"])
async def test_errors(where, operation, told, policy):
    bench = await usual()
    before = await bench.content("act")
    code = ENOSPC if where == "base" else EIO
    bench.graph.nodes[where].driver.faults[operation] = code
    job = await bench.commit("act", top_node="top", on_error=BlockdevOnError(policy))
    if policy == "stop":
        await bench.end(job, "paused")
        assert job.io_status == ("nospace" if code == ENOSPC else "failed")
        bench.scheduler.resume(job)
    await bench.end(job)
    errors = [data for name, data in bench.events if name == "BLOCK_JOB_ERROR"]
    assert errors == [{"device": "c", "operation": told, "action": policy}]
    failed = policy == "report"  # what is ignored is tried again
    assert (bench.completion("c").get("error") is not None) == failed
    assert backing(bench, "act") == ("top" if failed else "base")
    assert await bench.content("act") == before
    is_free(bench)
    await bench.close()


@pytest.mark.parametrize(("where", "operation"), [("base", "flush"), ("act", "header")])
async def test_an_error_at_the_end(where, operation):
    bench = await usual()
    before = await bench.content("act")
    bench.graph.nodes[where].driver.faults[operation] = EIO
    await bench.end(await bench.commit("act", top_node="top"))
    assert bench.completion("c")["error"] == "injected"
    assert backing(bench, "act") == "top" and await bench.content("act") == before
    is_free(bench)
    await bench.end(await bench.commit("act", top_node="top"))
    assert backing(bench, "act") == "base" and await bench.content("act") == before
    await bench.close()


async def test_the_header_changes_after_the_base_is_durable():
    bench = await usual()
    base, act = (bench.graph.nodes[name].driver for name in ("base", "act"))
    seen = []
    change = act.change_backing_file

    async def watched(*arguments):
        seen.append(base.durable == base.clusters)
        await change(*arguments)
        seen.append(act.durable_header[0])

    act.change_backing_file = watched
    await bench.end(await bench.commit("act", top_node="top", backing_file="./b"))
    assert seen == [True, "./b"]
    await bench.close()


async def test_a_read_only_base_is_writable_meanwhile():
    bench = await usual()
    base = bench.graph.nodes["base"]
    await bench.graph.set_read_only(base, True)
    expected = await bench.content("top")
    job = await bench.commit("act", top_node="top", speed=1)
    assert not base.read_only
    bench.scheduler.set_speed(job, 0)
    await bench.end(job)
    assert base.read_only and base.driver.read_only
    assert await bench.content("base") == expected
    await bench.close()


async def test_a_stream_and_a_commit_in_one_chain():
    for first in ("stream", "commit"):
        bench = await usual("abcdefg")
        before = {name: await bench.content(name) for name in "abcdefg"}
        stream = await bench.stream("c", "s", speed=1)  # into c: b and a
        commit = await bench.commit("g", "c", top_node="f", base_node="e", speed=1)
        order = [stream, commit] if first == "stream" else [commit, stream]
        for job in order:
            bench.scheduler.set_speed(job, 0)
            await bench.end(job)
        assert backing(bench, "g") == "e" and backing(bench, "e") == "d"
        assert backing(bench, "d") == "c" and backing(bench, "c") is None
        for name in "abcdfg":
            assert await bench.content(name) == before[name], (first, name)
        assert await bench.content("e") == before["f"]
        await bench.close()


async def test_guests_write_meanwhile():
    bench = await usual()
    act = bench.graph.nodes["act"]
    guest = await bench.graph.attach(act, WRITE, name="virtio0")
    model = bytearray(await bench.content("act"))
    rng = random.Random(1)
    job = await bench.commit("virtio0", top_node="top")
    while job.status != "null":
        offset = rng.randrange(SIZE - 5000)
        data = rng.randbytes(rng.randrange(1, 5000))
        await guest.write(offset, data)
        model[offset : offset + len(data)] = data
        assert await guest.read(0, SIZE) == model
    assert await guest.read(0, SIZE) == model and backing(bench, "act") == "base"
    assert guest.node is act
    await bench.close()


@pytest.mark.parametrize("active", [False, True])
async def test_a_client_that_vanishes_during_the_start(active):
    large = 1024 * KIB
    layers = ("base", "mid", "top", "act")
    bench = await Chain().make(*((name, large, 64 * KIB) for name in layers))
    await bench.graph.set_read_only(bench.graph.nodes["base"], True)
    before = await bench.content("act")
    where = {} if active else {"top_node": "top"}
    for turns in range(40):
        start = asyncio.create_task(bench.commit("act", f"c{turns}", speed=1, **where))
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        assert [job.status for job in bench.scheduler.jobs.values()] in ([], ["running"]), turns
        await bench.scheduler.cancel_all()
        is_free(bench)
        assert names(bench) == ["act", "base", "mid", "top"]
        assert bench.graph.nodes["base"].read_only
        assert await bench.content("act") == before
    assert bench.course("c39")[-3:] == ["CANCELLED", "concluded", "null"]
    await bench.close()
