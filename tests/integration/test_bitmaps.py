"""Persistent dirty bitmaps: what we store QEMU reads, and the other way round; crashes."""

import json
import os
import random
import struct

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import dirty
from liveblockd.storage.driver import Permission
from tests.simulation import images
from tests.simulation.bench import Bench
from tests.support.qcow2_images import check, needs, run

MIB = 1 << 20
WRITER = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


@pytest.fixture
async def bench():
    made = Bench()
    yield made
    await made.close()


async def opened(bench, path, name="disk", **options):
    return await bench.open(
        driver="qcow2", node_name=name, file={"driver": "file", "filename": str(path)}, **options
    )


def bitmaps_of(path):
    info = json.loads(run("qemu-img", "info", "-U", "--output=json", str(path)))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {b["name"]: (b["granularity"], sorted(b["flags"])) for b in found}


def dirty_areas(path, name):
    """What QEMU says is dirty, over NBD."""
    socket = f"{path}.sock"
    text = run(
        "/bin/sh", "-c",
        f"qemu-nbd -r -f qcow2 -B {name} -k {socket} --fork --pid-file={path}.pid {path} && "
        f"qemu-img map --output=json --image-opts "
        f"driver=nbd,server.type=unix,server.path={socket},"
        f"x-dirty-bitmap=qemu:dirty-bitmap:{name}; pid=$(cat {path}.pid); kill $pid; "
        "while kill -0 $pid 2>&-; do sleep 0.02; done",
    )  # fmt: skip
    # A dirty area is told as one without data.
    return [(e["start"], e["length"]) for e in json.loads(text) if not e["data"]]


def flag_of(path, name, flag):
    """Set a flag of a bitmap in the directory of an image."""
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        position = struct.unpack_from(">I", data, 100)[0]
        while (kind := struct.unpack_from(">I", data, position)[0]) != 0x23852875:
            assert kind
            position += 8 + (struct.unpack_from(">I", data, position + 4)[0] + 7) // 8 * 8
        _, _, size, start = struct.unpack_from(">IIQQ", data, position + 8)
        place = start
        while place < start + size:
            _, _, flags, _, _, length, extra = struct.unpack_from(">QIIBBHI", data, place)
            if bytes(data[place + 24 + extra : place + 24 + extra + length]) == name:
                struct.pack_into(">I", data, place + 12, flags | flag)
            place += (24 + extra + length + 7) // 8 * 8
        file.seek(0)
        file.write(data)


