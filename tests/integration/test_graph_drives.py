"""Drives and chains of real images: opened as QEMU opens them, mapped as QEMU maps them."""

import json
import os
import random
import shutil
import subprocess
import time

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.graph import info, snapshot
from liveblockd.graph.drives import DriveOptions, delete_drive, open_drive
from liveblockd.graph.opening import MAX_DEPTH
from liveblockd.qapi import parse
from liveblockd.storage.options import BlockdevOptions
from tests.support.world import graph_in

load_all_drivers()
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not installed",
)
MIB = 1 << 20


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def create(name, size=MIB, backing=None, **options):
    words = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        words += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    if backing:
        words += ["-b", backing, "-F", "qcow2"]
    run(*words, name, str(size))


@pytest.fixture
async def graph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with graph_in(tmp_path) as graph:
        yield graph


async def drive(graph, **members):
    value = {}
    for name, held in members.items():
        value[name.rstrip("_").replace("__", ".").replace("_", "-")] = held
    return await open_drive(graph, DriveOptions.split(value))


async def refused(awaitable):
    with pytest.raises(BlockError) as caught:
        await awaitable
    return caught.value.message


@needs_qemu
async def test_names_of_drives(graph):
    for number in range(8):
        create(f"{number}.img")
    names = []
    for number, options in enumerate(
        (
            {}, {}, {}, {"if_": "virtio"}, {"if_": "virtio"}, {"if_": "none"},
            {"if_": "virtio", "index": "7"}, {"id": "mine"},
        )
    ):  # fmt: skip
        one = await drive(graph, file=f"{number}.img", format="qcow2", **options)
        names.append(one.name)
        assert graph.lookup(one.name, None) is one.node
    assert names == [
        "ide0-hd0", "ide0-hd1", "ide1-hd0", "virtio0", "virtio1", "none0", "virtio7", "mine",
    ]  # fmt: skip
    assert "mine" in await refused(drive(graph, file="0.img", format="qcow2", id="mine"))
    await delete_drive(graph, "mine")
    assert await refused(delete_drive(graph, "mine")) == "Device 'mine' not found"
    await drive(graph, file="7.img", format="qcow2", id="mine")


@needs_qemu
async def test_what_a_drive_holds(graph):
    create("base.img")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "base.img")
    create("top.img", backing="base.img")
    one = await drive(graph, file="top.img", if_="virtio")
    assert one.node.name.startswith("#block") and not one.read_only
    assert bytes(await one.read(0, 2)) == b"\1\1"
    described = info.block_info(one)
    assert described["device"] == "virtio0"
    assert described["inserted"]["file"] == "top.img"
    assert described["inserted"]["backing_file"] == "base.img"
    assert described["inserted"]["backing_file_depth"] == 1
    assert described["inserted"]["image"]["backing-image"]["filename"] == "base.img"
    with pytest.raises(subprocess.CalledProcessError):
        run("qemu-io", "-f", "qcow2", "-c", "read 0 512", "top.img")
    await one.write(0, b"x" * 512)
    await delete_drive(graph, "virtio0")
    assert not graph.nodes
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x78 0 512", "top.img")


@needs_qemu
@pytest.mark.parametrize(
    ("cache", "direct", "no_flush", "through"),
    [
        ("writeback", False, False, False),
        ("writethrough", False, False, True),
        ("unsafe", False, True, False),
        ({"no-flush": "on"}, False, True, False),
    ],
)
async def test_cache_modes(graph, cache, direct, no_flush, through):
    create("a.img")
    one = await drive(graph, file="a.img", format="qcow2", cache=cache)
    assert one.writethrough is through
    for node in (one.node, one.node.file):
        assert (node.options.cache_direct, node.options.cache_no_flush) == (direct, no_flush)
    assert info.block_info(one)["inserted"]["cache"]["writeback"] is not through


@needs_qemu
async def test_sizes_have_suffixes(graph):
    create("top.img")
    sized = {"l2-cache-size": "1M", "refcount-cache-size": "0.25M"}
    one = await drive(graph, file="top.img", format="qcow2", **sized)
    assert one.node.options.l2_cache_size == 1 << 20
    assert one.node.options.refcount_cache_size == 1 << 18
    await delete_drive(graph, one.name)
    window = {"file": "top.img", "format": "raw", "offset": "64k", "size": "128k"}
    one = await drive(graph, **window)
    assert one.length == 1 << 17
    message = await refused(drive(graph, **window | {"size": "lots"}))
    assert message == "Parameter 'size' expects a non-negative number below 2^64"


