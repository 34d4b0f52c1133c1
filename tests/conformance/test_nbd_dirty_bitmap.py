"""``x-dirty-bitmap`` of NBD nodes, beside qemu-img: block status that tells of a dirty bitmap."""

from __future__ import annotations

import contextlib
import json

import pytest

from tests.simulation.bench import Bench
from tests.support.daemon import DaemonProcess
from tests.support.imagetool import ours, qemu, qemu_io
from tests.support.nbd_peer import server
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io", "qemu-nbd")
MIB = 1 << 20


def served_by_qemu(directory):
    return server(
        directory, "qemu-nbd", "-t", "-r", "-e", "4", "-k", directory / "nbd.sock", "-f", "qcow2",
        "-A", "-B", "b", "-x", "disk", "disk.qcow2",
    )  # fmt: skip


@contextlib.contextmanager
def served_by_us(directory):
    with DaemonProcess(
        directory,
        "--blockdev", "driver=qcow2,node-name=disk,read-only=on,file.driver=file,"
                      "file.filename=disk.qcow2",
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "type=nbd,id=e,node-name=disk,bitmaps.0=b,allocation-depth=on",
    ):  # fmt: skip
        yield


@pytest.fixture(params=["qemu-nbd", "liveblockd"])
def served(request, tmp_path, monkeypatch):
    """A disk with a bitmap: what was written before it, and after it."""
    monkeypatch.chdir(tmp_path)
    qemu("create", "-f", "qcow2", "disk.qcow2", "8M")
    qemu_io(tmp_path / "disk.qcow2", "write -P 1 0 3M")
    qemu("bitmap", "--add", "-g", "64k", "disk.qcow2", "b")
    qemu_io(
        tmp_path / "disk.qcow2", "write -P 2 1M 128k", "write -z 2M 64k", "write -P 3 5M 1M",
        "write -P 4 8380416 512",
    )  # fmt: skip
    peer = served_by_qemu if request.param == "qemu-nbd" else served_by_us
    with peer(tmp_path):
        yield


def options(context):
    shown = f",x-dirty-bitmap={context}" if context else ""
    return f"driver=nbd,server.type=unix,server.path=nbd.sock,export=disk{shown}"


@pytest.mark.parametrize("context", ["", "qemu:dirty-bitmap:b"])
def test_the_same_map(served, context):
    words = ["map", "--image-opts", options(context)]
    assert ours(*words) == qemu(*words)
    words.append("--output=json")
    found, expected = ours(*words), qemu(*words)
    assert (found[0], found[2]) == (expected[0], expected[2])
    if not found[0]:
        assert json.loads(found[1]) == json.loads(expected[1])


def test_a_bitmap_that_is_not_there(served):
    words = ["map", "--image-opts", options("qemu:dirty-bitmap:none")]
    status, _, said = ours(*words)
    assert status == qemu(*words)[0] == 1
    assert said.endswith("requested x-dirty-bitmap qemu:dirty-bitmap:none not found\n")


def test_what_is_dirty_is_said_to_be_neither_data_nor_zeros(served):
    _, out, _ = ours("map", "--image-opts", "--output=json", options("qemu:dirty-bitmap:b"))
    dirty = [(e["start"], e["length"]) for e in json.loads(out) if not e["data"]]
    assert dirty == [
        (MIB, 128 << 10), (2 * MIB, 64 << 10), (5 * MIB, MIB), (8 * MIB - (64 << 10), 64 << 10)
    ]  # fmt: skip


def test_a_copy_of_it_has_all_bytes(served):
    """qemu-img takes what is dirty for zeros here, and leaves it out."""
    assert (
        ours("convert", "--image-opts", "-O", "raw", options("qemu:dirty-bitmap:b"), "copy")[0] == 0
    )
    assert ours("compare", "copy", "disk.qcow2", "-f", "raw", "-F", "qcow2", "-U")[0] == 0


async def test_block_status_of_an_export(served):
    """Who exports the node tells of the bitmap, too, as holes that do not read as zeros."""
    bench = Bench()
    node = await bench.open(
        driver="nbd", node_name="n", server={"type": "unix", "path": "nbd.sock"}, export="disk",
        read_only=True, x_dirty_bitmap="qemu:dirty-bitmap:b",
    )  # fmt: skip
    user = await bench.graph.attach(node)
    runs = await user.block_status(0, 2 * MIB)
    assert [(run.length, run.zero, run.hole) for run in runs] == [
        (MIB, False, False), (128 << 10, False, True), (MIB - (128 << 10), False, False)
    ]  # fmt: skip
    await bench.close()
