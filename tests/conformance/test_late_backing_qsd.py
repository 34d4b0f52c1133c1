"""Copies to images that are opened without the backing file that their header names.

libvirt and oVirt move a disk so: the top layer is mirrored to an image without its chain, the
layers below are copied by other means meanwhile, and installed by ``blockdev-snapshot`` before the
switch. The same requests to qemu-storage-daemon and to liveblockd.
"""

import shutil

import pytest

from tests.conformance.test_against_qsd import act, bitmap, disk, run
from tests.conformance.test_random_requests_qsd import directories
from tests.support.in_step import InStep

__all__ = ["directories"]

CREATE = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", "below.qcow2", "-F", "qcow2",
          "copy.qcow2")  # fmt: skip


def image(name, *more):
    file = f"file.driver=file,file.filename={name}.qcow2"
    return ("--blockdev", ",".join((f"driver=qcow2,node-name={name}", file, *more)))


def guest(both, found, *commands):
    args = [part for command in commands for part in ("-c", command)]
    for directory in found:
        run(directory, "qemu-io", "-f", "raw", *args, "nbd+unix:///g?socket=nbd.sock")


def begin(both, node):
    both.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    both.do("block-export-add", type="nbd", id="g", node_name=node, name="g", writable=True)
    both.do("blockdev-add", driver="qcow2", node_name="copy", backing=None,
            file={"driver": "file", "filename": "copy.qcow2"})  # fmt: skip


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
@pytest.mark.parametrize("by_transaction", [True, False])
@pytest.mark.parametrize("sync", ["top", "full"])
def test_the_backing_chain_comes_late(sync, by_transaction, mode, directories):
    for directory in directories:
        shutil.copy(directory / "base.qcow2", directory / "below.qcow2")
        run(directory, *CREATE)
    with InStep(*directories, *image("base"), *image("mid", "backing=base")) as both:
        begin(both, "mid")
        both.do("blockdev-mirror", job_id="m", device="mid", target="copy", sync=sync,
                copy_mode=mode, auto_dismiss=False)  # fmt: skip
        guest(both, directories, "write -P 9 100k 10k", "write -P 7 1536k 4k", "discard 512k 64k")
        both.do("blockdev-add", driver="qcow2", node_name="below", read_only=True, backing=None,
                file={"driver": "file", "filename": "below.qcow2"})  # fmt: skip
        place = act("blockdev-snapshot", node="below", overlay="copy")
        if by_transaction:
            both.do("transaction", actions=[bitmap("add", "copy", "written"), place])
        else:
            both.do("blockdev-snapshot", node="base", overlay="copy")  # the guest's
            both.do("blockdev-snapshot", **place["data"])
        guest(both, directories, "write -P 6 200k 10k", "write -P 6 1700k 1k")
        for peer in both.peers:
            peer.do("job-complete", id="m")
            peer.until("JOB_STATUS_CHANGE", id="m", status="concluded")
        both.do("job-dismiss", id="m")
        # QEMU's copy has zeros around what a guest wrote where this was copied at once (7.2).
        right = directories[1:] if (sync, mode) == ("top", "write-blocking") else directories
        guest(both, right, "write -P 4 300k 10k", "read -P 9 100k 10k", "read -P 5 0 100k",
              "read -P 7 1536k 4k", "read -P 6 200k 10k", "read -P 4 300k 10k")  # fmt: skip
        for directory in directories:
            run(directory, "qemu-img", "convert", "-O", "raw", "nbd+unix:///g?socket=nbd.sock",
                "seen.raw")  # fmt: skip
        both.do("block-export-del", id="g")
    images = [directory / "seen.raw" for directory in right]
    assert images[0].read_bytes() == images[-1].read_bytes()
    for directory in directories:
        run(directory, "qemu-img", "compare", "-q", "seen.raw", "copy.qcow2")
        run(directory, "qemu-img", "check", "-q", "copy.qcow2")


@pytest.mark.parametrize("how", ["background", "write-blocking", "backup"])
def test_a_full_copy_hides_what_the_header_names(how, directories):
    for directory in directories:
        disk(directory, "src.qcow2", "1 0 64k", "2 1M 100k")
        disk(directory, "below.qcow2", "9 0 2M")
        run(directory, *CREATE)
    with InStep(*directories, *image("src")) as both:
        begin(both, "src")
        given = {"job_id": "j", "device": "src", "target": "copy", "sync": "full"}
        if how == "backup":
            both.do("blockdev-backup", **given)
        else:
            both.do("blockdev-mirror", **given, copy_mode=how)
            guest(both, directories, "write -P 3 300k 10k", "write -z 1M 64k", "discard 0 64k",
                  "write -P 4 1500k 10k")  # fmt: skip
            both.do("block-job-cancel", device="j")
        both.do("block-export-del", id="g")
    for directory in directories:
        run(directory, "qemu-img", "compare", "-q", "src.qcow2", "copy.qcow2")
