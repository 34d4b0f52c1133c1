"""Backups that are fetched over NBD, as libvirt and backup products have them; QEMU's beside.

Checkpoints are bitmaps; of those since the last backup one is merged, and exported with what the
disk held when the backup began: by a scratch image below a backup job, or by image fleecing. What
clients see is compared: block status, dirty areas, bytes.
"""

import json

import pytest

from tests.conformance.test_against_qsd import act, answers, bitmap, make_images, run, same
from tests.support.in_step import missing
from tests.support.peer import Peer
from tests.support.warm import LIVEBLOCKD

MONITOR = ("--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m")
DISK = "driver=qcow2,node-name=disk,file.driver=file,file.filename=d0.qcow2"


def guest(peer, *commands, export="guest"):
    args = [part for command in commands for part in ("-c", command)]
    run(peer.directory, "qemu-io", "-f", "raw", *args, f"nbd+unix:///{export}?socket=nbd.sock")


def seen(peer, export, dirty=None):
    """Block status as ``qemu-img map`` tells it, of equal neighbours one."""
    options = f"driver=nbd,export={export},server.type=unix,server.path=nbd.sock"
    if dirty is not None:
        options += f",x-dirty-bitmap=qemu:dirty-bitmap:{dirty}"
    found = run(peer.directory, "qemu-img", "map", "--output=json", "--image-opts", options)
    runs = []
    for extent in json.loads(found):
        state = (extent["data"], extent["zero"])
        if runs and runs[-1][1] == state:
            runs[-1][0] += extent["length"]
        else:
            runs.append([extent["length"], state])
    peer.log.append({"return": [export, dirty, runs]})
    return runs


def serve(peer, node, name, **more):
    peer.do("block-export-add", type="nbd", id=name, node_name=node, name=name, **more)


def fetch(peer, export, into="fetched.raw"):
    source = f"nbd+unix:///{export}?socket=nbd.sock"
    run(peer.directory, "qemu-img", "convert", "-O", "raw", source, into)


def checkpoints(peer):
    """Two, and what the guest wrote after each."""
    peer.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    serve(peer, "disk", "guest", writable=True)
    peer.do("transaction", actions=[bitmap("add", "disk", "c1", persistent=True)])
    guest(peer, "write -P 9 64k 128k", "write -P 8 1500k 10k", "discard 256k 64k",
          "write -z 700k 70k")  # fmt: skip
    peer.do("transaction", actions=[bitmap("disable", "disk", "c1"),
                                    bitmap("add", "disk", "c2", persistent=True)])  # fmt: skip
    guest(peer, "write -P 7 1800k 64k")
    fetch(peer, "guest", "then.raw")


def scratch(peer):
    checkpoints(peer)
    run(peer.directory, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "d0.qcow2", "-F", "qcow2",
        "scratch.qcow2")  # fmt: skip
    peer.do("blockdev-add", driver="qcow2", node_name="scratch", backing="disk",
            file={"driver": "file", "filename": "scratch.qcow2"})  # fmt: skip
    since = [{"node": "disk", "name": "c1"}, {"node": "disk", "name": "c2"}]
    peer.do("transaction", actions=[
        bitmap("add", "scratch", "since", disabled=True, granularity=65536),
        act("block-dirty-bitmap-merge", node="scratch", target="since", bitmaps=since),
        act("blockdev-backup", job_id="b", device="disk", target="scratch", sync="none",
            auto_dismiss=False),
    ])  # fmt: skip
    serve(peer, "scratch", "past", bitmaps=["since"])
    seen(peer, "past", "since")
    guest(peer, "write -P 1 0 1300k", "write -P 2 1500k 500k")
    runs = seen(peer, "past")
    assert any(zero for _, (_, zero) in runs), "zeros take no room on the scratch image"
    seen(peer, "past", "since")
    fetch(peer, "past")
    peer.do("block-export-del", id="past")
    peer.do("block-job-cancel", device="b")
    peer.until("JOB_STATUS_CHANGE", id="b", status="concluded")
    peer.do("job-dismiss", id="b")
    peer.do("block-dirty-bitmap-remove", node="scratch", name="since")
    peer.do("blockdev-del", node_name="scratch")


def fleecing(peer):
    checkpoints(peer)
    peer.do("block-export-del", id="guest")
    peer.do("blockdev-add", driver="qcow2", node_name="temp",
            file={"driver": "file", "filename": "t0.qcow2"})  # fmt: skip
    peer.do("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk", target="temp")
    serve(peer, "cbw", "after", writable=True)
    peer.do("blockdev-add", driver="snapshot-access", node_name="then", file="cbw")
    serve(peer, "then", "past", bitmaps=[{"node": "disk", "name": name} for name in ("c1", "c2")])
    for name in (None, "c1", "c2"):
        seen(peer, "past", name)
    guest(peer, "write -P 1 0 1300k", "write -P 2 1500k 500k", export="after")
    seen(peer, "past", "c1")
    peer.do("block-dirty-bitmap-clear", node="disk", name="c2")  # it is in use
    fetch(peer, "past")
    peer.do("block-export-del", id="past")
    peer.do("block-dirty-bitmap-clear", node="disk", name="c2")


@pytest.mark.parametrize("session", [scratch, fleecing])
def test_what_a_client_fetches(session, tmp_path):
    if (name := missing()) is not None:
        pytest.skip(f"{name} is not installed")
    logs = []
    for name, program in (("theirs", ("qemu-storage-daemon",)), ("ours", LIVEBLOCKD)):
        directory = make_images(tmp_path / name)
        with Peer(directory, *program, "--blockdev", DISK, *MONITOR) as peer:
            session(peer)
        assert (directory / "fetched.raw").read_bytes() == (directory / "then.raw").read_bytes()
        for path in directory.glob("*.qcow2"):
            run(directory, "qemu-img", "check", "-q", path.name)
        logs.append(answers(peer.log))
    for number, pair in enumerate(zip(*logs, strict=True)):
        same(*pair, before=logs[1][max(0, number - 2) : number])
