"""Overlays, backing links and filters are changed whole or not at all, under requests."""

import asyncio
import random
from errno import EIO

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import chain, snapshot, surgery
from liveblockd.graph.reopen import reopen
from liveblockd.qapi import parse
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from tests.unit.graph import layer
from tests.unit.graph.layer import CLUSTER, IMAGES

READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE


async def pair(world):
    """A disk with a user, and an overlay that is open already."""
    world.image("disk", c0=1)
    world.image("over")
    disk = await world.layer("disk", "disk")
    over = await world.layer("over", "over", backing=None)
    return disk, over, await world.graph.attach(disk, READ_WRITE, name="drive0")


async def test_snapshot_moves_users_and_makes_the_old_node_read_only(world):
    disk, over, user = await pair(world)
    await snapshot.snapshot(world.graph, "disk", "over")
    assert user.node is over and over.backing is disk
    assert disk.read_only and disk.file.read_only and disk.driver.read_only
    assert disk.driver.flushes >= 1
    assert not disk.file.driver.held[0] & Permission.WRITE
    assert bytes(user.read_nowait(0, 1)) == b"\x01"
    await user.write(0, b"\x02")
    assert IMAGES["disk"].clusters[0][:1] == b"\x01"
    assert IMAGES["over"].clusters[0][:2] == b"\x02\x01"
    with pytest.raises(BlockError) as info:
        await snapshot.snapshot(world.graph, "disk", "over")
    assert info.value.message == "Node 'disk' is busy: node is used as backing hd of 'over'"


async def test_explicit_file_node_stays_writable(world):
    world.image("disk")
    world.image("over")
    await world.add(driver="named", node_name="f", filename="disk")
    disk = await world.add(driver="layer", node_name="disk", file="f")
    await world.layer("over", "over")
    await snapshot.snapshot(world.graph, "disk", "over")
    assert disk.read_only and not disk.file.read_only
    assert not disk.file.driver.held[0] & Permission.WRITE


async def test_snapshot_waits_for_writes_in_flight(world):
    disk, _over, user = await pair(world)
    disk.driver.gate = asyncio.Event()
    write = asyncio.create_task(user.write(CLUSTER, b"x" * CLUSTER))
    await asyncio.sleep(0)
    task = asyncio.create_task(snapshot.snapshot(world.graph, "disk", "over"))
    await asyncio.sleep(0.01)
    assert not disk.read_only and user.node is disk
    later = asyncio.create_task(user.write(2 * CLUSTER, b"y" * CLUSTER))
    await asyncio.sleep(0.01)
    disk.driver.gate.set()
    await asyncio.wait_for(asyncio.gather(write, task, later), 30)
    assert IMAGES["disk"].clusters[1] == b"x" * CLUSTER
    assert 2 not in IMAGES["disk"].clusters
    assert IMAGES["over"].clusters[2] == b"y" * CLUSTER


def state(world):
    return (
        world.shape(),
        {n.name: (n.read_only, n.driver.read_only) for n in world.graph.nodes.values()},
        {name: [d.held for d in drivers] for name, drivers in layer.OPEN.items()},
        {
            (e.parent.name, e.role, n.name): (e.used, e.shared)
            for n in world.graph.nodes.values()
            for e in n.parents
        },
    )


async def test_a_failing_flush_changes_nothing(world):
    disk, _over, user = await pair(world)
    before = state(world)
    disk.driver.fail_flush = OSError(EIO, "Input/output error")
    with pytest.raises(OSError):
        await snapshot.snapshot(world.graph, "disk", "over")
    assert state(world) == before and user.node is disk
    assert user.read_nowait(0, 1) is not None
    disk.driver.fail_flush = None
    await snapshot.snapshot(world.graph, "disk", "over")


async def test_failing_to_become_read_only_changes_nothing(world, monkeypatch):
    disk, _over, user = await pair(world)
    before = state(world)

    async def refuse(self, read_only):
        if read_only:
            raise OSError(EIO, "Input/output error")
        self.read_only = read_only

    monkeypatch.setattr(layer.Named, "set_read_only", refuse)
    with pytest.raises(OSError):
        await snapshot.snapshot(world.graph, "disk", "over")
    assert state(world) == before and user.node is disk
    await user.write(0, b"z")
    assert IMAGES["disk"].clusters[0][:1] == b"z"


