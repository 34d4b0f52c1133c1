"""First writes to clusters where the files are memory: done at once, the kernel copies the cluster.

The same requests go to a second image for which that way is closed; both must hold the same bytes.
"""

import json
import os
import random
import shutil
import subprocess
import tempfile
from errno import ENOSPC, EXDEV
from pathlib import Path

import pytest

from liveblockd.formats import raw  # noqa: F401 - registers its driver
from liveblockd.formats.qcow2 import image as qcow2  # noqa: F401
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.storage import hostcalls
from liveblockd.storage.driver import Permission, Source
from tests.support.begun import write_as_export
from tests.support.world import World

CLUSTER = 65536
SIZE = 24 * CLUSTER
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
SHM = Path("/dev/shm")


class Chains(World):
    """Chains of images in memory."""

    async def add(self, name, driver="qcow2", *, file="file", backing=None):
        below = {"driver": "file", "filename": str(self.path(name)), "node-name": f"{name}-file"}
        if file != "file":
            below = {"driver": file, "file": below}
        members = {"driver": driver, "node-name": name, "file": below, "discard": "unmap"}
        if backing is not None:
            members["backing"] = backing
        return await self.open(members)

    async def overlay(self, name, base, *, size=SIZE, **options):
        await self.create(name, size=size)
        node = await self.add(name, backing=base, **options)
        return await self.graph.attach(node, WRITER, Permission.ALL)

    def copies(self, name: str) -> int:
        return self.graph.find(f"{name}-file").driver.inline_copies


@pytest.fixture
async def world():
    if not SHM.is_dir():
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        fd = os.open(directory, os.O_RDONLY)
        suits = hostcalls.is_in_memory(fd) and hostcalls.can_copy
        os.close(fd)
        if not suits:
            pytest.skip("/dev/shm is no tmpfs, or there is no copy_file_range")
        world = Chains(Path(directory))
        yield world
        await world.end()


def check(path):
    if shutil.which("qemu-img") is None:
        return
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", path], capture_output=True, timeout=60, check=False
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0 and not found.get("leaks"), found


def content(seed: int, length: int = SIZE) -> bytes:
    """Random bytes, but that each third cluster is zeros."""
    rng = random.Random(seed)
    parts = [bytes(CLUSTER) if n % 3 == 2 else rng.randbytes(CLUSTER) for n in range(64)]
    return b"".join(parts)[:length]


async def base_of(world, driver, length=SIZE):
    data = content(7, length)
    if driver == "raw":
        world.path("base").write_bytes(data)
        await world.add("base", "raw")
        return data
    await world.create("base", size=length)
    node = await world.add("base")
    backend = await world.graph.attach(node, WRITER, Permission.ALL)
    for start in range(0, length, CLUSTER):
        if any(data[start : start + CLUSTER]):
            await backend.write(start, data[start : start + CLUSTER])
    await world.graph.detach(backend)
    return data


def closed(world, name, monkeypatch):
    """The kernel copies nothing into this image, and no first write to it is done at once."""
    driver = world.graph.find(name).driver
    monkeypatch.setattr(driver, "_write_new_nowait", lambda offset, data: False)


async def load_tables(backend):
    """As a guest's first read and write would."""
    await backend.write(0, b"first")
    await backend.read(5 * CLUSTER, 1)


@pytest.mark.parametrize("driver", ["qcow2", "raw"])
async def test_the_same_bytes_as_by_the_other_way(world, driver, monkeypatch):
    model = bytearray(await base_of(world, driver))
    model[:5] = b"first"
    fast, slow = await world.overlay("fast", "base"), await world.overlay("slow", "base")
    closed(world, "slow", monkeypatch)
    await load_tables(fast)
    await load_tables(slow)
    rng = random.Random(f"first writes {driver}")
    new = {}
    ways = set()
    for cluster in rng.sample(range(1, 24), 23):
        length = rng.choice((1, 511, 512, 4096, 40000, CLUSTER))
        inside = rng.choice((0, rng.randrange(CLUSTER - length + 1), CLUSTER - length))
        offset, data = cluster * CLUSTER + inside, rng.randbytes(length)
        new[cluster] = length < CLUSTER and cluster % 3 != 2
        assert await write_as_export(fast, offset, data) == "now", cluster
        ways.add(await write_as_export(slow, offset, data))
        model[offset : offset + length] = data
    assert ways == {"begun"}
    # Of clusters that are zeros or written whole nothing is copied; raw has no clusters.
    copied = sum(new.values()) if driver == "qcow2" else world.copies("fast")
    assert world.copies("fast") == copied > 5 and world.copies("slow") == 0
    for backend, name in ((fast, "fast"), (slow, "slow")):
        assert bytes(await backend.read(0, SIZE)) == model, name
        await backend.flush()
        await world.graph.detach(backend)
    await world.graph.close()
    check(world.path("fast"))


