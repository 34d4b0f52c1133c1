"""block_resize of a node that is a filter: what stands below and beside it keeps its promises."""

import random
from errno import EIO

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.graph import dirty
from liveblockd.storage.driver import Permission
from tests.simulation import images
from tests.simulation.bench import Bench

load_all_drivers()
KIB = 1024
SIZE = 1000 * KIB
WRITER = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


class Fleecing(Bench):
    """A guest above ``cbw`` above ``disk``; ``past`` is read beside it."""

    async def make(self, directory, **options):
        for name, size in (("disk", SIZE), ("temp", 4 * SIZE)):
            path = str(directory / f"{name}.qcow2")
            await images.create(self, path, size=size)
            await self.open(
                driver="qcow2", node_name=name, file={"driver": "file", "filename": path}
            )
        disk = self.graph.nodes["disk"]
        self.then = random.Random(1).randbytes(SIZE)
        user = await self.graph.attach(disk, WRITER)
        await user.write(0, self.then)
        await self.graph.detach(user)
        self.cbw = await self.open(
            driver="copy-before-write", node_name="cbw", file="disk", target="temp", **options
        )
        await self.look("past")
        self.guest = await self.graph.attach(self.cbw, WRITER)
        return self

    async def look(self, name):
        """Another reader of the past."""
        node = await self.open(driver="snapshot-access", node_name=name, file="cbw", read_only=True)
        return await self.graph.attach(node, Permission.CONSISTENT_READ)

    async def check(self):
        """As it was, for who was there before and for who comes late."""
        for name in ("late", "past"):
            node = self.graph.nodes.get(name)
            user = await (self.look(name) if node is None else self.graph.attach(node))
            assert user.length == SIZE
            assert bytes(await user.read(0, SIZE)) == self.then
            position = 0
            while position < SIZE:
                position += sum(
                    run.length for run in await user.block_status(position, SIZE - position)
                )
            assert position == SIZE


@pytest.fixture
async def bench():
    made = Fleecing()
    yield made
    await made.close()


async def test_the_past_has_its_length_when_the_disk_grows(bench, tmp_path):
    await bench.make(tmp_path)
    await bench.graph.resize(bench.cbw, 3 * SIZE)
    await bench.guest.write(SIZE - 10 * KIB, b"\xee" * 200 * KIB)
    await bench.check()
    assert bytes(await bench.guest.read(SIZE + 100 * KIB, 2)) == b"\xee\xee"


@pytest.mark.parametrize("size", [0, 3 * 64 * KIB, 500 * KIB, SIZE - 512])
async def test_what_is_cut_off_is_kept_first(bench, tmp_path, size):
    await bench.make(tmp_path)
    await bench.guest.write(SIZE - 100 * KIB, b"\xee" * 50 * KIB)
    await bench.graph.resize(bench.cbw, size)
    await bench.check()
    await bench.graph.resize(bench.cbw, 2 * SIZE)
    await bench.guest.write(0, b"\xee" * 2 * SIZE)
    await bench.check()


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
async def test_nothing_is_cut_off_that_cannot_be_kept(bench, tmp_path, policy, monkeypatch):
    await bench.make(tmp_path, on_cbw_error=policy)

    async def fails(*_):
        raise OSError(EIO, "no")

    temp = bench.graph.nodes["temp"]
    monkeypatch.setattr(temp, "write_nowait", lambda *_: False)
    monkeypatch.setattr(temp, "write", fails)
    if policy == "break-guest-write":
        with pytest.raises(OSError, match="no"):
            await bench.graph.resize(bench.cbw, 100 * KIB)
        assert bench.cbw.length == SIZE
        monkeypatch.undo()
        await bench.check()
    else:
        await bench.graph.resize(bench.cbw, 100 * KIB)
        assert bench.cbw.length == 100 * KIB


@pytest.mark.parametrize("driver", ["raw", "copy-on-read"])
async def test_bitmaps_below_count_what_is_written_to_new_bytes(tmp_path, driver):
    bench = Bench()
    path = str(tmp_path / "disk.qcow2")
    await images.create(bench, path, size=SIZE)
    below = await bench.open(
        driver="qcow2", node_name="disk", file={"driver": "file", "filename": path}
    )
    above = await bench.open(driver=driver, node_name="above", file="disk")
    dirty.add(bench.graph, "disk", "b0", granularity=64 * KIB)
    dirty.add(bench.graph, "above", "b1", granularity=64 * KIB)
    await bench.graph.resize(above, 3 * SIZE)
    user = await bench.graph.attach(above, WRITER)
    await user.write(2 * SIZE, b"x" * 512)
    for node, name in ((below, "b0"), (above, "b1")):
        bitmap = node.find_bitmap(name)
        assert bitmap.size == 3 * SIZE
        assert list(bitmap.runs()) == [(2 * SIZE // 65536 * 65536, 65536)], name
    await bench.graph.resize(above, SIZE)
    assert not list(below.find_bitmap("b0").runs())
    await bench.graph.detach(user)
    await bench.close()


async def test_a_bitmap_below_that_is_in_use_keeps_its_size(bench, tmp_path):
    await bench.make(tmp_path)
    dirty.add(bench.graph, "disk", "b0")
    bitmap = bench.graph.nodes["disk"].find_bitmap("b0")
    bitmap.busy = True
    with pytest.raises(BlockError, match="'b0' is currently in use"):
        await bench.graph.resize(bench.cbw, 2 * SIZE)
    bitmap.busy = False
