"""Snapshots of real qcow2 images under a writing guest, and what is left when they fail."""

import asyncio
import json
import os
import random
import shutil
import subprocess
from errno import ENOSPC

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.graph import snapshot
from liveblockd.graph.snapshot import NewImageMode
from liveblockd.qapi import parse
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from tests.support.world import graph_in

load_all_drivers()
pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not installed",
)
MIB = 1 << 20
READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def content(name):
    with open(name, "rb") as file:
        return file.read()


def files():
    return os.listdir()


def hold(name):
    """A qemu-io that has the image open for writing."""
    command = ["qemu-io", "-f", "qcow2", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"read 0 512\n")
    process.stdin.flush()
    while b"read 512/512" not in process.stdout.readline():
        assert process.poll() is None
    return process


def image_info(name):
    return json.loads(run("qemu-img", "info", "-U", "--output=json", name))


@pytest.fixture
async def graph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with graph_in(tmp_path) as graph:
        yield graph


async def add(graph, name, **members):
    value = {"driver": "qcow2", "node-name": name, **members}
    return await graph.open(parse(BlockdevOptions, value))


async def disk(graph, filename="disk.qcow2", size=4 * MIB):
    run("qemu-img", "create", "-q", "-f", "qcow2", filename, str(size))
    node = await add(graph, "disk", file={"driver": "file", "filename": filename})
    return node, await graph.attach(node, READ_WRITE, name="drive0")


async def take(graph, filename, name=None, **members):
    members = {"device": "drive0", "node_name": None, "console": lambda line: None} | members
    await snapshot.snapshot_sync(graph, snapshot_file=filename, snapshot_node_name=name, **members)


@pytest.mark.parametrize("seed", range(3))
async def test_guest_writes_through_a_row_of_snapshots(graph, seed):
    """Every image holds what was written up to its snapshot; the top holds all."""
    rng = random.Random(seed)
    _, user = await disk(graph)
    model = bytearray(4 * MIB)
    busy = True

    async def guest(part):
        # Its own quarter of the disk, so that the order of its writes is known.
        while busy:
            offset = part * MIB + rng.randrange(MIB - 70000)
            data = rng.randbytes(rng.choice([1, 512, 4096, 70000]))
            if not user.write_nowait(offset, data):
                await user.write(offset, data)
            model[offset : offset + len(data)] = data
            await asyncio.sleep(0)

    async def taker():
        for number in range(5):
            await asyncio.sleep(0.02)
            await take(graph, f"s{number}.qcow2", f"s{number}")

    guests = [asyncio.create_task(guest(part)) for part in range(4)]
    await asyncio.wait_for(taker(), 30)
    busy = False
    await asyncio.wait_for(asyncio.gather(*guests), 30)
    assert bytes(await user.read(0, 4 * MIB)) == bytes(model), f"{seed=}"
    await graph.close()
    for name in ("disk", "s0", "s1", "s2", "s3", "s4"):
        run("qemu-img", "check", f"{name}.qcow2")
    run("qemu-img", "convert", "-O", "raw", "s4.qcow2", "all.raw")
    assert content("all.raw") == bytes(model), f"{seed=}"


async def test_the_new_image_is_like_qemus(graph):
    lines = []
    await disk(graph)
    await take(graph, "s.qcow2", "s", console=lines.append)
    assert lines == [
        "Formatting 's.qcow2', fmt=qcow2 cluster_size=65536 extended_l2=off "
        "compression_type=zlib size=4194304 backing_file=disk.qcow2 backing_fmt=qcow2 "
        "lazy_refcounts=off refcount_bits=16"
    ]
    run(
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2",
        "theirs.qcow2", "4M",
    )  # fmt: skip
    ours, theirs = image_info("s.qcow2"), image_info("theirs.qcow2")
    for found in (ours, theirs):
        for member in ("filename", "actual-size"):
            found.pop(member)
        found.pop("children", None)
    assert ours == theirs