@needs("qemu-img", "qemu-nbd")
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("seed", range(2))
async def test_qemu_reads_what_was_stored(bench, tmp_path, cluster_size, seed):
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    size = 8 * MIB + 512 * rng.randrange(100)
    await images.create(bench, str(path), size=size, cluster_size=cluster_size)
    node = await opened(bench, path, discard="unmap")
    user = await bench.graph.attach(node, WRITER)
    dirty.add(bench.graph, "disk", "fine", granularity=512, persistent=True)
    dirty.add(bench.graph, "disk", "off", persistent=True, enabled=False)
    dirty.add(bench.graph, "disk", "transient")
    for _ in range(20):
        offset, length = rng.randrange(size // 512) * 512, 512 * rng.randrange(1, 300)
        length = min(length, size - offset)
        how = rng.choice((user.write, user.write_zeroes, user.discard))
        await how(offset, rng.randbytes(length) if how == user.write else length)
    expected = list(node.find_bitmap("fine").runs())
    await bench.graph.detach(user)
    await bench.graph.delete("disk")
    assert check(path) == {}
    assert set(bitmaps_of(path)) == {"fine", "off"}
    assert bitmaps_of(path)["fine"] == (512, ["auto"])
    assert bitmaps_of(path)["off"][1] == []
    assert dirty_areas(path, "fine") == expected
    again = await opened(bench, path)
    assert list(again.find_bitmap("fine").runs()) == expected
    assert not again.find_bitmap("off").enabled
    await dirty.remove(bench.graph, "disk", "fine")
    await dirty.remove(bench.graph, "disk", "off")
    await bench.graph.delete("disk")
    assert check(path) == {}
    assert bitmaps_of(path) == {}


@needs("qemu-img", "qemu-io")
async def test_we_read_what_qemu_stored(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
    run("qemu-img", "bitmap", "--add", "-g", "4096", path, "one")
    run("qemu-img", "bitmap", "--add", "--disable", path, "two")
    run("qemu-io", "-f", "qcow2", "-c", "write 1M 5000", "-c", "write 9M 1M", path)
    node = await opened(bench, path)
    one = node.find_bitmap("one")
    assert list(one.runs()) == [(MIB, 8192), (9 * MIB, MIB)]
    assert not node.find_bitmap("two").enabled
    # In use on the disk, so that nobody believes it after a crash.
    await bench.graph.delete("disk")
    assert check(path) == {}
    run("qemu-io", "-f", "qcow2", "-c", "write 0 4096", path)
    node = await opened(bench, path)
    assert list(node.find_bitmap("one").runs()) == [(0, 4096), (MIB, 8192), (9 * MIB, MIB)]


@needs("qemu-img")
async def test_a_bitmap_in_use_is_marked_and_not_believed(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
    run("qemu-img", "bitmap", "--add", path, "one")
    run("qemu-img", "bitmap", "--add", path, "two")
    await opened(bench, path)
    crashed = tmp_path / "crashed.qcow2"
    crashed.write_bytes(path.read_bytes())
    assert bitmaps_of(crashed)["one"][1] == ["auto", "in-use"]
    assert check(crashed) == {}
    node = await opened(bench, crashed, "other")
    assert node.find_bitmap("one").inconsistent
    with pytest.raises(BlockError, match="Bitmap 'one' is inconsistent and cannot be used"):
        dirty.clear(bench.graph, "other", "one")
    with pytest.raises(BlockError, match="inconsistent"):
        await bench.graph.resize(node, 20 * MIB)
    await dirty.remove(bench.graph, "other", "one")
    await bench.graph.delete("other")
    # What cannot be believed stays what it was until somebody removes it.
    assert bitmaps_of(crashed) == {"two": (65536, ["auto", "in-use"])}
    assert check(crashed) == {}


@needs("qemu-img")
async def test_a_read_only_image_keeps_its_bitmaps(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
    run("qemu-img", "bitmap", "--add", path, "one")
    before = path.read_bytes()
    await opened(bench, path, read_only=True)
    with pytest.raises(BlockError, match="Bitmap 'one' is readonly and cannot be modified"):
        dirty.clear(bench.graph, "disk", "one")
    await bench.graph.delete("disk")
    assert path.read_bytes() == before


@needs("qemu-img")
async def test_a_snapshot_stores_the_bitmaps_of_the_image_below(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    await images.create(bench, str(path), size=MIB)
    node = await opened(bench, path)
    dirty.add(bench.graph, "disk", "b", persistent=True)
    user = await bench.graph.attach(node, WRITER)
    await user.write(0, b"x" * 512)
    await bench.graph.detach(user)
    await bench.graph.set_read_only(node, True)
    assert bitmaps_of(path) == {"b": (65536, ["auto"])}
    await bench.graph.set_read_only(node, False)
    assert bitmaps_of(path) == {"b": (65536, ["auto", "in-use"])}
    user = await bench.graph.attach(node, WRITER)
    await user.write(65536, b"x" * 512)
    await bench.graph.detach(user)
    await bench.graph.delete("disk")
    assert check(path) == {}
    node = await opened(bench, path)
    assert list(node.find_bitmap("b").runs()) == [(0, 131072)]


@needs("qemu-img")
async def test_bitmaps_follow_a_resize(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    await images.create(bench, str(path), size=10 * MIB)
    node = await opened(bench, path)
    dirty.add(bench.graph, "disk", "b", persistent=True)
    user = await bench.graph.attach(node, WRITER)
    await user.write(9 * MIB, b"x" * 512)
    await user.write(MIB, b"x" * 512)
    await bench.graph.resize(node, 2 * MIB)
    await bench.graph.resize(node, 64 * MIB)
    await user.write(63 * MIB, b"x")
    await bench.graph.detach(user)
    await bench.graph.delete("disk")
    assert check(path) == {}
    node = await opened(bench, path)
    assert list(node.find_bitmap("b").runs()) == [(MIB, 65536), (63 * MIB, 65536)]


@needs("qemu-img")
@pytest.mark.parametrize("backing", [10, 300, 800])
@pytest.mark.parametrize("cluster_size", [2048, 65536])
async def test_the_backing_name_survives_the_extension(bench, tmp_path, backing, cluster_size):
    name = os.path.join(*(["d" * 50] * (backing // 51 + 1)))[:backing].rstrip("/")
    path = tmp_path / "disk.qcow2"
    run(
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name,
        "-o", f"cluster_size={cluster_size}", path, "1M",
    )  # fmt: skip
    for _ in range(2):
        await opened(bench, path, backing=None)
        dirty.add(bench.graph, "disk", "b", persistent=True)
        await bench.graph.delete("disk")
        assert images.backing_of(str(path)) == name
        assert "b" in bitmaps_of(path)
        await opened(bench, path, backing=None)
        await dirty.remove(bench.graph, "disk", "b")
        await bench.graph.delete("disk")
        assert images.backing_of(str(path)) == name
        assert bitmaps_of(path) == {}
    run("qemu-img", "check", "-q", "--image-opts", f"driver=qcow2,backing=,file.filename={path}")


@needs("qemu-img")
async def test_no_room_for_the_extension_is_said_at_once(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    run(
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "d" * 1000,
        "-o", "cluster_size=2048", path, "1M",
    )  # fmt: skip
    await opened(bench, path, backing=None)
    with pytest.raises(BlockError, match="persistent in 'disk': No space left on device"):
        dirty.add(bench.graph, "disk", "b", persistent=True)


async def test_what_cannot_be_stored(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    await images.create(bench, str(path), size=MIB, version=2)
    await opened(bench, path)
    message = "Can't make bitmap 'b' persistent in 'disk': Cannot store dirty bitmaps in qcow2 v2"
    with pytest.raises(BlockError, match=message):
        dirty.add(bench.graph, "disk", "b", persistent=True)
