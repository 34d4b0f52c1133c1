"""A transaction is done whole, at one instant, or leaves no trace, whichever step fails and how."""

import asyncio
import contextlib
from errno import EIO

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import actions, dirty, snapshot
from liveblockd.graph.snapshot import SnapshotRequest
from liveblockd.graph.transaction import Action, perform
from liveblockd.storage.driver import Permission
from tests.unit.graph import layer
from tests.unit.graph.layer import CLUSTER, IMAGES
from tests.unit.graph.test_surgery import state

READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE


class Failing(Action):
    """Fails in the step of that name."""

    def __init__(self, step):
        self.step = step

    async def prepare(self):
        if self.step == "prepare":
            raise BlockError("as asked")

    async def seal(self):
        if self.step == "seal":
            raise BlockError("as asked")


@pytest.fixture
async def disks(world, monkeypatch):
    """Two disks in use; ``old`` of disk0 is dirty."""
    removed = []

    async def create(graph, node, filename, console):
        console(filename)
        world.image(filename, node.length, backing=node.filename)
        return True

    async def remove(graph, filename):
        removed.append(filename)

    monkeypatch.setattr(snapshot, "create_overlay", create)
    monkeypatch.setattr(snapshot, "remove_file", remove)
    world.removed = removed
    world.users = []
    for number in (0, 1):
        name = f"disk{number}"
        world.image(name, c0=number + 1)
        world.image(f"over{number}")
        node = await world.layer(name, name)
        await world.layer(f"over{number}", f"over{number}", backing=None)
        world.users.append(await world.graph.attach(node, READ_WRITE, name=f"drive{number}"))
    dirty.add(world.graph, "disk0", "old")
    dirty.add(world.graph, "disk0", "other")
    await world.users[0].write(CLUSTER, b"x" * CLUSTER)
    return world


def sync(world, number, name="new"):
    request = SnapshotRequest(None, f"disk{number}", f"{name}{number}", f"{name}{number}", "layer")
    world.console = getattr(world, "console", [])
    return actions.SnapshotSync(world.graph, request, world.console.append)


def everything(world):
    graph = world.graph

    def bitmap(node, step):
        return actions.BitmapAction(node, step)

    return [
        sync(world, 0),
        bitmap("disk0", lambda: dirty.clear(graph, "disk0", "other")),
        bitmap("disk0", lambda: dirty.set_enabled(graph, "disk0", "old", False)),
        bitmap("new0", lambda: dirty.add(graph, "new0", "fresh", granularity=4096)),
        bitmap("new0", lambda: dirty.merge(graph, "new0", "fresh", [("disk0", "old")])),
        actions.RemoveBitmap(graph, "disk0", "old"),
        actions.Snapshot(graph, "disk1", "over1"),
        actions.Snapshot(graph, "new0", "over0"),
    ]


def trace(world):
    for name in [name for name, drivers in layer.OPEN.items() if not drivers]:
        del layer.OPEN[name]
    return state(world), {
        n.name: [(b.name, b.enabled, b.busy, b.persistent, b.dump()) for b in n.bitmaps]
        for n in world.graph.nodes.values()
    }


async def still_work(world):
    async with asyncio.timeout(30):
        for user in world.users:
            await user.write(2 * CLUSTER, b"z" * CLUSTER)
            assert bytes(await user.read(2 * CLUSTER, 1)) == b"z"


async def test_all_of_it(disks):
    await perform(disks.graph, everything(disks))
    graph = disks.graph
    assert disks.users[0].node is graph.find("over0")
    assert graph.find("over0").backing is graph.find("new0")
    assert graph.find("new0").backing is graph.find("disk0")
    assert disks.users[1].node is graph.find("over1")
    assert all(graph.find(name).read_only for name in ("disk0", "disk1", "new0"))
    assert [b.name for b in graph.find("disk0").bitmaps] == ["other"]
    assert graph.find("disk0").bitmaps[0].count == 0
    assert list(graph.find("new0").find_bitmap("fresh").runs()) == [(CLUSTER, CLUSTER)]
    assert not disks.removed
    await still_work(disks)
    assert IMAGES["over0"].clusters[2] == b"z" * CLUSTER
    assert 2 not in IMAGES["disk0"].clusters


@pytest.mark.parametrize("step", ["prepare", "seal"])
@pytest.mark.parametrize("position", range(9))
async def test_a_step_that_fails_leaves_no_trace(disks, position, step):
    before = trace(disks)
    steps = everything(disks)
    steps.insert(position, Failing(step))
    with pytest.raises(BlockError, match="as asked"):
        await perform(disks.graph, steps)
    assert trace(disks) == before
    assert not disks.graph.lock.locked()
    await still_work(disks)
    assert IMAGES["disk0"].clusters[2] == b"z" * CLUSTER
    assert disks.graph.find("disk0").find_bitmap("old").is_dirty(2 * CLUSTER)


