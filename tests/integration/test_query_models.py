"""What the queries answer is what query-qmp-schema says that they answer."""

import shutil
import subprocess

import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.qmp.block_info import BlockDeviceInfo, BlockInfo, BlockStats
from tests.support.daemon import DaemonProcess

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


@pytest.fixture
def qmp(tmp_path):
    def run(*command):
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=30)

    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M")
    run("qemu-img", "snapshot", "-c", "first", "base.qcow2")
    backing = ("-b", "base.qcow2", "-F", "qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", *backing, "top.qcow2")
    run("qemu-img", "bitmap", "--add", "top.qcow2", "kept")
    drive = "file=top.qcow2,if=virtio,format=qcow2,node-name=disk"
    null = "driver=null-co,node-name=null,size=1048576"
    with DaemonProcess(tmp_path, "--drive", drive, "--blockdev", null) as daemon:
        yield daemon.qmp()


def test_answers_fit_their_models(qmp):
    qmp("block-dirty-bitmap-add", node="disk", name="new")
    qmp("block-stream", device="virtio0", speed=1)
    found = []
    for flat in (False, True):
        found += [parse(BlockDeviceInfo, n) for n in qmp("query-named-block-nodes", flat=flat)]
        assert [parse(BlockInfo, d).device for d in qmp("query-block", flat=flat)] == ["virtio0"]
    for nodes in (False, True):
        assert [parse(BlockStats, s) for s in qmp("query-blockstats", query_nodes=nodes)]
    disk = next(node for node in found if node.node_name == "disk")
    assert {bitmap.name for bitmap in disk.dirty_bitmaps} >= {"kept", "new"}
    assert disk.image.backing_image.snapshots[0].name == "first"


def test_a_member_nobody_described_is_noticed(qmp):
    node = qmp("query-named-block-nodes")[0]
    with pytest.raises(BlockError, match="'colour' is unexpected"):
        parse(BlockDeviceInfo, {**node, "colour": "red"})
    del node["image"]["virtual-size"]
    with pytest.raises(BlockError, match=r"'image\.virtual-size' is missing"):
        parse(BlockDeviceInfo, node)
