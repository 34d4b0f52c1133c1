"""Snapshots and backups of several disks in one transaction are of one moment, guests writing."""

import asyncio

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph.actions import Abort, SnapshotSync
from liveblockd.graph.snapshot import SnapshotRequest
from liveblockd.graph.transaction import Action, perform
from liveblockd.jobs.backup import BackupParameters, MirrorSyncMode
from liveblockd.jobs.backup_start import create_backup
from liveblockd.jobs.scheduler import Transaction
from liveblockd.jobs.transaction import JobAction
from liveblockd.storage.driver import Permission
from tests.simulation import images
from tests.simulation.bench import Bench

MIB = 1 << 20
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
PLACES = (0, 65536, MIB)


@pytest.fixture
async def bench():
    made = Bench()
    yield made
    await made.close()


class Slow(Action):
    """Time for the guests to write between two actions, if they could."""

    async def prepare(self):
        await asyncio.sleep(0.02)


class Guests:
    """Writes a number to all disks, in turn, then the next one."""

    def __init__(self, users):
        self.users = users
        self.number = 0
        self.stop = False
        self.task = asyncio.create_task(self.write())

    async def write(self):
        while not self.stop:
            self.number += 1
            for user in self.users:
                for place in PLACES:
                    await user.write(place, self.number.to_bytes(8, "big") * 512)
            await asyncio.sleep(0)

    async def end(self):
        self.stop = True
        await self.task


async def two_disks(bench, tmp_path):
    users = []
    for number in (0, 1):
        for name in ("disk", "target"):
            path = str(tmp_path / f"{name}{number}.qcow2")
            await images.create(bench, path, size=4 * MIB, cluster_size=65536)
            await opened(bench, f"{name}{number}", path)
        node = bench.graph.find(f"disk{number}")
        users.append(await bench.graph.attach(node, WRITER, name=f"drive{number}"))
    return users


async def opened(bench, name, path, **members):
    file = {"driver": "file", "filename": path}
    return await bench.open(driver="qcow2", node_name=name, file=file, **members)


def backup(bench, number, transaction=None, **members):
    parameters = BackupParameters(
        f"b{number}", f"drive{number}", f"target{number}", MirrorSyncMode.FULL, **members
    )

    async def create(given):
        return await create_backup(bench.graph, bench.scheduler, parameters, given)

    names = (f"drive{number}", f"target{number}")
    return JobAction(bench.scheduler, names, create, transaction)


def snapshot(bench, tmp_path, number):
    request = SnapshotRequest(f"drive{number}", None, str(tmp_path / f"over{number}.qcow2"))
    return SnapshotSync(bench.graph, request, [].append)


async def numbers(node):
    """What the guests had written, in the order in which they did."""
    found = []
    for place in PLACES:
        data = bytes(await node.read(place, 4096))
        assert data == data[:8] * 512, "a write is there whole"
        found.append(int.from_bytes(data[:8], "big"))
    return found


def of_one_moment(first, second):
    """The last write of each number came first, so older numbers stand at its end."""
    found = first + second
    assert found == sorted(found, reverse=True) and found[0] - found[-1] <= 1, found


@pytest.mark.parametrize("kind", ["snapshots", "backups", "both", "grouped"])
async def test_of_one_moment(bench, tmp_path, kind):
    users = await two_disks(bench, tmp_path)
    guests = Guests(users)
    group = Transaction() if kind == "grouped" else None
    actions = {
        "snapshots": [snapshot(bench, tmp_path, 0), Slow(), snapshot(bench, tmp_path, 1)],
        "backups": [backup(bench, 0), Slow(), backup(bench, 1)],
        "both": [backup(bench, 0), Slow(), snapshot(bench, tmp_path, 1)],
        "grouped": [backup(bench, 0, group), Slow(), backup(bench, 1, group)],
    }[kind]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(30):
        await perform(bench.graph, actions)
        after = guests.number
        for job in tuple(bench.scheduler.jobs.values()):
            await bench.end(job)
        while guests.number < after + 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await guests.end()
    names = {
        "snapshots": ("disk0", "disk1"),
        "both": ("target0", "disk1"),
    }.get(kind, ("target0", "target1"))
    kept = [await numbers(bench.graph.find(name)) for name in names]
    of_one_moment(*kept)
    assert 0 < kept[0][0] < guests.number
    assert await numbers(users[0].node) == [guests.number] * 3


async def test_an_abort_under_writing_guests_leaves_the_disks_to_them(bench, tmp_path):
    users = await two_disks(bench, tmp_path)
    guests = Guests(users)
    for _ in range(5):
        steps = [backup(bench, 0), snapshot(bench, tmp_path, 1), Slow(), backup(bench, 1), Abort()]
        with pytest.raises(BlockError, match="Abort action"):
            await perform(bench.graph, steps)
        await asyncio.sleep(0.01)
        assert not bench.scheduler.jobs
        assert [user.node.name for user in users] == ["disk0", "disk1"]
    await guests.end()
    for user in users:
        assert await numbers(user.node) == [guests.number] * 3
        assert not user.node.read_only