@needs_qemu
async def test_backing_options(graph):
    create("base.img")
    create("other.img")
    create("mid.img", backing="base.img")
    create("top.img", backing="mid.img")
    one = await drive(graph, file="top.img", backing={"file": {"filename": "other.img"}})
    assert one.node.backing.filename == "other.img" and one.node.backing.backing is None
    await delete_drive(graph, one.name)
    one = await drive(
        graph,
        file="top.img",
        backing={"node-name": "m", "backing": {"node-name": "b", "file": {"locking": "off"}}},
    )
    assert one.node.backing.name == "m" and one.node.backing.filename == "mid.img"
    assert graph.find("b").file.options.locking == "off"
    await delete_drive(graph, one.name)
    await graph.open(
        parse(
            BlockdevOptions,
            {
                "driver": "qcow2",
                "node-name": "base",
                "read-only": True,
                "file": {"driver": "file", "filename": "base.img"},
            },
        )
    )
    one = await drive(graph, file="top.img", format="qcow2", backing="base")
    assert one.node.backing.name == "base"
    await delete_drive(graph, one.name)
    assert [node.filename for node in graph.nodes.values()] == ["base.img", "base.img"]


async def test_probing_raw_warns_and_guards(graph, tmp_path, capfd):
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    one = await drive(graph, file="disk.raw")
    assert one.node.driver_class.driver_name == "raw" and one.node.probed
    assert "disk.raw" in capfd.readouterr().err
    with pytest.raises(PermissionError):
        await one.write(0, b"QFI\xfb\0\0\0\3" + bytes(504))
    await one.write(0, b"hello" + bytes(507))
    await delete_drive(graph, one.name)
    one = await drive(graph, file="disk.raw", format="raw")
    await one.write(0, b"QFI\xfb\0\0\0\3" + bytes(504))
    assert capfd.readouterr().err == ""