@pytest.mark.parametrize("refused", ["disk0", "disk1", "new0"])
async def test_an_old_image_that_cannot_become_read_only(disks, monkeypatch, refused):
    before = trace(disks)

    async def set_read_only(self, read_only):
        if read_only and self.filename == refused:
            raise OSError(EIO, "Input/output error")
        self.read_only = read_only

    monkeypatch.setattr(layer.Named, "set_read_only", set_read_only)
    with pytest.raises(OSError):
        await perform(disks.graph, everything(disks))
    assert trace(disks) == before
    await still_work(disks)


async def test_a_flush_that_fails(disks):
    before = trace(disks)
    disks.graph.find("disk1").driver.fail_flush = OSError(EIO, "Input/output error")
    with pytest.raises(OSError):
        await perform(disks.graph, everything(disks))
    assert trace(disks) == before


@pytest.mark.parametrize("turns", range(15))
async def test_a_client_that_goes_away_cuts_nothing(disks, turns):
    task = asyncio.create_task(perform(disks.graph, everything(disks)))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    begun = turns > 0
    with contextlib.suppress(asyncio.CancelledError):  # unless it was over
        await task
    assert not disks.graph.lock.locked()
    assert (disks.users[1].node.name == "over1") is begun
    assert (disks.users[0].node.name == "over0") is begun
    await still_work(disks)


async def test_one_instant_for_all_disks(disks):
    """What was answered on one disk before a write began on the other is in neither or first."""

    class Slow(Action):
        async def prepare(self):
            await asyncio.sleep(0.01)

    stop = False
    order = []

    async def guest():
        value = 0
        while not stop:
            value += 1
            for user in disks.users:  # disk1 is written after disk0 was answered
                await user.write(0, value.to_bytes(4, "big") * (CLUSTER // 4))
            order.append(value)
            await asyncio.sleep(0)

    task = asyncio.create_task(guest())
    for _ in range(20):
        await asyncio.sleep(0)
    await perform(disks.graph, [sync(disks, 0), Slow(), sync(disks, 1)])
    for _ in range(20):
        await asyncio.sleep(0)
    stop = True
    await task
    first, second = (int.from_bytes(IMAGES[f"disk{n}"].clusters[0][:4], "big") for n in (0, 1))
    assert first in (second, second + 1) and first < order[-1]


async def test_files_are_made_while_guests_go_on_but_not_out_of_turn(disks):
    quiet = []
    made = disks.console = []

    def note(name):
        made.append(name)
        quiet.append(disks.users[0]._quiesced)

    with pytest.raises(BlockError, match="as asked"):
        steps = [sync(disks, 0), sync(disks, 1), Failing("prepare"), sync(disks, 0, "late")]
        for step in steps:
            if isinstance(step, actions.SnapshotSync):
                step._console = note
        await perform(disks.graph, steps)
    assert made == ["new0", "new1"] and quiet == [0, 0]
    assert disks.removed == []  # as QEMU leaves them


async def test_a_file_that_was_made_too_early_goes(disks):
    disks.graph.find("disk0").driver.fail_flush = OSError(EIO, "Input/output error")
    with pytest.raises(OSError):
        await perform(disks.graph, [sync(disks, 0), sync(disks, 1)])
    assert disks.removed == ["new1"]


async def test_two_overlays_of_one_disk(disks):
    first = SnapshotRequest("drive0", None, "a", None, "layer")
    second = SnapshotRequest("drive0", None, "b", None, "layer")
    steps = [actions.SnapshotSync(disks.graph, r, [].append) for r in (first, second)]
    await perform(disks.graph, steps)
    node = disks.users[0].node
    assert (node.filename, node.backing.filename, node.backing.backing.name) == ("b", "a", "disk0")


async def test_nothing_at_all(disks):
    await perform(disks.graph, [])


async def test_a_bitmap_that_goes_cannot_be_used_by_what_follows(disks):
    before = trace(disks)
    steps = [
        actions.RemoveBitmap(disks.graph, "disk0", "old"),
        actions.BitmapAction("disk0", lambda: dirty.clear(disks.graph, "disk0", "old")),
    ]
    with pytest.raises(BlockError, match="is currently in use by another operation"):
        await perform(disks.graph, steps)
    assert trace(disks) == before