@pytest.mark.parametrize("steps", range(1, 30))
async def test_cancelled_anywhere_the_graph_is_whole(world, steps):
    disk, over, user = await pair(world)
    before = state(world)
    task = asyncio.create_task(snapshot.snapshot(world.graph, "disk", "over"))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        await task
        done = True
    except asyncio.CancelledError:
        done = user.node is over
    assert not world.graph.lock.locked()
    if done:
        assert over.backing is disk and disk.read_only
    else:
        assert state(world) == before
    await asyncio.wait_for(user.write(0, b"z"), 30)


async def test_unattached_overlay_goes(world, monkeypatch):
    world.image("disk")
    disk = await world.layer("disk", "disk")

    async def create(graph, node, filename, console):
        world.image(filename, node.length, backing=node.filename)
        return True

    monkeypatch.setattr(snapshot, "create_overlay", create)
    take = {"device": None, "snapshot_file": "s", "image_format": "layer"}
    await snapshot.snapshot_sync(world.graph, node_name="disk", snapshot_node_name="s", **take)
    assert list(world.graph.nodes) == [disk.file.name, "disk"] and disk.read_only
    user = await world.graph.attach(disk, name="drive0")
    await snapshot.snapshot_sync(
        world.graph, node_name=None, snapshot_node_name=None, **take | {"device": "drive0"}
    )
    assert user.node.backing is disk and user.node.filename == "s"


async def test_blocked_by_a_job(world):
    disk, _over, _user = await pair(world)
    disk.op_blockers.append("block device is in use by block job: stream")
    with pytest.raises(BlockError) as info:
        await snapshot.snapshot(world.graph, "disk", "over")
    assert info.value.message == (
        "Node 'disk' is busy: block device is in use by block job: stream"
    )
    with pytest.raises(BlockError):
        await world.graph.resize(disk, 512)


async def test_snapshot_refusals(world):
    _disk, _over, _user = await pair(world)
    await world.add(driver="memory", node_name="flat", size=512)
    for node, overlay, message in (
        ("ghost", "over", "Cannot find device='ghost' nor node-name='ghost'"),
        ("disk", "ghost", "Cannot find device='ghost' nor node-name='ghost'"),
        ("disk", "flat", "The overlay does not support backing images"),
        ("disk", "disk", "Making 'disk' a backing child of 'disk' would create a cycle"),
        ("over", "disk", "The overlay is already in use"),
    ):
        with pytest.raises(BlockError) as info:
            await snapshot.snapshot(world.graph, node, overlay)
        assert info.value.message == message


async def test_a_backing_node_takes_no_writer(world):
    disk, _over, _user = await pair(world)
    await snapshot.snapshot(world.graph, "disk", "over")
    with pytest.raises(BlockError) as info:
        await world.graph.attach(disk, READ_WRITE, user="block device 'exp'")
    assert info.value.message == "Block node is read-only"
    with pytest.raises(BlockError) as info:
        await world.graph.set_read_only(disk, False)
        await world.graph.attach(disk, READ_WRITE, user="block device 'exp'")
    assert info.value.message == (
        "Permission conflict on node 'disk': permissions 'write' are both required by "
        "block device 'exp' (uses node 'disk' as 'root' child) and unshared by node 'over' "
        "(uses node 'disk' as 'backing' child)."
    )
    await world.graph.attach(disk, Permission.WRITE_UNCHANGED)


async def test_filter_life(world):
    disk, _over, user = await pair(world)
    above = await surgery.insert_filter(world.graph, disk, "flt")
    assert user.node is above and bytes(user.read_nowait(0, 1)) == b"\x01"
    assert above.filename == (
        'json:{"driver": "copy-on-read", "file": {"driver": "layer", '
        '"file": {"driver": "named", "filename": "disk"}}}'
    )
    assert disk.file.driver.held[0] & Permission.WRITE
    await user.write(0, b"q")
    with pytest.raises(BlockError) as info:
        await world.graph.delete("flt")
    assert info.value.message == "Node flt is in use"
    with pytest.raises(BlockError) as info:
        await surgery.insert_filter(world.graph, disk, "flt")
    assert info.value.message == "Duplicate nodes with node-name='flt'"
    await surgery.remove_filter(world.graph, above)
    await surgery.remove_filter(world.graph, above)
    assert user.node is disk and "flt" not in world.graph.nodes
    assert bytes(user.read_nowait(0, 1)) == b"q"


