"""Images that are handed to another process and taken back (blockdev-set-active)."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import time
from errno import EPERM

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.graph import activation, dirty
from liveblockd.qapi import parse
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from tests.support.daemon import DaemonProcess, QmpError
from tests.support.qsd import QsdProcess
from tests.support.world import graph_in

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not installed",
)
KIB = 1024
MIB = 1 << 20
READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE


def run(*command, check=True):
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def create(name, *options, size="10M"):
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, name, size)


def read_at(name, offset, length):
    with open(name, "rb") as file:
        return os.pread(file.fileno(), length, offset)


def write_at(name, offset, data):
    with open(name, "r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def qemu_io(name, *commands, check=True):
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-f", "qcow2", *words, name, check=False)
    failed = done.returncode or "failed" in done.stdout + done.stderr
    assert not (check and failed), done.stdout + done.stderr
    return done.stdout + done.stderr


def nbd_io(socket, export, *commands):
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", "-f", "raw", *words, f"nbd+unix:///{export}?socket={socket}", check=False)
    return done.stdout + done.stderr


def active(qmp):
    return {n["node-name"]: n["active"] for n in qmp("query-named-block-nodes", flat=True)}


def error(qmp, command, /, **arguments):
    with pytest.raises(QmpError) as caught:
        qmp(command, **arguments)
    return str(caught.value)


def members(number, **more):
    file = {"driver": "file", "filename": f"{number}.qcow2", "node-name": f"{number}-file"}
    return {"driver": "qcow2", "node-name": number, "file": file, **more}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
async def graph(place):
    load_all_drivers()
    async with graph_in(place) as graph:
        yield graph


async def add(graph, **options):
    return await graph.open(parse(BlockdevOptions, options))


# -- the words


def test_exports_of_inactive_nodes(place):
    """An export makes its node active, unless it may be inactive; what it then answers."""
    create("disk.qcow2")
    with DaemonProcess(place, "--nbd-server", "addr.type=unix,addr.path=nbd.sock") as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", **members("disk", active=False))
        assert active(qmp) == {"disk": False, "disk-file": False}
        export = {"id": "e", "type": "nbd", "node-name": "disk", "writable": True}
        qmp("block-export-add", **export)
        assert active(qmp) == {"disk": True, "disk-file": True}

        refused = "Failed to inactivate node: Operation not permitted"
        assert error(qmp, "blockdev-set-active", node_name="disk", active=False) == refused
        refused = "Failed to inactivate all nodes: Operation not permitted"
        assert error(qmp, "blockdev-set-active", active=False) == refused
        assert active(qmp) == {"disk": True, "disk-file": True}
        assert "failed" not in nbd_io("nbd.sock", "disk", "write -P 1 0 64k", "read -P 1 0 64k")
        qmp("block-export-del", id="e")

        qmp("block-export-add", **{**export, "writable": False})  # who only reads does not mind
        qmp("blockdev-set-active", node_name="disk", active=False)
        qmp("block-export-del", id="e")
        qmp("block-export-add", **export, allow_inactive=True)
        assert active(qmp) == {"disk": False, "disk-file": False}
        said = nbd_io(
            "nbd.sock", "disk", "read -P 1 0 64k", "write 0 64k", "write -z 0 64k",
            "write -zu 0 64k", "discard 0 64k", "flush", "map",
        )  # fmt: skip
        assert "read 65536/65536" in said
        assert said.count("write failed: Operation not permitted") == 3
        assert "discard failed: Operation not permitted" in said
        assert "allocation status: Operation not permitted" in said
        qmp("blockdev-set-active", active=True)
        assert "failed" not in nbd_io("nbd.sock", "disk", "read -P 1 0 64k", "write -P 2 0 64k")
        qmp("blockdev-set-active", active=False)  # and with a client that was there all the time
        assert active(qmp) == {"disk": False, "disk-file": False}
    qemu_io("disk.qcow2", "read -P 2 0 64k")


def test_parents_and_children(place):
    create("disk.qcow2")
    with DaemonProcess(place) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", **members("disk"))
        both = lambda state: {"disk": state, "disk-file": state}  # noqa: E731
        said = error(qmp, "blockdev-set-active", node_name="disk-file", active=False)
        assert said == "Node has active parent node"
        said = error(qmp, "blockdev-set-active", node_name="nobody", active=False)
        assert said == "Failed to find node with node-name='nobody'"
        assert active(qmp) == both(True)
        qmp("blockdev-set-active", node_name="disk", active=False)
        assert active(qmp) == both(False)
        qmp("blockdev-set-active", node_name="disk-file", active=True)
        assert active(qmp) == {"disk": False, "disk-file": True}
        qmp("blockdev-set-active", node_name="disk-file", active=False)

        filtered = {"driver": "raw", "file": "disk", "node-name": "above"}
        said = error(qmp, "blockdev-add", **filtered)
        assert said == "Inactive 'disk' can't be a file child of active 'above'"
        qmp("blockdev-add", **filtered, active=False)
        qmp("blockdev-set-active", node_name="above", active=True)  # its children before
        assert active(qmp) == {**both(True), "above": True}
        qmp("blockdev-del", node_name="above")
        inline = members("other")
        inline["file"]["active"] = False
        create("other.qcow2")
        said = error(qmp, "blockdev-add", **inline)
        assert said == "Inactive 'other-file' can't be a file child of active 'other'"


def test_what_cannot_be_done_to_inactive_nodes(place):
    """The words are those of QEMU; afterwards everything is as it was."""
    create("disk.qcow2")
    create("target.qcow2")
    create("snap.qcow2", "-b", "disk.qcow2", "-F", "qcow2")
    create("snap2.qcow2", "-b", "snap.qcow2", "-F", "qcow2")
    with DaemonProcess(place) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", **members("disk", active=False))
        qmp("blockdev-add", **members("target"))
        said = error(qmp, "block_resize", node_name="disk", size=16 * MIB)
        assert said == "Permission 'resize' unavailable on inactive node"

        qmp("blockdev-add", **members("snap", backing=None))
        qmp("blockdev-snapshot", node="disk", overlay="snap")
        assert not active(qmp)["snap"]  # for it stands on what is inactive
        qmp("blockdev-del", node_name="snap")
        qmp("blockdev-add", **members("snap", backing=None, active=False))
        qmp("blockdev-snapshot", node="disk", overlay="snap")

        def inactive(child, role, above="#block000"):
            return f"Inactive '{child}' can't be a {role} child of active '{above}'"

        said = error(qmp, "block-stream", job_id="j", device="snap", filter_node_name="f")
        assert said == "Could not create node: " + inactive("snap", "file", "f")
        said = error(qmp, "block-commit", job_id="j", device="snap", filter_node_name="f")
        assert said == inactive("snap", "backing", "f")
        qmp("blockdev-add", **members("snap2", backing="snap", active=False))
        commit = {"job_id": "j", "device": "snap2", "top_node": "snap", "filter_node_name": "f"}
        assert error(qmp, "block-commit", **commit) == inactive("snap", "backing", "f")
        qmp("blockdev-set-active", node_name="disk", active=True)
        assert error(qmp, "block-commit", **commit) == inactive("snap", "backing", "f")
        copy = {"job_id": "j", "device": "snap2", "target": "target", "sync": "full"}
        copy["filter_node_name"] = "f"
        assert error(qmp, "blockdev-mirror", **copy) == inactive("snap2", "backing", "f")

        qmp("blockdev-set-active", node_name="snap2", active=True)
        qmp("blockdev-set-active", node_name="target", active=False)
        said = error(qmp, "blockdev-mirror", **copy)
        assert said == "Permission 'write' unavailable on inactive node"
        said = error(qmp, "blockdev-backup", **copy)
        assert said == "Could not create node: " + inactive("target", "target", "f")
        qmp("blockdev-set-active", node_name="snap2", active=False)
        qmp("blockdev-set-active", node_name="target", active=True)
        said = error(qmp, "blockdev-backup", **copy)
        assert said == "Could not create node: " + inactive("snap2", "file", "f")

        assert {name for name, state in active(qmp).items() if state} == {"target", "target-file"}
        unavailable = "Permission 'write' unavailable on inactive node"
        said = error(qmp, "blockdev-snapshot-internal-sync", device="snap2", name="s")
        assert said == unavailable
        bitmap = {"node": "snap2", "name": "b", "persistent": True}
        assert error(qmp, "block-dirty-bitmap-add", **bitmap).endswith(unavailable)
        assert "inactive" in error(qmp, "x-liveblock-check", job_id="c", node="snap2")
        assert error(qmp, "change-backing-file", device="snap2", image_node_name="snap2",
                     backing_file="x") == "Block node is read-only"  # fmt: skip
        assert qmp("query-jobs") == []
        assert not [n for n in active(qmp) if n.startswith("#") or n == "f"]
        qmp("blockdev-set-active", active=True)
        assert all(active(qmp).values())
        qmp("block-commit", job_id="j", device="snap2", top_node="snap")
        qmp.wait("BLOCK_JOB_COMPLETED")
    for name in ("disk", "snap", "snap2", "target"):
        run("qemu-img", "check", f"{name}.qcow2")


def test_nodes_that_a_job_is_at_stay_active(place):
    create("disk.qcow2")
    create("target.qcow2")
    with DaemonProcess(place) as daemon:
        qmp = daemon.qmp()
        for name in ("disk", "target"):
            qmp("blockdev-add", **members(name))
        qmp("blockdev-mirror", job_id="j", device="disk", target="target", sync="full")
        said = error(qmp, "blockdev-set-active", active=False)
        assert said == "Failed to inactivate all nodes: Operation not permitted"
        said = error(qmp, "blockdev-set-active", node_name="target", active=False)
        assert said == "Failed to inactivate node: Operation not permitted"
        assert all(active(qmp).values())


# -- the bytes, between processes


@pytest.mark.parametrize("seed", [1, 2])
def test_a_disk_goes_from_one_daemon_to_another_and_back(place, seed):
    """As a shared disk does when its guest migrates."""
    create("disk.qcow2", size="64M")
    (place / "a").mkdir()
    (place / "b").mkdir()
    image = os.path.abspath("disk.qcow2")

    def options(*more):
        return (
            "--blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"
            + "".join(more),
            "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
            "--export", "nbd,id=e,node-name=disk,writable=true,allow-inactive=true",
        )  # fmt: skip

    rng = random.Random(seed)
    with (
        DaemonProcess(place / "a", *options()) as one,
        DaemonProcess(place / "b", *options(",active=off")) as other,
    ):
        sides = [(one.qmp(), "a/nbd.sock"), (other.qmp(), "b/nbd.sock")]
        said = error(sides[1][0], "blockdev-set-active", active=True)
        assert said == 'Failed to get "write" lock'
        assert not any(active(sides[1][0]).values())
        model = {}
        for _ in range(6):
            (qmp, socket), (next_qmp, next_socket) = sides
            commands = []
            for _ in range(20):
                at, pattern = rng.randrange(1024) * 64 * KIB, rng.randrange(1, 256)
                model[at] = pattern
                commands.append(f"write -P {pattern} {at} 64k")
            said = nbd_io(socket, "disk", *commands)
            assert "failed" not in said, said
            assert "failed: Operation not permitted" in nbd_io(next_socket, "disk", "write 0 512")
            qmp("blockdev-set-active", active=False)
            assert "failed: Operation not permitted" in nbd_io(socket, "disk", "write 0 512")
            next_qmp("blockdev-set-active", active=True)
            reads = [f"read -P {pattern} {at} 64k" for at, pattern in model.items()]
            said = nbd_io(next_socket, "disk", *reads)
            assert "failed" not in said, said
            sides.reverse()
        for qmp, _ in sides:
            assert "BLOCK_IMAGE_CORRUPTED" not in {event["event"] for event in qmp.events}
    run("qemu-img", "check", image)
    qemu_io(image, *(f"read -P {pattern} {at} 64k" for at, pattern in model.items()))


@pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed"
)
def test_qemu_takes_a_disk_over_and_gives_it_back(place):
    """It writes, grows the disk, and keeps the bitmap that is stored in the image."""
    create("disk.qcow2")
    with DaemonProcess(
        place, "--blockdev", json.dumps(members("disk")),
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "nbd,id=e,node-name=disk,writable=true,allow-inactive=true",
    ) as daemon:  # fmt: skip
        qmp = daemon.qmp()
        qmp("block-dirty-bitmap-add", node="disk", name="kept", persistent=True)
        qmp("block-dirty-bitmap-add", node="disk", name="ours")
        assert "failed" not in nbd_io("nbd.sock", "disk", "write -P 1 0 64k")
        assert 'Failed to get "write" lock' in qemu_io("disk.qcow2", "write 0 512", check=False)

        qmp("blockdev-set-active", active=False)
        names = {b["name"] for n in qmp("query-named-block-nodes")
                 for b in n.get("dirty-bitmaps", ())}  # fmt: skip
        assert names == {"ours"}
        (place / "q").mkdir()
        image = members("theirs")
        image["file"]["filename"] = os.path.abspath("disk.qcow2")
        with QsdProcess(
            place / "q", "--blockdev", json.dumps(image),
            "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
            "--export", "nbd,id=e,node-name=theirs,writable=true",
        ) as qsd:  # fmt: skip
            said = nbd_io("q/nbd.sock", "theirs", "read -P 1 0 64k", "write -P 2 5M 64k")
            assert "failed" not in said, said
            assert "failed" not in nbd_io("nbd.sock", "disk", "read -P 1 0 64k")
            # Not while it has it.
            said = error(qmp, "blockdev-set-active", active=True)
            assert said == 'Failed to get "write" lock'
            assert not any(active(qmp).values())
            theirs = qsd.qmp()
            theirs("block-export-del", id="e", mode="hard")
            time.sleep(0.2)
            theirs("block_resize", node_name="theirs", size=20 * MIB)
        qmp("blockdev-set-active", active=True)
        (node,) = (n for n in qmp("query-named-block-nodes") if n["node-name"] == "disk")
        assert node["image"]["virtual-size"] == 20 * MIB
        bitmaps = {b["name"]: b for b in node["dirty-bitmaps"]}
        assert bitmaps["kept"]["count"] == 2 * 64 * KIB
        assert bitmaps["kept"]["persistent"] and bitmaps["kept"]["recording"]
        assert bitmaps["ours"]["count"] == 20 * MIB  # it cannot know
        said = nbd_io("nbd.sock", "disk", "read -P 2 5M 64k", "write -P 3 15M 64k")
        assert "failed" not in said, said
    run("qemu-img", "check", "disk.qcow2")
    qemu_io("disk.qcow2", "read -P 1 0 64k", "read -P 2 5M 64k", "read -P 3 15M 64k")
    bitmaps = json.loads(run("qemu-img", "info", "--output=json", "disk.qcow2").stdout)
    (kept,) = bitmaps["format-specific"]["data"]["bitmaps"]
    assert kept["flags"] == ["auto"]  # and not in-use


def test_a_chain_is_read_anew(place):
    """Another process commits the overlay into its base: maps and tables of before are nothing."""
    create("base.qcow2")
    create("disk.qcow2", "-b", "base.qcow2", "-F", "qcow2")
    qemu_io("base.qcow2", "write -P 1 0 10M")
    qemu_io("disk.qcow2", "write -P 2 1M 1M")
    with DaemonProcess(
        place, "--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "nbd,id=e,node-name=disk,writable=true,allow-inactive=true",
    ) as daemon:  # fmt: skip
        qmp = daemon.qmp()
        assert "failed" not in nbd_io("nbd.sock", "disk", "read -P 1 0 1M", "read -P 2 1M 1M")
        qmp("blockdev-set-active", active=False)
        run("qemu-img", "commit", "-q", "disk.qcow2")
        # All of the base is written anew elsewhere, over what our tables point to.
        qemu_io("base.qcow2", "write -P 7 0 10M", "discard 0 10M", "write -P 1 8M 1M",
                "write -P 3 0 1M", "write -P 2 1M 1M")  # fmt: skip
        qmp("blockdev-set-active", active=True)
        said = nbd_io("nbd.sock", "disk", "read -P 3 0 1M", "read -P 2 1M 1M", "read -P 1 8M 1M",
                      "read -P 0 9M 1M", "write -P 4 0 64k", "read -P 4 0 64k")  # fmt: skip
        assert "failed" not in said and "Pattern" not in said, said
    run("qemu-img", "check", "disk.qcow2")
    run("qemu-img", "check", "base.qcow2")


# -- what fails, and what comes at the wrong time


async def test_a_flush_that_fails_leaves_all_active(graph):
    create("disk.qcow2")
    image = {"driver": "file", "filename": "disk.qcow2"}
    fails = {"event": "none", "iotype": "flush", "once": True}
    rules = {"driver": "blkdebug", "image": image, "node-name": "rules", "inject-error": [fails]}
    node = await add(graph, **members("disk", file=rules))
    user = await graph.attach(node, READ_WRITE, allow_inactive=True)
    await user.write(0, b"x" * 512)
    with pytest.raises(BlockError, match="Failed to inactivate node: Input/output error"):
        await activation.inactivate(graph, node)
    assert node.active and all(edge.child.active for edge in node.children.values())
    locked = await asyncio.to_thread(qemu_io, "disk.qcow2", "write 0 512", check=False)
    assert 'Failed to get "write" lock' in locked


@pytest.mark.parametrize("seed", range(3))
async def test_writes_in_flight_end_before_the_image_is_handed_over(graph, seed):
    """What a guest was told is written is there for who takes the image over; nothing comes later.

    Here this is another node of the same process, for locks are of open files, not of processes.
    """
    create("disk.qcow2", size="64M")
    rng = random.Random(seed)
    node = await add(graph, **members("disk"))
    user = await graph.attach(node, READ_WRITE, allow_inactive=True)
    model, refused, busy = {}, 0, True

    async def guest(part):
        nonlocal refused
        while busy:
            offset = (part * 256 + rng.randrange(256)) * 64 * KIB
            data = rng.randbytes(4 * KIB)
            try:
                if not user.write_nowait(offset, data):
                    await user.write(offset, data)
            except OSError as failure:
                assert failure.errno == EPERM
                refused += 1
            else:
                model[offset] = data
            await asyncio.sleep(0)

    guests = [asyncio.create_task(guest(part)) for part in range(4)]
    for _ in range(5):
        await asyncio.sleep(0.02)
        await activation.inactivate(graph, node)
        written = dict(model)
        other = await add(graph, **members("disk", **{"node-name": "other"}, file={
            "driver": "file", "filename": "disk.qcow2"}))  # fmt: skip
        for offset, data in written.items():
            assert bytes(await other.read(offset, len(data))) == data
        at = rng.randrange(1024) * 64 * KIB
        await other.write(at, b"other")
        await graph.delete("other")
        assert model == written
        if at in model:
            model[at] = b"other" + model[at][5:]
        before = refused
        await asyncio.sleep(0)
        await activation.activate(graph, node)
    busy = False
    await asyncio.gather(*guests)
    assert before
    for offset, data in model.items():
        assert bytes(await user.read(offset, len(data))) == data
    await graph.close()
    run("qemu-img", "check", "disk.qcow2")


@pytest.mark.parametrize("steps", [*range(1, 12), 20, 40, 80])
async def test_cancelled_at_any_step(graph, steps):
    """It is all one or all the other, and the next call works."""
    create("disk.qcow2")
    node = await add(graph, **members("disk"))
    user = await graph.attach(node, READ_WRITE, allow_inactive=True)
    await user.write(0, b"x" * 512)
    for wanted in (False, True):
        task = asyncio.create_task(activation.set_active(graph, None, wanted))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len({n.active for n in graph.nodes.values()}) == 1
        assert not graph.lock.locked()
        await activation.set_active(graph, None, wanted)
        assert {n.active for n in graph.nodes.values()} == {wanted}
    await user.write(512, b"y" * 512)
    assert bytes(await user.read(0, 1024)) == b"x" * 512 + b"y" * 512


async def test_an_image_that_cannot_be_opened_again_stays_inactive(graph):
    create("disk.qcow2")
    node = await add(graph, **members("disk"))
    user = await graph.attach(node, READ_WRITE, allow_inactive=True)
    await user.write(0, b"x" * 512)
    await activation.inactivate(graph, node)
    magic = read_at("disk.qcow2", 0, 4)
    write_at("disk.qcow2", 0, b"none")
    with pytest.raises(BlockError, match="Image is not in qcow2 format"):
        await activation.activate(graph, node)
    assert not any(n.active for n in graph.nodes.values())
    raw = ("qemu-io", "-f", "raw", "-c", "write 128k 512", "disk.qcow2")
    await asyncio.to_thread(run, *raw)  # no lock is left
    write_at("disk.qcow2", 0, magic)
    await activation.activate(graph, node)
    assert bytes(await user.read(0, 512)) == b"x" * 512
    await user.write(0, b"y" * 512)


async def test_a_stored_bitmap_whose_name_is_taken(graph):
    """Neither of the two is lost."""
    create("disk.qcow2")
    run("qemu-img", "bitmap", "--add", "disk.qcow2", "b")
    qemu_io("disk.qcow2", "write 0 64k")
    node = await add(graph, **members("disk", active=False))
    dirty.add(graph, "disk", "b")
    with pytest.raises(BlockError, match="Bitmap already exists: b"):
        await activation.activate(graph, node)
    assert not any(n.active for n in graph.nodes.values())
    await dirty.remove(graph, "disk", "b")
    await activation.activate(graph, node)
    (bitmap,) = node.bitmaps
    assert bitmap.persistent and not bitmap.inconsistent and bitmap.to_qmp()["count"] == 64 * KIB


async def test_a_bitmap_that_an_export_has_keeps_the_image(graph):
    create("disk.qcow2")
    node = await add(graph, **members("disk"))
    dirty.add(graph, "disk", "b", persistent=True)
    node.bitmaps[0].busy = True
    with pytest.raises(BlockError, match="Bitmap 'b' is currently in use"):
        await activation.inactivate(graph, node)
    node.bitmaps[0].busy = False
    await activation.inactivate(graph, node)


async def test_read_only_and_raw_nodes(graph):
    run("qemu-img", "create", "-q", "-f", "raw", "raw.img", "1M")
    file = {"driver": "file", "filename": "raw.img", "node-name": "file"}
    node = await add(graph, **{"driver": "raw", "node-name": "disk", "file": file})
    user = await graph.attach(node, READ_WRITE, allow_inactive=True)
    await user.write(0, b"b" * 512)
    await activation.set_active(graph, None, False)
    os.truncate("raw.img", 2 * MIB)
    write_at("raw.img", 0, b"c" * 256)
    await activation.set_active(graph, None, True)
    assert node.length == user.length == 2 * MIB
    assert bytes(await user.read(0, 512)) == b"c" * 256 + b"b" * 256
    await user.write(0, b"d")
    create("ro.qcow2")
    node = await add(graph, **members("ro", **{"read-only": True}))
    await activation.inactivate(graph, node)
    assert not node.active
    await activation.activate(graph, node)
    assert node.active and node.read_only