async def test_what_lies_behind_the_end_of_the_disk_stays_there(world):
    data = await base_of(world, "qcow2")
    half = 9 * CLUSTER + CLUSTER // 2  # the cluster at 9 is data, and half of it is not seen
    backend = await world.overlay("short", "base", size=half)
    await load_tables(backend)
    await write_as_export(backend, 9 * CLUSTER + 100, b"x" * 100)
    assert world.copies("short") == 0
    await world.graph.resize(world.graph.find("short"), 10 * CLUSTER)
    found = bytes(await backend.read(9 * CLUSTER, CLUSTER))
    seen = bytearray(data[9 * CLUSTER : half])
    seen[100:200] = b"x" * 100
    assert found == bytes(seen) + bytes(CLUSTER // 2)


@pytest.mark.parametrize("fault", ["short", "no space", "no payload"])
async def test_a_copy_that_fails_leaves_nothing_behind(world, fault, monkeypatch):
    model = bytearray(await base_of(world, "qcow2"))
    backend = await world.overlay("top", "base")
    await load_tables(backend)
    model[:5] = b"first"
    plain = hostcalls.copy_with
    failed = 0

    def copy_with(source_fd, source_offset, fd, offset, length, inside, data):
        nonlocal failed
        failed += 1
        if fault == "no space":
            raise OSError(ENOSPC, "No space left on device")
        part = 4096 if fault == "short" else length
        plain(source_fd, source_offset, fd, offset, part, 0, b"\xee" * 16)
        return False

    monkeypatch.setattr(hostcalls, "copy_with", copy_with)
    for cluster in (3, 4, 6):
        assert await write_as_export(backend, cluster * CLUSTER + 9, b"guest") == "begun"
        model[cluster * CLUSTER + 9 : cluster * CLUSTER + 14] = b"guest"
    assert failed == 3 and world.copies("top") == 0
    # A cluster of zeros gets one that was touched before: what is left there must not be seen.
    model[8 * CLUSTER + 50 : 8 * CLUSTER + 55] = b"guest"
    assert await write_as_export(backend, 8 * CLUSTER + 50, b"guest") == "now"
    assert bytes(await backend.read(0, SIZE)) == model
    await world.graph.close()
    check(world.path("top"))  # nothing leaked either


async def test_what_was_given_back_is_not_fresh(world, monkeypatch):
    """The copy fails after it has stored bytes; a write of zeros around it gets that cluster."""
    await base_of(world, "qcow2")
    backend = await world.overlay("top", "base")
    await load_tables(backend)
    driver = world.graph.find("top").driver
    plain = hostcalls.copy_with

    def copy_with(*arguments):
        plain(*arguments)
        return False

    monkeypatch.setattr(hostcalls, "copy_with", copy_with)
    assert not driver.write_nowait(3 * CLUSTER + 9, b"guest")
    before = world.path("top").stat().st_size
    assert driver.write_nowait(8 * CLUSTER + 50, b"guest")  # zeros in the base
    assert world.path("top").stat().st_size == before  # it is that cluster
    expected = bytearray(CLUSTER)
    expected[50:55] = b"guest"
    assert bytes(await backend.read(8 * CLUSTER, CLUSTER)) == expected


async def test_a_kernel_that_does_not_copy_is_asked_once(world, monkeypatch):
    await base_of(world, "qcow2")
    backend = await world.overlay("top", "base")
    await load_tables(backend)
    asked = 0

    def copy_with(*_):
        nonlocal asked
        asked += 1
        raise OSError(EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(hostcalls, "copy_with", copy_with)
    for cluster in (3, 4):
        assert await write_as_export(backend, cluster * CLUSTER, b"guest") == "begun"
    assert asked == 1


async def test_bitmaps_of_the_file_see_every_write(world):
    await base_of(world, "qcow2")
    backend = await world.overlay("top", "base")
    await load_tables(backend)
    file = world.graph.find("top-file")
    source = Source(0, CLUSTER, world.graph.find("base-file").host_file(), 5 * CLUSTER)
    bitmap = DirtyBitmap(4 * SIZE, CLUSTER, name="b")
    file.add_bitmap(bitmap)
    assert not file.copy_nowait(6 * CLUSTER, source, 0, b"x")
    assert await write_as_export(backend, 3 * CLUSTER, b"guest") == "begun"
    assert world.copies("top") == 0 and bitmap.count > 0
    file.remove_bitmap(bitmap)
    gate = file.driver._gate
    before = gate.writes
    assert file.copy_nowait(20 * CLUSTER, source, 0, b"x")
    assert gate.writes == before + 1, "copies of jobs give way to it"
    assert gate.enter()
    gate.leave()


async def test_a_claimed_cluster_is_left_alone(world):
    await base_of(world, "qcow2")
    backend = await world.overlay("top", "base")
    await load_tables(backend)
    driver = world.graph.find("top").driver
    claim = driver._claims.take(3, 1)
    assert not driver.write_nowait(3 * CLUSTER, b"guest")
    driver._claims.release(claim)
    assert driver.write_nowait(3 * CLUSTER, b"guest")