async def test_replacing_a_backing_node_drops_what_nobody_uses(world):
    world.image("base")
    world.image("mid", backing="base")
    world.image("top", backing="mid")
    top = await world.layer("top", "top")
    mid, base = top.backing, top.backing.backing
    kept = await world.graph.attach(base)
    await top.driver.change_backing_file("base", "layer")
    await surgery.replace_backing(world.graph, top, base)
    assert set(world.shape()) == {"top", top.file.name, base.name, base.file.name}
    assert mid.driver.closed and top.filename == "top"
    await top.driver.change_backing_file(None, None)
    await surgery.replace_backing(world.graph, top, None)
    assert "backing" not in top.driver.children and base.name in world.graph.nodes
    await world.graph.detach(kept)
    assert set(world.shape()) == {"top", top.file.name}


async def test_reopen(world):
    world.image("base")
    world.image("top", backing="base")
    await world.layer("base", "base")
    await world.add(driver="named", node_name="f", filename="top")
    top = await world.add(driver="layer", node_name="top", file="f", backing="base")

    async def again(*options):
        await reopen(world.graph, [parse(BlockdevOptions, o) for o in options])

    one = {"driver": "layer", "node-name": "top", "file": "f"}
    await again(one | {"backing": "base", "read-only": True})
    assert top.read_only
    await again(one | {"backing": None})
    assert not top.read_only and top.backing is None
    await again(one | {"backing": "base", "detect-zeroes": "on"})
    assert top.backing.name == "base" and str(top.detect_zeroes) == "on"
    for options, message in (
        (one | {"node-name": "ghost"}, "Failed to find node with node-name='ghost'"),
        ({"driver": "layer", "file": "f"}, "node-name not specified"),
        (one, "backing is missing for 'top'"),
        (one | {"backing": "ghost"}, "Cannot find device='' nor node-name='ghost'"),
        (
            {"driver": "named", "node-name": "f", "filename": "base"},
            "Cannot change the option 'filename'",
        ),
    ):
        with pytest.raises(BlockError) as info:
            await again(one | {"backing": None}, options)
        assert info.value.message == message
        assert top.backing.name == "base" and not any(
            n.op_blockers for n in world.graph.nodes.values()
        )


@pytest.mark.parametrize("seed", range(10))
async def test_random_surgery_under_requests(world, seed):
    """A guest reads and writes all the time; what it reads is what it wrote."""
    rng = random.Random(seed)
    world.image("l0")
    await world.layer("l0", "l0")
    user = await world.graph.attach(world.graph.find("l0"), READ_WRITE, name="drive0")
    model = bytearray(16 * CLUSTER)
    stop = False

    async def guest(part):
        while not stop:
            offset = part * 4 * CLUSTER + rng.randrange(4 * CLUSTER - 100)
            data = rng.randbytes(rng.randint(1, 100))
            if not user.write_nowait(offset, data):
                await user.write(offset, data)
            model[offset : offset + len(data)] = data
            got = user.read_nowait(offset, 100)
            if got is None:
                got = await user.read(offset, 100)
            assert bytes(got)[: len(data)] == data, f"{seed=}"
            await asyncio.sleep(0)

    guests = [asyncio.create_task(guest(part)) for part in range(4)]
    for step in range(1, 15):
        await asyncio.sleep(0)
        top = chain.skip_filters(user.node)
        action = rng.choice(["snapshot", "filter", "collapse"])
        if action == "snapshot":
            world.image(f"l{step}")
            await world.layer(f"l{step}", f"l{step}", backing=None)
            await snapshot.snapshot(world.graph, top.name, f"l{step}")
        elif action == "filter":
            above = await surgery.insert_filter(world.graph, top)
            await asyncio.sleep(0)
            await surgery.remove_filter(world.graph, above)
        elif top.backing is not None:
            async with world.graph.drained(top):
                for index in range(16):
                    top.driver.image.clusters[index] = top.driver._read(index * CLUSTER, CLUSTER)
            await surgery.replace_backing(world.graph, top, None)
    stop = True
    await asyncio.wait_for(asyncio.gather(*guests), 30)
    assert bytes(await user.read(0, 16 * CLUSTER)) == bytes(model), f"{seed=}"
    await world.graph.close()
    assert not world.graph.nodes and not any(layer.OPEN.values())


