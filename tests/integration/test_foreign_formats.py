"""Disks of other hypervisors: what qemu-img wrote is read here, damaged ones are refused."""

import asyncio
import contextlib
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.graph.graph import Graph
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import ExtentKind
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.daemon import DaemonProcess
from tests.support.descriptors import descriptors
from tests.support.qcow2_images import needs, run

load_all_drivers()
pytest.importorskip("dissect.hypervisor", reason="the extra 'formats' is not installed")
pytestmark = needs("qemu-img", "qemu-io")
MIB = 1 << 20
KINDS = [
    ("vmdk", ""),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "block_size=33554432"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vpc", "force_size=on"),
]


def raw_content(size=37 * MIB, seed=5):
    """Data, holes and text (which compresses) in pieces of all lengths."""
    chance = random.Random(seed)
    parts, left = [], size
    while left:
        length = min(left, chance.choice((512, 4096, 70000, 1 << 20, 3 << 20)) // 512 * 512)
        kind = chance.randrange(3)
        data = chance.randbytes(length) if kind == 0 else b"liveblockd " * (length // 11 + 1)
        parts.append(bytes(length) if kind == 1 else data[:length])
        left -= length
    return b"".join(parts)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign") / "raw"
    path.write_bytes(raw_content())
    return path


@pytest.fixture(scope="module")
def qcow(source, tmp_path_factory):
    return converted(source, tmp_path_factory.mktemp("qcow"), "qcow", "").read_bytes()


def converted(source, directory, driver, options):
    path = directory / f"image.{driver}"
    extra = ["-o", options] if options else []
    run("qemu-img", "convert", "-f", "raw", "-O", driver, *extra, source, path)
    return path


def members(driver, path, **more):
    file = {"driver": "file", "filename": str(path)}
    return {"driver": driver, "node-name": "n", "read-only": True, "file": file} | more


async def with_node(options, function):
    workers = WorkerPool()
    graph = Graph(Environment(workers))
    try:
        node = await asyncio.wait_for(graph.open(parse(BlockdevOptions, options)), 20)
        return await asyncio.wait_for(function(node), 60)
    finally:
        await graph.close()
        workers.close()


async def refusal(options):
    with pytest.raises(BlockError) as caught:
        await with_node(options, lambda node: node.read(0, 512))
    return caught.value.message


@pytest.mark.parametrize(("driver", "options"), KINDS, ids=lambda value: value or "plain")
async def test_reads_what_qemu_img_wrote(source, tmp_path, driver, options):
    path = converted(source, tmp_path, driver, options)
    run("qemu-img", "convert", "-f", driver, "-O", "raw", path, tmp_path / "back")
    expected = (tmp_path / "back").read_bytes()

    async def compare(node):
        assert node.length == len(expected)
        whole = b"".join(
            [
                bytes(await node.read(at, min(5 * MIB, node.length - at)))
                for at in range(0, node.length, 5 * MIB)
            ]
        )
        assert whole == expected
        chance = random.Random(1)
        for _ in range(60):  # across the borders of blocks, at any byte
            at = max(0, chance.randrange(1, 37) * MIB - chance.randrange(5000))
            length = min(chance.choice((1, 700, 9000, 3 * MIB)), node.length - at)
            assert bytes(await node.read(at, length)) == expected[at : at + length]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # workers get in each other's way as often as they can
        try:
            several = [node.read(at * MIB // 4, MIB // 4) for at in range(100)]
            for number, data in enumerate(await asyncio.gather(*several)):
                start = number * MIB // 4
                assert bytes(data) == expected[start : start + MIB // 4]
        finally:
            sys.setswitchinterval(interval)
        with pytest.raises(OSError):
            await node.driver.write(0, b"x")
        extents = await node.map(0, node.length)
        assert sum(extent.length for extent in extents) == node.length

    before = path.read_bytes()
    await with_node(members(driver, path), compare)
    assert path.read_bytes() == before


@pytest.mark.parametrize("driver", ["vmdk", "vhdx", "vdi", "vpc"])
async def test_writing_is_refused(source, tmp_path, driver):
    path = converted(source, tmp_path, driver, "")
    message = await refusal(members(driver, path) | {"read-only": False})
    assert message == f"Driver '{driver}' can only be used for read-only devices"


async def test_the_library_is_missing(source, tmp_path, monkeypatch):
    path = converted(source, tmp_path, "vdi", "")
    monkeypatch.setitem(sys.modules, "dissect.hypervisor.disk.vdi", None)
    assert "pip install 'liveblockd[formats]'" in await refusal(members("vdi", path))


def test_the_library_is_imported_only_when_it_is_wanted():
    code = (
        "import sys; from liveblockd.daemon.drivers import load_all_drivers; load_all_drivers(); "
        "assert not any(name.startswith('dissect') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


GIB = 1 << 30
#: around the places where a disk of 5 GiB is split
PLACES = (0, 70000, 2 * GIB - 4096, 2 * GIB, 4 * GIB - 512, 4 * GIB + 123 * 512, 5 * GIB - 4096)


async def same_in_qemu(path, driver, places, tmp_path, length=4096):
    """What is read at the places, and beside them, is what qemu-img reads."""

    async def read(node):
        found = {}
        for place in places:
            for at in (place - length, place):
                if 0 <= at <= node.length - length:
                    found[at] = bytes(await node.read(at, length))
        return found

    run("qemu-img", "convert", "-f", driver, "-O", "raw", path, tmp_path / "back")
    with (tmp_path / "back").open("rb") as file:
        for at, data in (await with_node(members(driver, path), read)).items():
            file.seek(at)
            assert data == file.read(length), at


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
async def test_a_vmdk_of_several_files(tmp_path, subformat):
    path = tmp_path / "image.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", path, "5G")
    assert len(list(tmp_path.iterdir())) == 4
    commands = []
    for number, place in enumerate(PLACES):
        commands += ["-c", f"write -P {number + 1} {place // 512 * 512} 4096"]
    run("qemu-io", "-f", "vmdk", *commands, path)
    await same_in_qemu(path, "vmdk", [p // 512 * 512 for p in PLACES], tmp_path)

    async def across(node):
        data = bytes(await node.read(2 * GIB - 1000, 3000))
        assert data == b"\3" * 1000 + b"\4" * 2000
        for at in (0, 2 * GIB - 65536):
            extents = await node.map(at, node.length - at)
            assert sum(extent.length for extent in extents) <= node.length - at
        return node.length, len(node.children)

    assert await with_node(members("vmdk", path), across) == (5 * GIB, 4)


async def test_a_flat_vmdk(source, tmp_path):
    path = converted(source, tmp_path, "vmdk", "subformat=monolithicFlat")
    expected = raw_content()

    async def read(node):
        assert bytes(await node.read(0, node.length)) == expected

    await with_node(members("vmdk", path), read)
    flat = tmp_path / "image-flat.vmdk"
    with flat.open("r+b") as file:
        file.truncate(MIB)
    assert "cut off" in await refusal(members("vmdk", path))
    flat.unlink()
    assert "No such file or directory" in await refusal(members("vmdk", path))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "nbd:localhost:10809", "json:{}"])
async def test_a_descriptor_cannot_name_files_elsewhere(source, tmp_path, name):
    path = converted(source, tmp_path, "vmdk", "subformat=monolithicFlat")
    text = path.read_bytes().replace(b"image-flat.vmdk", name.encode())
    path.write_bytes(text)
    assert "does not lie beside the descriptor" in await refusal(members("vmdk", path))


async def test_a_name_is_not_looked_for_where_the_daemon_runs(source, tmp_path, monkeypatch):
    path = converted(source, tmp_path, "vmdk", "subformat=monolithicFlat")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "image-flat.vmdk").rename(elsewhere / "image-flat.vmdk")
    monkeypatch.chdir(elsewhere)
    assert "No such file or directory" in await refusal(members("vmdk", path))


async def test_a_chain_of_vmdks(source, tmp_path):
    """What the child has, what only its parent has, and what it covers with zeros."""
    base = converted(source, tmp_path, "vmdk", "")
    child = tmp_path / "child.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", "-o", "zeroed_grain=on",
        child)  # fmt: skip
    run("qemu-io", "-f", "vmdk", "-c", "write -P 9 1M 100k", "-c", "write -z 5M 640k", child)
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", child, tmp_path / "back")
    expected = (tmp_path / "back").read_bytes()

    async def read(node):
        assert node.backing.driver.driver_name == "vmdk"
        assert bytes(await node.read(0, node.length)) == expected
        kinds = {extent.kind for extent in await node.map(0, node.length)}
        assert kinds == {ExtentKind.UNALLOCATED, ExtentKind.COMPRESSED}

    await with_node(members("vmdk", child), read)
    run("qemu-io", "-f", "vmdk", "-c", "write -P 1 0 512", base)  # it has another CID from now on

    async def stale(node):
        assert bytes(await node.read(1 * MIB, 512)) == b"\x09" * 512
        with pytest.raises(OSError, match="not what it was"):
            await node.read(0, 512)

    await with_node(members("vmdk", child), stale)
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", child, tmp_path / "back", status=1)


@pytest.mark.parametrize("compressed", [False, True])
async def test_qcow(source, tmp_path, compressed):
    path = tmp_path / "image.qcow"
    options = ["-c"] if compressed else []
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow", *options, source, path]
    subprocess.run(command, check=not compressed, timeout=60)  # 7.2 says 1 though all is written
    expected = raw_content()
    run("qemu-img", "convert", "-f", "qcow", "-O", "raw", path, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == expected

    async def read(node):
        assert node.length == len(expected)
        for at in range(0, node.length, 5 * MIB):
            data = bytes(await node.read(at, min(5 * MIB, node.length - at)))
            assert data == expected[at : at + len(data)]
        chance = random.Random(3)
        for _ in range(60):
            at = chance.randrange(len(expected))
            length = min(chance.choice((1, 700, 9000, MIB)), len(expected) - at)
            assert bytes(await node.read(at, length)) == expected[at : at + length]
        with pytest.raises(OSError):
            await node.driver.write(0, b"x")

    before = path.read_bytes()
    await with_node(members("qcow", path), read)
    assert path.read_bytes() == before
    assert "read-only" in await refusal(members("qcow", path) | {"read-only": False})


async def test_a_chain_of_qcow(source, tmp_path):
    overlay = tmp_path / "overlay.qcow"
    run("qemu-img", "create", "-q", "-f", "qcow", "-b", source, "-F", "raw", overlay)
    run("qemu-io", "-f", "qcow", "-c", "write -P 9 3M 70k", "-c", "write -P 8 36M 512", overlay)
    expected = bytearray(raw_content())
    expected[3 * MIB : 3 * MIB + 70 * 1024] = b"\x09" * (70 * 1024)
    expected[36 * MIB : 36 * MIB + 512] = b"\x08" * 512

    async def read(node):
        assert bytes(await node.read(0, node.length)) == expected

    await with_node(members("qcow", overlay), read)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, b"\0\0\0\2", "qcow (v1) does not support qcow version 2"),
        (24, bytes(8), "Image size is too small"),
        (24, b"\x7f" + bytes(7), "Image too large"),
        (32, b"\x08", "Cluster size must be between"),
        (33, b"\x0e", "L2 table size must be between"),
        (36, b"\0\0\0\1", "AES-CBC encrypted qcow images"),
        (36, b"\0\0\0\2", "invalid encryption method"),
        (40, b"\0" + b"\xff" * 7, "a table lies outside the image"),
        (8, bytes(7) + b"\x60\0\1\0\0", "Backing file name too long"),
    ],
)
async def test_a_field_of_a_qcow_header(qcow, tmp_path, offset, value, message):
    path = tmp_path / "image.qcow"
    data = bytearray(qcow)
    data[offset : offset + len(value)] = value
    path.write_bytes(data)
    assert message in await refusal(members("qcow", path))


@pytest.mark.parametrize("driver", ["parallels", "qed", "bochs", "dmg", "cloop"])
async def test_formats_that_are_not_there(tmp_path, driver):
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4096)
    with pytest.raises(BlockError, match=r"does not accept value|Unknown driver"):
        await with_node(members(driver, path), lambda node: node.read(0, 512))