@pytest.mark.parametrize("where", ["other", "other/deep", "."])
async def test_the_overlay_leads_to_its_backing_file_from_anywhere(graph, tmp_path, where):
    os.makedirs(where, exist_ok=True)
    _node, user = await disk(graph)
    await user.write(0, b"kept" * 128)
    await take(graph, f"{where}/s.qcow2", "s")
    written = image_info(f"{where}/s.qcow2")["backing-filename"]
    assert written == ("disk.qcow2" if where == "." else str(tmp_path / "disk.qcow2"))
    assert graph.find("s").filename == f"{where}/s.qcow2"
    await graph.close()
    again = await add(graph, "again", file={"driver": "file", "filename": f"{where}/s.qcow2"})
    assert bytes(await again.read(0, 4)) == b"kept"
    run("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read 0 512", f"{where}/s.qcow2")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(ENOSPC, "No space left on device"),
            "Could not create 's.qcow2': No space left on device",
        ),
        (BlockError("no"), "no"),
    ],
)
async def test_the_overlay_cannot_be_made(graph, monkeypatch, error, message):
    node, user = await disk(graph)
    await user.write(0, b"x" * 512)

    async def no_room(file, **options):
        await file.write(0, b"half")
        raise error

    monkeypatch.setattr("liveblockd.formats.qcow2.create.create_qcow2", no_room)
    with pytest.raises(BlockError) as caught:
        await take(graph, "s.qcow2", "s")
    assert caught.value.message == message
    assert "s.qcow2" not in files()
    assert user.node is node and not node.read_only and len(graph.nodes) == 2
    await user.write(0, b"y" * 512)


async def test_a_failing_flush_leaves_the_guest_where_it_was(graph, monkeypatch):
    node, user = await disk(graph)
    await user.write(0, b"x" * 512)

    async def fail():
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(node.driver, "flush", fail)
    with pytest.raises(OSError):
        await take(graph, "s.qcow2", "s")
    monkeypatch.undo()
    assert user.node is node and not node.read_only and "s" not in graph.nodes
    await user.write(512, b"y" * 512)
    await user.flush()
    assert "s.qcow2" not in files()


async def test_an_image_in_use_is_not_overwritten(graph, tmp_path):
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2")
    node = await add(graph, "disk", file={"driver": "file", "filename": "disk.qcow2"})
    await graph.attach(node, READ_WRITE, name="drive0")
    before = content("base.qcow2")
    for name in ("base.qcow2", "./base.qcow2", str(tmp_path / "disk.qcow2")):
        with pytest.raises(BlockError) as caught:
            await take(graph, name)
        assert "lock" in caught.value.message
    assert content("base.qcow2") == before
    run("qemu-img", "create", "-q", "-f", "qcow2", "held.qcow2", "1M")
    holder = hold("held.qcow2")
    try:
        with pytest.raises(BlockError) as caught:
            await take(graph, "held.qcow2")
        assert "lock" in caught.value.message
    finally:
        holder.communicate(b"quit\n", timeout=10)


async def test_existing_overlay(graph):
    _node, user = await disk(graph)
    await user.write(0, b"x" * 512)
    with pytest.raises(BlockError) as caught:
        await take(graph, "absent.qcow2", "s", mode=NewImageMode.EXISTING)
    assert caught.value.message == "Could not open 'absent.qcow2': No such file or directory"
    run(
        "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2",
        "-o", "cluster_size=4k", "ready.qcow2", "4M",
    )  # fmt: skip
    await take(graph, "ready.qcow2", "s", mode=NewImageMode.EXISTING)
    assert user.node.driver.cluster_size == 4096 and user.node.filename == "ready.qcow2"
    assert bytes(await user.read(0, 2)) == b"xx"


async def test_locks_move_with_the_snapshot(graph):
    await disk(graph)
    command = ("qemu-io", "-f", "qcow2", "-c", "read 0 512")
    with pytest.raises(subprocess.CalledProcessError):
        run(*command, "-r", "disk.qcow2")
    await take(graph, "s.qcow2", "s")
    run(*command, "-r", "disk.qcow2")
    for name in ("disk.qcow2", "s.qcow2"):
        with pytest.raises(subprocess.CalledProcessError):
            run(*command, name)
    await graph.close()
    for name in ("disk.qcow2", "s.qcow2"):
        run(*command, name)


@pytest.mark.parametrize("through", ["the same name", "a link", "its backing file"])
async def test_an_image_in_use_is_not_overwritten_where_there_are_no_locks(graph, through):
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2")
    os.link("disk.qcow2", "link.qcow2")

    def file(name):
        return {"driver": "file", "filename": os.path.abspath(name), "locking": "off"}

    backing = {"driver": "qcow2", "file": file("base.qcow2")}
    node = await add(graph, "disk", file=file("disk.qcow2"), backing=backing)
    user = await graph.attach(node, READ_WRITE, name="drive0")
    await user.write(MIB, b"x" * MIB)
    await user.flush()
    name = {
        "the same name": "disk.qcow2",
        "a link": "link.qcow2",
        "its backing file": "base.qcow2",
    }[through]
    before = content(name)
    with pytest.raises(BlockError, match="the file is in use as node"):
        await take(graph, name, "s")
    assert content(name) == before and set(files()) == {"base.qcow2", "disk.qcow2", "link.qcow2"}
    assert bytes(await user.read(0, 2 * MIB)) == b"\x07" * MIB + b"x" * MIB