async def test_a_refused_reopen_does_not_disturb_the_guest(world, monkeypatch):
    """Not for a moment may a guest that writes find its disk read-only."""
    world.image("top")
    top = await world.layer("top", "top")
    user = await world.graph.attach(top, READ_WRITE)
    failures = []

    async def guest():
        while True:
            try:
                if not user.write_nowait(0, b"x"):
                    await user.write(0, b"x")
            except OSError as error:
                failures.append(error)
            await asyncio.sleep(0)

    task = asyncio.create_task(guest())
    change = top.file.driver.set_read_only

    async def slowly(read_only):
        for _ in range(5):
            await asyncio.sleep(0)
        await change(read_only)

    monkeypatch.setattr(top.file.driver, "set_read_only", slowly)
    file = {"driver": "named", "filename": "top"}
    options = {"driver": "layer", "node-name": "top", "file": file, "read-only": True}
    with pytest.raises(BlockError, match="cannot support read-write users"):
        await reopen(world.graph, [parse(BlockdevOptions, options)])
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    assert not failures and not top.read_only


async def test_nobody_reads_while_a_node_becomes_read_only(world):
    world.image("top")
    top = await world.layer("top", "top")
    user = await world.graph.attach(top)
    top.driver.gate = asyncio.Event()
    reader = asyncio.create_task(user.read(0, 1))
    await asyncio.sleep(0)
    change = asyncio.create_task(world.graph.set_read_only(top, True))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not change.done() and not top.driver.read_only
    top.driver.gate.set()
    await asyncio.wait_for(change, 30)
    assert top.driver.read_only and bytes(await reader) == b"\0"


async def test_a_shared_image_never_becomes_writable(world):
    """force-share takes no locks: somebody else may be writing to that image."""
    world.image("top")
    top = await world.layer("top", "top", read_only=True, force_share=True)
    with pytest.raises(BlockError, match="force-share=on can only be used with read-only images"):
        await world.graph.set_read_only(top, False)
    assert top.read_only and top.driver.read_only and top.file.driver.read_only


async def test_a_drain_lets_all_go_on_whatever_happens(world, monkeypatch):
    world.image("top")
    top = await world.layer("top", "top")
    users = [await world.graph.attach(top, READ_WRITE) for _ in range(3)]
    broken = True
    kind = type(top.driver)
    length = kind.length.fget

    def failing(self):
        if broken:
            raise OSError(EIO, "the size cannot be had")
        return length(self)

    async with world.graph.drained(top):
        waiting = [asyncio.create_task(user.write(0, b"x")) for user in users]
        await asyncio.sleep(0)
        monkeypatch.setattr(kind, "length", property(failing))
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
    assert [type(result) for result in results] == [OSError] * 3
    broken = False
    for user in users:
        await asyncio.wait_for(user.write(0, b"x"), 30)
        assert user.in_flight == 0


@pytest.mark.parametrize("cancelled", [False, True])
async def test_requests_wait_for_what_has_to_be_known_of_a_switch(world, cancelled):
    """As the journal, which must say where a drive is before its guest writes there."""
    _disk, over, user = await pair(world)
    durable = asyncio.Event()
    seen = []

    async def wait():
        await durable.wait()

    def on_drained():
        seen.append(user.node)
        return wait()

    world.graph.on_drained = on_drained
    task = asyncio.create_task(snapshot.snapshot(world.graph, "disk", "over"))
    while over not in seen:
        if seen:
            durable.set()  # a drain before the switch
        await asyncio.sleep(0)
        durable.clear()
    assert not user.write_nowait(0, b"x")
    write = asyncio.create_task(user.write(0, b"x"))
    if cancelled:
        task.cancel()
    await asyncio.sleep(0.01)
    assert not write.done() and not task.done()
    world.graph.on_drained = lambda: None
    durable.set()
    await asyncio.wait_for(asyncio.wait((write, task)), 30)
    assert user.node is over and IMAGES["over"].clusters[0][:1] == b"x"
    await write