async def test_a_differencing_vhd_is_refused(source, tmp_path):
    path = converted(source, tmp_path, "vpc", "")
    data = bytearray(path.read_bytes())
    data[-512 + 60 : -512 + 64] = struct.pack(">I", 4)
    path.write_bytes(data)
    assert "neither a fixed nor a dynamic" in await refusal(members("vpc", path))


async def test_a_vhdx_whose_log_is_not_empty_is_refused(source, tmp_path):
    path = converted(source, tmp_path, "vhdx", "")
    data = bytearray(path.read_bytes())
    for offset in (64 << 10, 128 << 10):
        data[offset + 48] = 1
    path.write_bytes(data)
    assert "log" in await refusal(members("vhdx", path))


async def test_a_grain_that_expands_without_end(source, tmp_path):
    """The first grain of a stream: 16 MiB of zeros where 64 KiB should be."""
    path = converted(source, tmp_path, "vmdk", "subformat=streamOptimized")
    data = bytearray(path.read_bytes())
    grain = struct.unpack_from("<Q", data, 20)[0]
    first = data.index(b"\x78", 128 * 512)  # the first zlib header behind the overhead
    bomb = zlib.compress(bytes(16 * MIB), 9)
    struct.pack_into("<I", data, first - 4, len(bomb))
    data[first : first + len(bomb)] = bomb
    path.write_bytes(data)
    assert grain == 128

    at = next(i for i, byte in enumerate(raw_content()) if byte) // 65536 * 65536

    async def read(node):
        tracemalloc.start()
        try:
            data = await node.read(at, 65536)
            return bytes(data), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    data, peak = await with_node(members("vmdk", path), read)
    assert data == bytes(65536), "not the grain that was replaced"
    assert peak < 2 * MIB