@needs_qemu
async def test_temporary_snapshot(graph, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    create("a.img")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", "a.img")
    before = (tmp_path / "a.img").read_bytes()
    one = await drive(graph, file="a.img", snapshot="on")
    assert not one.read_only
    await one.write(100, b"new")
    await one.flush()
    assert bytes(await one.read(99, 5)) == b"\5new\5"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.img"]
    await delete_drive(graph, one.name)
    assert (tmp_path / "a.img").read_bytes() == before


@needs_qemu
async def test_names_with_a_protocol(graph):
    create("a.img")
    one = await drive(graph, file="blkdebug::a.img", format="qcow2")
    assert one.node.filename == "blkdebug::a.img"
    await delete_drive(graph, one.name)
    text = json.dumps({"driver": "qcow2", "file.driver": "file", "file.filename": "a.img"})
    one = await drive(graph, file=f"json:{text}")
    assert one.node.filename == "a.img"
    await delete_drive(graph, one.name)
    one = await drive(graph, file='json:{"file.filename":"a.img"}')
    assert (one.node.filename, one.node.driver_class.driver_name) == ("a.img", "qcow2")
    await delete_drive(graph, one.name)
    one = await drive(graph, file="null-co://", format="raw")
    assert one.node.filename == "null-co://"
    assert "Unknown protocol 'gopher'" in await refused(drive(graph, file="gopher://x"))


async def test_refusals_leave_nothing(graph, tmp_path):
    (tmp_path / "a.img").write_bytes(bytes(MIB))
    for members, message in (
        ({"file": "no.img"}, "Could not open 'no.img': No such file or directory"),
        ({"file": "a.img", "format": "qcow2"}, "Image is not in qcow2 format"),
        ({"file": "a.img", "format": "nope"}, "Unknown driver 'nope'"),
        ({"file": "a.img", "cache": "fast"}, "invalid cache option"),
        ({"file": "a.img", "format": "raw", "colour": "red"}, "Parameter 'colour' is unexpected"),
        ({"file": "json:{}"}, "Must specify either driver or file"),
        ({"file": 'json:{"file":7}'}, "Invalid parameter type for 'file'"),
        ({"file": 'json:{"driver":[]}'}, "Unknown driver '[]'"),
        ({"file": "a.img", "if_": "usb"}, "Parameter 'if' does not accept value 'usb'"),
        ({"format": "raw"}, "A drive needs a file"),
        ({"file": "a.img", "throttling.iops": "5"}, "Parameter 'throttling.iops' is unexpected"),
        ({"file": "a.img", "bps__rd": "5x"}, "Parameter 'bps.rd' is unexpected"),
    ):

        async def attempt(members=members):
            await drive(graph, **members)

        assert message in await refused(attempt())
        assert not graph.nodes and not graph.backends
    one = await drive(graph, file="a.img", format="raw", **{"throttling.iops-total": "0"})
    assert one.name == "ide0-hd0"


def _deep_chain(directory, depth):
    """Images 000.img (the top) to the base, without running qemu-img for each."""
    create(f"{depth - 1:03}.img")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 64k", f"{depth - 1:03}.img")
    run(
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "@@@.img", "-F", "qcow2",
        "overlay", str(MIB),
    )  # fmt: skip
    overlay = (directory / "overlay").read_bytes()
    assert overlay.count(b"@@@.img") == 1
    for number in range(depth - 1):
        named = overlay.replace(b"@@@", b"%03d" % (number + 1))
        (directory / f"{number:03}.img").write_bytes(named)


@needs_qemu
async def test_a_format_is_closed_before_its_children_when_the_open_is_undone(graph, caplog):
    create("disk.img")
    members = {"driver": "file", "node-name": "file", "filename": "disk.img"}
    await graph.open(parse(BlockdevOptions, members))
    for file in ("file", {"driver": "file", "filename": "disk.img"}):
        members = {"driver": "qcow2", "node-name": "top", "file": file, "backing": "nowhere"}
        with pytest.raises(BlockError, match="backing file: Cannot find device='nowhere'"):
            await graph.open(parse(BlockdevOptions, members))
        if file == "file":
            await graph.delete("file")
    assert graph.nodes == {}
    assert caplog.records == []
    run("qemu-io", "-f", "qcow2", "-c", "write 0 4k", "disk.img")  # nobody holds it


@needs_qemu
async def test_the_deepest_chain_can_be_used(graph, tmp_path):
    _deep_chain(tmp_path, MAX_DEPTH)
    one = await drive(graph, file="000.img", format="qcow2", id="d")
    assert bytes(await one.read(10, 2)) == b"\5\5"
    await one.write(11, b"new")
    await one.flush()
    assert bytes(await one.read(10, 5)) == b"\5new\5"
    assert [tuple(r) for r in await one.block_status(0, MIB)] == [
        (65536, False, False, 1),
        (MIB - 65536, True, True, 0),
    ]
    query = info.Query()
    described = [info.block_device_info(n, query=query) for n in graph.nodes.values()]
    assert len(described) == 2 * MAX_DEPTH
    with pytest.raises(BlockError, match=f"deeper than {MAX_DEPTH} images"):
        await snapshot.snapshot_sync(
            graph, device="d", node_name=None, snapshot_file="more.img", console=lambda line: None
        )
    assert "more.img" not in os.listdir()
    assert bytes(await one.read(10, 5)) == b"\5new\5"


@needs_qemu
async def test_read_only_drive(graph, tmp_path):
    create("a.img")
    one = await drive(graph, file="a.img", read_only="on")
    assert one.read_only and one.node.file.read_only
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", "a.img")
    other = await drive(graph, file="a.img", readonly="on", id="other")
    cd = await drive(graph, file="a.img", media="cdrom")
    assert other.read_only and cd.name == "ide0-cd1" and cd.read_only


@needs_qemu
@pytest.mark.skipif(
    shutil.which("nbdinfo") is None or shutil.which("qemu-nbd") is None,
    reason="nbdinfo and qemu-nbd are not installed",
)
@pytest.mark.parametrize("seed", range(4))
async def test_block_status_is_what_qemus_server_says(graph, seed):
    rng = random.Random(seed)
    depth = rng.randint(1, 4)
    top_size = 4 * MIB
    for i in reversed(range(depth)):
        size = top_size if i == 0 else rng.choice([top_size, 2 * MIB, 5 * MIB + 512])
        below = f"{i + 1}.img" if i + 1 < depth else None
        create(f"{i}.img", size, below, cluster_size=rng.choice([4096, 65536]))
        commands = []
        for _ in range(6):
            verb = rng.choice(["write -P 7", "write -P 7", "write -z", "discard"])
            offset = rng.randrange(0, size - 200000, 512)
            commands += ["-c", f"{verb} {offset} {rng.randrange(512, 200000, 512)}"]
        run("qemu-io", "-f", "qcow2", *commands, f"{i}.img")
    one = await drive(graph, file="0.img", format="qcow2", read_only="on")
    runs = await one.block_status(0, top_size)
    assert sum(r.length for r in runs) == top_size
    flags = _merged((r.length, r.hole + 2 * r.zero) for r in runs)
    depths = _merged((r.length, r.depth) for r in runs)
    assert flags == _nbd_map("base:allocation"), f"{seed=}"
    assert depths == _nbd_map("qemu:allocation-depth"), f"{seed=}"


def _merged(pieces):
    found = []
    for length, value in pieces:
        if found and found[-1][1] == value:
            found[-1] = (found[-1][0] + length, value)
        else:
            found.append((length, value))
    return found


def _nbd_map(context):
    """What QEMU's own server says of 0.img."""
    socket = "nbd.sock"
    server = subprocess.Popen(
        ["qemu-nbd", "-r", "-A", "-f", "qcow2", "-k", os.path.abspath(socket), "0.img"]
    )
    try:
        for _ in range(100):
            if os.path.exists(socket):
                break
            time.sleep(0.02)
        uri = f"nbd+unix:///?socket={socket}"
        mapped = json.loads(run("nbdinfo", f"--map={context}", "--json", uri))
    finally:
        server.terminate()
        server.wait(10)
    return _merged((m["length"], m["type"]) for m in mapped)
