"""Filters over real images: what they do to the files, beside guests and surgery."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import subprocess

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph import children, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.reopen import reopen
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import ExtentKind, Permission
from liveblockd.storage.file import FileDriver
from liveblockd.storage.filters.buckets import Limits, Rate
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment

load_all_drivers()

CLUSTER = 65536
SIZE = 16 * CLUSTER
WRITER = Permission.CONSISTENT_READ | Permission.WRITE


class World:
    def __init__(self, directory):
        self.directory = directory
        self.workers = WorkerPool()
        self.events = []
        publisher = Publisher()
        publisher.subscribe(self.events.append)
        self.environment = Environment(self.workers, publisher=publisher)
        self.graph = Graph(self.environment)

    def path(self, name):
        return str(self.directory / name)

    async def image(self, name, backing=None, **more):
        (self.directory / name).touch()
        members = {"driver": "file", "filename": self.path(name)}
        file = await FileDriver.open(parse(FileDriver.Options, members), {}, self.environment)
        await create_qcow2(file, size=SIZE, **more)
        await file.close()
        return await self.add(
            name, "qcow2", backing=backing, discard="unmap",
            file={"driver": "file", "filename": self.path(name)},
        )  # fmt: skip

    async def add(self, name, driver, **members):
        value = {k.replace("_", "-"): v for k, v in members.items()}
        options = {"driver": driver, "node-name": name, **value}
        return await self.graph.open(parse(BlockdevOptions, options))

    async def use(self, node, used=WRITER):
        return await self.graph.attach(node, used, Permission.ALL)

    async def end(self):
        await self.graph.close()
        self.workers.close()


@pytest.fixture
async def world(tmp_path):
    world = World(tmp_path)
    yield world
    await world.end()


async def kinds(node, offset=0, length=SIZE):
    found = []
    while length:
        for extent in await node.driver.map(offset, length):
            count = extent.length // CLUSTER
            if found and found[-1][0] is extent.kind:
                count += found.pop()[1]
            found.append((extent.kind, count))
            offset, length = offset + extent.length, length - extent.length
    return found


def check(path):
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", path], capture_output=True, timeout=60, check=False
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0 and not found.get("leaks"), found


# -- compress


async def test_what_is_written_is_compressed(world):
    image = await world.image("disk")
    disk = await world.use(await world.add("z", "compress", file="disk"))
    await disk.write(0, b"a" * 2 * CLUSTER)
    await disk.write(2 * CLUSTER + 100, b"b" * 200)  # a part of a cluster
    await disk.write(3 * CLUSTER - 50, b"c" * 100)  # parts of two
    kind = (await kinds(image))[0]
    assert kind == (ExtentKind.COMPRESSED, 4)
    data = bytes(await disk.read(2 * CLUSTER, 2 * CLUSTER))
    expected = bytearray(2 * CLUSTER)
    expected[100:300] = b"b" * 200
    expected[CLUSTER - 50 : CLUSTER + 50] = b"c" * 100
    assert data == expected
    await disk.flush()
    await world.end()
    check(world.path("disk"))


async def test_parts_of_a_cluster_at_once(world):
    await world.image("disk")
    disk = await world.use(await world.add("z", "compress", file="disk"))
    await disk.write(0, b"x" * CLUSTER)
    step = CLUSTER // 16
    await asyncio.gather(
        *(disk.write(n * step, bytes([n + 1]) * step) for n in range(0, 16, 2)),
        *(disk.write_zeroes(n * step, step) for n in range(1, 16, 2)),
    )
    expected = b"".join((bytes([n + 1]) if n % 2 == 0 else b"\0") * step for n in range(16))
    assert bytes(await disk.read(0, CLUSTER)) == expected


async def test_a_cluster_with_bytes_of_its_own_is_written_plainly(world):
    image = await world.image("disk")
    plain = await world.use(image)
    await plain.write(0, b"p" * CLUSTER)
    disk = await world.use(await world.add("z", "compress", file="disk"))
    await disk.write(0, b"q" * CLUSTER)
    assert bytes(await plain.read(0, CLUSTER)) == b"q" * CLUSTER
    assert (await kinds(image))[0] == (ExtentKind.DATA, 1)


async def test_only_over_what_compresses(world):
    await world.add("n", "null-co")
    with pytest.raises(BlockError, match="not supported for underlying format: null-co"):
        await world.add("z", "compress", file="n")


# -- copy-on-read


async def chain(world):
    base = await world.image("base")
    user = await world.use(base)
    await user.write(0, b"b" * 4 * CLUSTER)
    await user.flush()
    await world.graph.detach(user)
    middle = await world.image("middle", backing="base")
    user = await world.use(middle)
    await user.write(2 * CLUSTER, b"m" * 2 * CLUSTER)
    await user.flush()
    await world.graph.detach(user)
    return await world.image("top", backing="middle")


async def test_what_is_read_is_kept(world):
    top = await chain(world)
    disk = await world.use(await world.add("cor", "copy-on-read", file="top"))
    await disk.write(3 * CLUSTER, b"g" * 512)
    assert disk.read_nowait(100, 10) is None
    assert bytes(await disk.read(100, 10)) == b"b" * 10
    assert bytes(disk.read_nowait(200, 10)) == b"b" * 10
    assert await kinds(top, 0, 4 * CLUSTER) == [
        (ExtentKind.DATA, 1), (ExtentKind.UNALLOCATED, 2), (ExtentKind.DATA, 1)
    ]  # fmt: skip
    data = await disk.read(CLUSTER, 4 * CLUSTER)
    assert bytes(data[:CLUSTER]) == b"b" * CLUSTER
    assert bytes(data[CLUSTER : 2 * CLUSTER]) == b"m" * CLUSTER
    assert bytes(data[2 * CLUSTER : 2 * CLUSTER + 513]) == b"g" * 512 + b"m"
    assert await kinds(top, 0, 5 * CLUSTER) == [(ExtentKind.DATA, 4), (ExtentKind.ZERO, 1)]
    await world.end()
    check(world.path("top"))


async def test_bottom(world):
    top = await chain(world)
    disk = await world.use(await world.add("cor", "copy-on-read", file="top", bottom="middle"))
    assert bytes(await disk.read(0, 4 * CLUSTER))[CLUSTER * 2 - 1 :][:2] == b"bm"
    assert await kinds(top, 0, 4 * CLUSTER) == [(ExtentKind.UNALLOCATED, 2), (ExtentKind.DATA, 2)]
    with pytest.raises(BlockError, match="Cannot change frozen 'backing' link"):
        await surgery.replace_backing(world.graph, top, world.graph.find("base"))
    with pytest.raises(BlockError, match="Cannot change frozen"):
        await world.add("second", "copy-on-read", file="top", bottom="base")
    await world.graph.detach(disk)
    await world.graph.delete("cor")
    await surgery.replace_backing(world.graph, top, world.graph.find("base"))


@pytest.mark.parametrize(
    ("bottom", "message"),
    [
        ("ghost", "Bottom node 'ghost' not found"),
        ("n", "is not in a chain starting from 'top'"),
        ("other", "Bottom node 'other' is a filter"),
    ],
)
async def test_a_bottom_that_cannot_be(world, bottom, message):
    await chain(world)
    await world.add("n", "null-co")
    await world.add("other", "copy-on-read", file="n")
    with pytest.raises(BlockError, match=message):
        await world.add("cor", "copy-on-read", file="top", bottom=bottom)
    assert not any(edge.frozen for node in world.graph.nodes.values() for edge in node.parents)


async def test_guest_writes_win_over_copies(world):
    await chain(world)
    disk = await world.use(await world.add("cor", "copy-on-read", file="top"))
    await asyncio.gather(
        disk.read(0, 4 * CLUSTER), *(disk.write(n * CLUSTER + 7, b"w" * 9) for n in range(4))
    )
    data = bytes(await disk.read(0, 4 * CLUSTER))
    for n in range(4):
        byte = b"b" if n < 2 else b"m"
        assert data[n * CLUSTER :][:20] == byte * 7 + b"w" * 9 + byte * 4


# -- preallocate


async def test_space_in_large_steps(world):
    path = world.directory / "disk"
    await world.image("disk")
    await world.graph.delete("disk")
    before = path.stat().st_size
    file = {"driver": "file", "filename": str(path)}
    below = {"driver": "preallocate", "node-name": "p", "prealloc-size": 2 << 20, "file": file}
    node = await world.add("disk", "qcow2", file=below)
    disk = await world.use(node)
    await disk.write(0, b"a" * CLUSTER)
    size, known = path.stat().st_size, world.graph.find("p").length
    assert size % (1 << 20) == 0 and size >= before + (2 << 20) and known < size
    assert path.stat().st_blocks * 512 >= size - (1 << 20)
    await asyncio.gather(*(disk.write(n * CLUSTER, bytes([n]) * CLUSTER) for n in range(1, 8)))
    await disk.flush()
    assert path.stat().st_size == size
    for n in range(1, 8):
        assert bytes(await disk.read(n * CLUSTER, CLUSTER)) == bytes([n]) * CLUSTER
    await world.end()
    assert known < path.stat().st_size < size
    check(str(path))


async def test_a_read_only_file_is_cut_off(world):
    path = world.directory / "disk"
    await world.image("disk")
    await world.graph.delete("disk")
    file = {"driver": "file", "filename": str(path)}
    node = await world.add("disk", "qcow2", file={"driver": "preallocate", "file": file})
    disk = await world.use(node)
    await disk.write(0, b"a" * CLUSTER)
    assert path.stat().st_size > 128 << 20
    await world.graph.detach(disk)
    await world.graph.set_read_only(node, True)
    assert path.stat().st_size == node.file.length < 1 << 20
    check(str(path))
    await world.graph.set_read_only(node, False)
    disk = await world.use(node)
    await disk.write(CLUSTER, b"b" * CLUSTER)
    assert bytes(await disk.read(0, 2 * CLUSTER)) == b"a" * CLUSTER + b"b" * CLUSTER


async def test_nothing_is_preallocated_for_who_cannot_resize(world):
    path = world.directory / "raw"
    path.write_bytes(bytes(4096))
    node = await world.add(
        "p", "preallocate", prealloc_align=4096, file={"driver": "file", "filename": str(path)}
    )
    disk = await world.use(node)
    await disk.write(0, b"a" * 4096)
    assert node.length == 4096 and node.host_file() is None
    grower = await world.use(node, WRITER | Permission.RESIZE)
    await node.driver.write(4096, b"b" * 4096)
    assert path.stat().st_size > 128 << 20 and node.length == 8192
    await world.graph.detach(grower)
    assert path.stat().st_size == node.length == 8192
    assert path.read_bytes() == b"a" * 4096 + b"b" * 4096


async def test_an_alignment_that_is_none(world):
    await world.add("n", "null-co")
    with pytest.raises(BlockError, match="not aligned to 512"):
        await world.add("p", "preallocate", file="n", prealloc_align=1000)


# -- quorum and its children


async def test_children_of_a_quorum_come_and_go(world):
    for n in range(4):
        (world.directory / f"{n}").write_bytes(bytes(65536))
        await world.add(f"f{n}", "file", filename=world.path(f"{n}"))
    node = await world.add("q", "quorum", children=["f0", "f1", "f2"], vote_threshold=2)
    disk = await world.use(node)
    await disk.write(0, b"a" * 512)
    with pytest.raises(BlockError, match="The node f0 already has a parent"):
        await children.add_child(world.graph, node, world.graph.find("f0"))
    with pytest.raises(BlockError, match="does not support adding a child"):
        await children.add_child(world.graph, world.graph.find("f0"), world.graph.find("f3"))
    await children.remove_child(world.graph, node, "children.1")
    with pytest.raises(BlockError, match="cannot be lower than the vote threshold 2"):
        await children.remove_child(world.graph, node, "children.0")
    with pytest.raises(BlockError, match=r"Node 'q' does not have child 'children.1'"):
        await children.remove_child(world.graph, node, "children.1")
    await children.add_child(world.graph, node, world.graph.find("f3"))
    assert [edge.child.name for edge in node.children.values()] == ["f0", "f2", "f3"]
    await disk.write(512, b"b" * 512)
    assert bytes(await disk.read(0, 1024)) == b"a" * 512 + b"b" * 512
    assert (world.directory / "3").read_bytes()[:1024] == bytes(512) + b"b" * 512
    assert (world.directory / "1").read_bytes()[512:1024] == bytes(512)
    (report,) = world.events
    assert report.name == "QUORUM_REPORT_BAD" and report.node_name == "f3"


async def test_a_child_of_a_quorum_is_its_alone(world):
    await world.add("n", "null-co")
    await world.use(await world.add("q", "quorum", children=["n"], vote_threshold=1))
    with pytest.raises(BlockError, match="Permission conflict on node 'n'"):
        await world.use(world.graph.find("n"))


# -- throttle in a graph


def throttled(world, **rates):
    group = ThrottleGroup(Limits({kind.replace("_", "-"): Rate(n) for kind, n in rates.items()}))
    groups = {"slow": group, "free": ThrottleGroup(Limits())}

    def find(name):
        if name not in groups:
            raise BlockError(f"Throttle group '{name}' does not exist")
        return groups[name]

    world.graph.environment = dataclasses.replace(world.environment, throttle_group=find)
    return groups


async def test_a_slow_limit_does_not_hold_up_a_snapshot(world):
    throttled(world, bps_write=512)
    await world.image("disk")
    node = await world.add("t", "throttle", throttle_group="slow", file="disk")
    disk = await world.use(node)
    await disk.write(0, b"a" * CLUSTER)
    waiting = [asyncio.ensure_future(disk.write(n * CLUSTER, b"b" * 512)) for n in range(3)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    overlay = await world.image("over")
    await asyncio.wait_for(surgery.append_overlay(world.graph, node, overlay), 30)
    assert all(task.done() for task in waiting) and disk.node is overlay
    await asyncio.wait_for(disk.write(0, b"c" * 512), 30)  # no longer through the throttle
    assert bytes(await disk.read(0, 513)) == b"c" * 512 + b"a"
    assert bytes(await disk.read(CLUSTER, 512)) == b"b" * 512


async def test_reopening_does_not_go_past_the_filter_of_a_job(world):
    """The job would not see what the guest writes; who names what is below means what there is."""
    throttled(world, bps_write=1)
    await world.add("n", "null-co", size=CLUSTER)
    await world.add("other", "null-co", size=CLUSTER)
    node = await world.add("t", "throttle", throttle_group="free", file="n")
    disk = await world.use(node)
    of_job = await surgery.insert_filter(world.graph, world.graph.nodes["n"])
    assert node.file is of_job

    async def again(file):
        options = {"driver": "throttle", "node-name": "t", "throttle-group": "free", "file": file}
        await reopen(world.graph, [parse(BlockdevOptions, options)])

    await again("n")
    assert node.file is of_job
    with pytest.raises(BlockError, match="Cannot replace implicit file child of t"):
        await again("other")
    await disk.write(0, bytes(512))
    assert node.file is of_job and of_job.file is world.graph.nodes["n"]
    await surgery.remove_filter(world.graph, of_job)
    await again("other")
    assert node.file is world.graph.nodes["other"]


async def test_reopening_joins_another_group(world):
    groups = throttled(world, bps_write=1)
    await world.add("n", "null-co", size=CLUSTER)
    node = await world.add("t", "throttle", throttle_group="slow", file="n")
    disk = await world.use(node)
    await disk.write(0, bytes(CLUSTER))
    waiting = asyncio.ensure_future(disk.write(0, bytes(1)))
    await asyncio.sleep(0.01)

    async def again(group):
        options = {"driver": "throttle", "node-name": "t", "throttle-group": group, "file": "n"}
        await reopen(world.graph, [parse(BlockdevOptions, options)])

    with pytest.raises(BlockError, match="Throttle group 'ghost' does not exist"):
        await again("ghost")
    assert node.given.throttle_group == "slow"
    await again("free")
    await asyncio.wait_for(waiting, 30)
    assert not groups["slow"].members and len(groups["free"].members) == 1
    assert node.given.throttle_group == "free" and disk.write_nowait(0, bytes(1))