@pytest.mark.parametrize(
    ("driver", "options"), [*KINDS, ("qcow", "")], ids=lambda value: value or "plain"
)
async def test_damaged_images_open_or_not_read_or_not(source, tmp_path, driver, options):
    """Headers and tables of random bytes, cut off: BlockError or OSError, soon, with all closed."""
    good = converted(source, tmp_path, driver, options).read_bytes()
    chance = random.Random(f"{driver} {options}")
    path = tmp_path / "bad"
    places = [0, 16, 64 << 10, 128 << 10, 192 << 10, 256 << 10, 1 << 20, 2 << 20, len(good) - 512]
    before = descriptors()
    for number in range(25):
        data = bytearray(good[: 4 << 20] + good[-512:])
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.choice(places) + chance.randrange(512)
            width = chance.choice((1, 4, 8))
            if at + width <= len(data):
                value = chance.choice((0, 1 << 62, (1 << 64) - 1, chance.getrandbits(64)))
                data[at : at + width] = value.to_bytes(8, "little")[:width]
        path.write_bytes(data[: chance.randrange(len(data))] if number % 5 == 0 else data)

        async def read(node):
            for at in (0, node.length // 2, max(0, node.length - 4096)):
                await node.read(at, min(4096, node.length - at))

        with contextlib.suppress(BlockError, OSError):
            await with_node(members(driver, path), read)
        assert (descriptors() - before).total() <= 1


def test_streaming_from_a_vmdk_base(source, tmp_path):
    """[vmdk] <- [overlay], merged in a running daemon."""
    base = converted(source, tmp_path, "vmdk", "")
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "vmdk", overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 3M 70k", overlay)
    expected = bytearray(raw_content())
    expected[3 * MIB : 3 * MIB + 70 * 1024] = b"\7" * (70 * 1024)
    with DaemonProcess(tmp_path) as daemon:
        qmp = daemon.qmp()
        file = {"driver": "file", "filename": str(overlay)}
        qmp("blockdev-add", driver="qcow2", node_name="disk", file=file)
        qmp("block-stream", job_id="merge", device="disk")
        event = qmp.wait("BLOCK_JOB_COMPLETED", device="merge")
        assert "error" not in event["data"]
        qmp("blockdev-del", node_name="disk")
        daemon.stop()
    base.unlink()
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", overlay, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(expected)
    assert "backing file" not in run("qemu-img", "info", overlay)
