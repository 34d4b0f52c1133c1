"""Requests of one length that came together: done by one call, with the bytes of single ones."""

import asyncio
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from liveblockd.exports import nbd_alike, nbd_connection
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.nbd.constants import Command, CommandFlag
from liveblockd.storage.driver import Permission
from tests.integration.test_first_writes import CLUSTER, SIZE, Chains
from tests.support.memory import MemoryDriver
from tests.unit.exports.memory_export import MemoryBackend, options, served
from tests.unit.exports.nbd_client import Client

SEED = 11
BLOCK = 4096
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
SHM = Path("/dev/shm")


@pytest.fixture(params=["memory", "disk"])
async def world(request, tmp_path):
    directory = tmp_path
    if request.param == "memory":
        if not SHM.is_dir():
            pytest.skip("no /dev/shm")
        directory = Path(tempfile.mkdtemp(dir=SHM))
    world = Chains(directory)
    yield world
    await world.end()
    shutil.rmtree(directory)


async def image(world, name, *, backing=None):
    """A user of an image whose first half is allocated, but for what cluster 5 and 7 are."""
    await world.create(name, size=SIZE)
    node = await world.add(name, backing=backing)
    user = await world.graph.attach(node, WRITER, Permission.ALL)
    await user.write(0, b"\1" * (SIZE // 2))
    await user.write_zeroes(5 * CLUSTER, CLUSTER, may_unmap=True)
    await user.discard(7 * CLUSTER, CLUSTER)
    return user


def file_of(world, name):
    return world.graph.find(f"{name}-file").driver


async def test_as_single_requests(world):
    fast, slow = await image(world, "fast"), await image(world, "slow")
    source, ways = random.Random(SEED), set()
    for _ in range(300):
        count, length = source.randrange(1, 12), source.choice([512, 1000, BLOCK, CLUSTER + 512])
        end = source.choice([5 * CLUSTER, SIZE // 2, SIZE]) - length
        offsets = [source.randrange(end) for _ in range(count)]
        parts = [source.randbytes(length) for _ in range(count)]
        done = fast.write_many_nowait(offsets, [memoryview(part) for part in parts])
        ways.add("none" if not done else "all" if done == count else "some")
        for number, (offset, part) in enumerate(zip(offsets, parts, strict=True)):
            await slow.write(offset, part)
            if number >= done:
                await fast.write(offset, part)
        offsets = [source.randrange(end) for _ in range(count)]
        found = fast.read_many_nowait(offsets, length)
        for offset, data in zip(offsets, found, strict=False):
            assert bytes(data) == bytes(await slow.read(offset, length)), offset
    assert bytes(await fast.read(0, SIZE)) == bytes(await slow.read(0, SIZE))
    if file_of(world, "fast")._write_flags is not None:
        assert ways == {"none", "some", "all"}
        assert file_of(world, "fast").many_writes > 100
    fast_counts, slow_counts = fast.statistics, slow.statistics
    for name in ("wr_bytes", "wr_operations", "wr_highest_offset"):
        assert getattr(fast_counts, name) == getattr(slow_counts, name), name
    for user in (fast, slow):
        await world.graph.detach(user)


async def test_reads_are_of_one_call(world):
    user = await image(world, "image")
    await user.read(0, CLUSTER)
    found = user.read_many_nowait([0, 2 * CLUSTER - BLOCK, BLOCK], BLOCK)
    assert [bytes(data) for data in found] == [b"\1" * BLOCK] * 3
    assert user.statistics.rd_operations == 4
    found = user.read_many_nowait([SIZE - BLOCK, 0, SIZE - 2 * BLOCK], BLOCK)  # nothing is below
    assert [bytes(data[:1]) for data in found] == [b"\0", b"\1", b"\0"]
    # a boundary between clusters, a zero cluster
    for offset in (CLUSTER - 1, 5 * CLUSTER):
        assert len(user.read_many_nowait([0, offset, 0], BLOCK)) == 1, offset
    assert user.read_many_nowait([0, SIZE - BLOCK + 1], BLOCK) == []
    assert user.read_many_nowait([0, -1], BLOCK) == [] == user.read_many_nowait([], BLOCK)
    await world.graph.detach(user)


async def test_reads_of_what_is_below(world):
    """Through two overlays, the upper one longer than what is below it."""
    for name, size in (("base", SIZE - 3 * BLOCK), ("middle", SIZE), ("top", SIZE)):
        await world.create(name, size=size)
    source, model = random.Random(SEED), bytearray(SIZE)
    below = None
    for name in ("base", "middle", "top"):
        node = await world.add(name, backing=below)
        user = await world.graph.attach(node, WRITER, Permission.ALL)
        for _ in range({"base": 40, "middle": 12, "top": 6}[name]):
            offset = source.randrange(8, (SIZE - 3 * BLOCK) // 1024 - 8) * 1024
            data = source.randbytes(8192)[: user.length - offset]
            model[offset : offset + len(data)] = data
            await user.write(offset, data)
        if name == "top":
            break
        await world.graph.detach(user)
        below = name
    await user.read(0, SIZE)  # the map is made
    counts = set()
    for _ in range(200):
        offsets = [source.randrange(SIZE // 512 - 8) * 512 for _ in range(8)]
        found = user.read_many_nowait(offsets, BLOCK)
        for offset, data in zip(offsets, found, strict=False):
            assert bytes(data) == model[offset : offset + BLOCK], offset
        counts.add(len(found))
    assert counts > {0, 8}, "a boundary of clusters ends it, nothing else"
    inside = [source.randrange(SIZE // BLOCK) * BLOCK for _ in range(200)]
    found = user.read_many_nowait(inside, BLOCK)
    assert len(found) == 200
    assert b"".join(found) == b"".join(model[o : o + BLOCK] for o in inside)
    await world.graph.detach(user)


async def test_where_only_one_of_two_has_a_table(world):
    far, size = 600 << 20, 1 << 30  # an L2 table is for 512 MiB
    await world.create("base", size=size)
    base = await world.graph.attach(await world.add("base"), WRITER, Permission.ALL)
    await base.write(far, b"b" * CLUSTER)
    await world.graph.detach(base)
    await world.create("top", size=size)
    top = await world.add("top", backing="base")
    user = await world.graph.attach(top, WRITER, Permission.ALL)
    await user.write(far - (512 << 20), b"t" * CLUSTER)
    await user.read(far, CLUSTER)
    places = [far - (512 << 20), far, far - (512 << 20), far + BLOCK]
    found = user.read_many_nowait(places, BLOCK)
    assert [bytes(data[:1]) for data in found] == [b"t", b"b", b"t", b"b"]
    assert user.write_many_nowait([far, 0], [b"x" * BLOCK] * 2) == 0
    await world.graph.detach(user)


async def test_who_has_to_know_of_each_write_does(world):
    user = await image(world, "image")
    offsets, parts = [0, BLOCK, 2 * BLOCK], [b"x" * BLOCK] * 3
    able = user.write_many_nowait(offsets, parts)
    assert able == (3 if file_of(world, "image")._write_flags is not None else 0)
    assert user.write_many_nowait([0, SIZE - BLOCK], parts[:2]) in (0, 1)
    assert user.statistics.wr_highest_offset == SIZE // 2, "the second one was not made"
    bitmap = DirtyBitmap(SIZE, 65536, name="b")
    user.node.add_bitmap(bitmap)
    world.graph.rebind_above(user.node)
    assert user.write_many_nowait(offsets, parts) == 0
    user.node.remove_bitmap(bitmap)
    world.graph.rebind_above(user.node)
    assert user.write_many_nowait(offsets, parts) == able
    for name in ("quiesce", "writethrough", "damaged", "read-only"):
        if name == "quiesce":
            user.quiesce()
            assert user.read_many_nowait(offsets, BLOCK) == []
        elif name == "writethrough":
            user.writethrough = True
            user.rebind()
        elif name == "damaged":
            user.node.driver._damaged = True
        else:
            user.node.driver.read_only = True
        assert user.write_many_nowait(offsets, parts) == 0, name
        user.node.driver._damaged = user.node.driver.read_only = user.writethrough = False
        if name == "quiesce":
            user.resume()
        user.rebind()
    assert user.write_many_nowait(offsets, parts) == able
    await world.graph.detach(user)


async def test_clusters_that_others_have_are_left_alone(world):
    user = await image(world, "image")
    offsets, parts = [0, BLOCK], [b"y" * BLOCK] * 2
    async with world.graph.drained(user.node):
        await user.node.driver.create_snapshot("before", date_nsec=1)
    assert user.write_many_nowait(offsets, parts) == 0
    assert bytes(await user.read(0, BLOCK)) == b"\1" * BLOCK
    await user.write(0, parts[0])  # copies the cluster
    assert user.write_many_nowait([*offsets, CLUSTER], [*parts, parts[0]]) in (0, 2)
    assert bytes(await user.read(CLUSTER, BLOCK)) == b"\1" * BLOCK
    async with world.graph.drained(user.node):
        await user.node.driver.apply_snapshot("1")
    assert bytes(await user.read(0, 2 * BLOCK)) == b"\1" * 2 * BLOCK
    await world.graph.detach(user)


async def test_a_raw_window(world):
    world.path("raw").write_bytes(b"\1" * SIZE)
    node = await world.add("raw", "raw")
    user = await world.graph.attach(node, WRITER, Permission.ALL)
    if user.write_many_nowait([BLOCK, 0], [b"a" * BLOCK, b"b" * BLOCK]):
        assert bytes(await user.read(0, 2 * BLOCK)) == b"b" * BLOCK + b"a" * BLOCK
    node.driver._offset, node.driver._size = 512, 8 * BLOCK
    user.rebind()
    assert user.write_many_nowait([7 * BLOCK + 1], [b"c" * BLOCK]) == 0
    assert node.driver.write_many_nowait([7 * BLOCK + 1], [b"c" * BLOCK]) == 0
    if user.write_many_nowait([7 * BLOCK], [b"d" * BLOCK]):
        assert world.path("raw").read_bytes()[512 + 7 * BLOCK :][:BLOCK] == b"d" * BLOCK
    [found] = user.read_many_nowait([7 * BLOCK], BLOCK)
    assert bytes(found) == bytes(await user.read(7 * BLOCK, BLOCK))
    await world.graph.detach(user)


class Many(MemoryDriver):
    """Does as many as ``most`` by one call."""

    most = 1000
    calls = 0
    defect = False

    def write_many_nowait(self, offsets, parts):
        self.calls += 1
        if self.defect:
            raise AssertionError("a defect")
        done = 0
        for offset, data in zip(offsets[: self.most], parts, strict=False):
            if not self.write_nowait(offset, bytes(data)):
                break
            done += 1
        return done

    def read_many_nowait(self, offsets, length):
        self.calls += 1
        return [self.read_nowait(offset, length) for offset in offsets[: self.most]]


def new_connections(monkeypatch):
    """The server's connections, as they come."""
    made, init = [], nbd_connection.NbdConnection.__init__

    def seen(self, *arguments):
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(nbd_connection.NbdConnection, "__init__", seen)
    return made


@pytest.mark.parametrize("most", [1000, 3, 0])
@pytest.mark.parametrize("structured", [True, False])
async def test_over_the_wire(tmp_path, monkeypatch, structured, most):
    made = new_connections(monkeypatch)
    disk, model = Many(256 * BLOCK), bytearray(256 * BLOCK)
    disk.most = most
    path, source = tmp_path / "nbd", random.Random(SEED)
    backend = MemoryBackend("disk", disk)
    async with (
        served(path, backend, exports=[options("disk", "disk", writable=True)]),
        Client.connected(path, "disk", structured=structured) as client,
    ):
        for _ in range(100):
            asked, length = [], source.choice([512, BLOCK])
            for _ in range(source.choice([1, 4, 16, 40])):
                offset = source.randrange(255) * BLOCK
                flags = CommandFlag.FUA if source.random() < 0.02 else 0
                if source.random() < 0.04:
                    length = source.choice([512, BLOCK, 8192])
                if (source.random() < 0.5 and asked and asked[-1][1] is None) or not asked:
                    data = source.randbytes(length)[: len(model) - offset]
                    cookie = client.send(Command.WRITE, offset, len(data), flags, data)
                    model[offset : offset + len(data)] = data
                    asked.append((cookie, None))
                    continue
                kind = source.random() < 0.5
                for _ in range(5):
                    offset = source.randrange(254) * BLOCK
                    if kind:
                        data = source.randbytes(length)
                        cookie = client.send(Command.WRITE, offset, length, 0, data)
                        model[offset : offset + length] = data
                        asked.append((cookie, None))
                    else:
                        cookie = client.send(Command.READ, offset, length)
                        asked.append((cookie, bytes(model[offset : offset + length])))
            left = dict(asked)
            while left:
                cookie, error, data = await answer(client)
                wanted = left.pop(cookie)
                assert not error and (wanted is None or data == wanted)
        assert bytes(disk.read_nowait(0, len(model))) == bytes(model)
        assert (made[0].alike > 200) == bool(most)
    if not most:
        assert disk.calls < 20, "it is not asked again and again in vain"


async def answer(client):
    """(cookie, error, data) of whichever request is answered next."""
    reply = await client.reply()
    if isinstance(reply, tuple) and not hasattr(reply, "cookie"):
        return reply[0].cookie, 0, reply[1]
    if hasattr(reply, "error") and not callable(reply.error):
        return reply.cookie, reply.error, None
    return reply.cookie, 0, reply.data()[1]


async def test_a_defect_is_told_of_by_each_request(tmp_path, monkeypatch, caplog):
    made = new_connections(monkeypatch)
    disk = Many(64 * BLOCK)
    path, backend = tmp_path / "nbd", MemoryBackend("disk", disk)
    async with (
        served(path, backend, exports=[options("disk", "disk", writable=True)]),
        Client.connected(path, "disk") as client,
    ):
        for defect in (False, True, False):
            disk.defect = defect
            for _ in range(3 + 2 * nbd_alike.PAUSE):
                cookies = [
                    client.send(Command.WRITE, n * BLOCK, BLOCK, payload=bytes([n]) * BLOCK)
                    for n in range(8)
                ]
                for cookie in cookies:
                    assert (await asyncio.wait_for(client.done(cookie), 10))[0] == 0
        assert made[0].alike
    assert bytes(disk.read_nowait(7 * BLOCK, 1)) == b"\7"
