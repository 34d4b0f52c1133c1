"""Whole QMP sessions: the same replies and events, in the same order, as from QEMU's programs.

Nodes and exports are compared with qemu-storage-daemon, drives and the human monitor with QEMU
itself, which then has neither a machine nor a guest.
"""

import os
import shutil
import subprocess

import pytest

from tests.support.peer import Peer
from tests.support.warm import LIVEBLOCKD

MONITOR = ("--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m")
QEMU = ("-machine", "none", "-display", "none", "-nodefaults", "-S",
        "-qmp", "unix:qmp.sock,server=on,wait=off")  # fmt: skip
SIZE = 8 << 20


def make_chain(directory):
    directory.mkdir()
    backing = []
    for name, write in (("base", "0 2M"), ("mid", "1M 2M"), ("top", "2M 64k")):
        for command in (
            ["qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{name}.qcow2", str(SIZE)],
            ["qemu-io", "-f", "qcow2", "-c", f"write -P 7 {write}", f"{name}.qcow2"],
        ):
            subprocess.run(
                command, cwd=directory, check=True, stdout=subprocess.DEVNULL, timeout=30
            )
        backing = ["-b", f"{name}.qcow2", "-F", "qcow2"]
    return directory


def settled(log):
    """The answer to job-cancel next to its command: QEMU's own events may overtake it or not."""
    log = list(log)
    for number, entry in enumerate(log):
        if entry.get("execute") == "job-cancel":
            answer = next(i for i in range(number + 1, len(log)) if "event" not in log[i])
            log.insert(number + 1, log.pop(answer))
    return log


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """compared(session, theirs, ours): runs both, compares the transcripts message by message."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    for name in ("qemu-img", "qemu-io"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")

    def compare(session, theirs, ours):
        program = shutil.which(theirs[0])
        if program is None:
            pytest.skip(f"{theirs[0]} is not installed")
        logs = []
        for name, command in (("theirs", (program, *theirs[1:])), ("ours", ours)):
            with Peer(make_chain(tmp_path / name), *command) as peer:
                session(peer)
            logs.append(peer.log)
        expected, found = map(settled, logs)
        for number, pair in enumerate(zip(expected, found, strict=False)):
            assert pair[1] == pair[0], f"message {number}, after {found[:number][-2:]}"
        assert len(found) == len(expected)

    return compare


def add(peer, number, backing, read_only):
    """An image as libvirt adds it: two nodes, every link by name."""
    name = ("top", "mid", "base")[number - 1]
    both = {"cache": {"direct": False, "no-flush": False}, "discard": "unmap"}
    storage, image = f"libvirt-{number}-storage", f"libvirt-{number}-format"
    members = {"filename": f"{name}.qcow2", "node_name": storage, "auto_read_only": True}
    peer.do("blockdev-add", driver="file", **members, **both)
    members = {"file": storage, "node_name": image, "read_only": read_only, "backing": backing}
    peer.do("blockdev-add", driver="qcow2", **members, **both)


def live_merge(peer):
    add(peer, 3, None, True)
    add(peer, 2, "libvirt-3-format", True)
    add(peer, 1, "libvirt-2-format", False)
    for flat in (True, False):
        peer.do("query-named-block-nodes", flat=flat)
    peer.do("query-block")
    peer.do("query-blockstats", query_nodes=True)
    peer.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    peer.do("block-export-add", type="nbd", id="e", node_name="libvirt-1-format", writable=True)
    peer.do("query-block-exports")
    peer.do("block-stream", device="libvirt-1-format", job_id="pull", base_node="libvirt-3-format",
            auto_finalize=False, auto_dismiss=False)  # fmt: skip
    peer.until("BLOCK_JOB_PENDING")
    peer.do("query-jobs")
    peer.do("query-block-jobs")
    peer.do("job-dismiss", id="pull")
    peer.do("job-finalize", id="pull")
    peer.until("JOB_STATUS_CHANGE", status="concluded")
    peer.do("query-jobs")
    peer.do("query-block-jobs")
    peer.do("job-dismiss", id="pull")
    peer.do("query-jobs")
    peer.do("query-block-exports")
    peer.do("blockdev-del", node_name="libvirt-2-format")
    peer.do("blockdev-del", node_name="libvirt-1-format")
    peer.do("block-stream", device="libvirt-1-format", job_id="-")
    peer.do("block-stream", device="libvirt-1-format", job_id="all", speed=1)
    peer.do("job-cancel", id="all")
    peer.until("JOB_STATUS_CHANGE", id="all", status="null")
    peer.do("block-export-del", id="e")
    peer.until("BLOCK_EXPORT_DELETED")
    peer.do("blockdev-del", node_name="libvirt-1-format")
    peer.do("nbd-server-stop")
    peer.do("nbd-server-stop")
    peer.do("quit")


def test_live_merge_as_libvirt_does_it(compared):
    compared(live_merge, ("qemu-storage-daemon", *MONITOR), (*LIVEBLOCKD, *MONITOR))


def live_copy(peer):
    for command in ("query-block", "query-blockstats"):
        peer.do(command)
    peer.do("block-stream", device="virtio0", base="base.qcow2", speed=65536)
    for command in ("query-block", "query-blockstats", "query-block-jobs"):
        peer.do(command)
    for line in ("info block", "info block -v", "info block -n", "info block virtio0",
                 "info block-jobs", "info block nosuch"):  # fmt: skip
        peer.hmp(line)
    peer.hmp("block_job_set_speed virtio0 0")
    peer.until("JOB_STATUS_CHANGE", status="null")
    peer.do("query-block")
    for line in ("snapshot_blkdev virtio0 copy.qcow2 qcow2", "snapshot_blkdev nosuch x",
                 "snapshot_blkdev virtio0", "snapshot_blkdev virtio0 no/such.qcow2 qcow2",
                 "snapshot_blkdev virtio0 x.img bogus", "info block", "block_stream",
                 "block_stream nosuch", "block_job_cancel virtio0", "block_job_pause",
                 "help block_stream", "nosuch", "info nosuch"):  # fmt: skip
        peer.hmp(line)
    peer.log.clear()  # the events below are the second ones of their kind
    peer.hmp("block_stream virtio0")
    peer.until("JOB_STATUS_CHANGE", status="null")
    peer.do("query-block")
    peer.hmp("block_resize virtio0 16M")
    peer.hmp("block_resize virtio0 x")
    peer.hmp("drive_del virtio0")
    peer.do("query-block")


def test_live_copy_of_a_drive_in_both_monitors(compared):
    drive = "if=none,id=virtio0,file=top.qcow2"
    compared(
        live_copy,
        ("qemu-system-x86_64", *QEMU, "-drive", drive),
        (*LIVEBLOCKD, "--drive", drive, "--qmp", "qmp.sock"),
    )
