"""Backups: the same requests to qemu-storage-daemon and to liveblockd (see test_against_qsd)."""

from tests.conformance.test_against_qsd import (  # noqa: F401 (the fixture)
    bitmap,
    blockdev,
    compared,
    export,
    run,
    transact,
)

KIB = 1024
MIB = 1024 * KIB
DISKS = (*blockdev("d0"), *blockdev("t0"), *blockdev("t1"))


def ended(peer, job_id):
    peer.until("JOB_STATUS_CHANGE", id=job_id, status="null")


def backup(peer, number=0, target="t0", sync="full", wait=True, **data):
    data = {"device": "d0", "target": target, "sync": sync, "job-id": f"b{number}"} | data
    peer.do("blockdev-backup", **data)
    if wait and "return" in peer.log[-1]:
        ended(peer, f"b{number}")


def arguments(peer):
    transact(peer, bitmap("add", "d0", "b"))
    for wrong in (
        {"bitmap": "b"},
        {"bitmap": "b", "bitmap-mode": "never"},
        {"bitmap": "b", "bitmap-mode": "always", "sync": "none"},
        {"bitmap-mode": "always"},
        {"bitmap": "b", "bitmap-mode": "always", "sync": "incremental"},
        {"sync": "bitmap", "bitmap": "b"},
        {"sync": "bitmap", "bitmap": "ghost", "bitmap-mode": "never"},
        {"x-perf": {"max-workers": 0}},
        {"x-perf": {"max-chunk": -1}},
        {"x-perf": {"max-chunk": 4096}},
        {"speed": -1},
        {"sync": "nonsense"},
        {"on-source-error": "nonsense"},
        {"job-id": "-"},
        {"target": "d0"},
        {"filter-node-name": "t0"},
        {"filter-node-name": "-"},
        {"x-perf": {"use-copy-range": 1}},
    ):
        backup(peer, wait=False, **wrong)
    peer.do("query-block-jobs")
    peer.do("query-jobs")
    transact(peer)


def bitmaps(peer):
    export(peer, "d0")
    transact(peer, bitmap("add", "d0", "b", granularity=64 * KIB, persistent=True))
    write(peer, 3, "128k 64k")
    backup(peer, 0, "t0", "full", **{"bitmap": "b", "bitmap-mode": "on-success"})
    transact(peer)
    write(peer, 4, "256k 64k")
    write(peer, 0, "512k 64k")
    backup(peer, 1, "t1", "bitmap", **{"bitmap": "b", "bitmap-mode": "never"})
    transact(peer)
    backup(peer, 2, "t1", "incremental", bitmap="b")
    transact(peer)
    write(peer, 5, "1M 64k")
    backup(peer, 3, "t1", "bitmap", **{"bitmap": "b", "bitmap-mode": "always"})
    transact(peer)
    backup(peer, 4, "t0", "top")


def write(peer, pattern, where):
    run(peer.directory, "qemu-io", "-f", "raw", "-c", f"write -P {pattern} {where}",
        "nbd+unix:///d0?socket=nbd.sock")  # fmt: skip


def held(peer):
    """A backup that waits: what it lets others do."""
    export(peer, "d0")
    transact(peer, bitmap("add", "d0", "b"))
    backup(peer, sync="none", wait=False, **{"filter-node-name": "f"})
    transact(peer)
    peer.do("query-block-jobs")
    peer.do("blockdev-del", node_name="t0")
    peer.do("blockdev-del", node_name="f")
    peer.do("job-complete", id="b0")
    peer.do("block-job-complete", device="b0")
    peer.do("job-finalize", id="b0")
    backup(peer, 0, wait=False)
    backup(peer, 1, "t0", wait=False)
    peer.do("block-job-cancel", device="b0")
    ended(peer, "b0")
    transact(peer)
    backup(peer, 2, wait=False, **{"auto-finalize": False, "auto-dismiss": False})
    peer.until("JOB_STATUS_CHANGE", id="b2", status="pending")
    peer.do("job-finalize", id="b2")
    peer.until("JOB_STATUS_CHANGE", id="b2", status="concluded")
    peer.do("job-dismiss", id="b2")
    ended(peer, "b2")


def drives(peer):
    for number, data in enumerate((
        {"target": "n0.qcow2"},
        {"target": "n1.raw", "format": "raw"},
        {"target": "n2.qcow2", "sync": "top"},
        {"target": "t0.qcow2", "mode": "existing"},
        {"target": "n4.qcow2", "mode": "existing"},
        {"target": "n5.qcow2", "format": "nonsense"},
        {"target": "nowhere/n6.qcow2"},
        {"target": "n7.raw", "format": "raw", "sync": "none"},
        {"target": "n8.qcow2", "device": "ghost"},
    )):  # fmt: skip
        given = {"device": "top", "sync": "full", "job-id": f"b{number}"} | data
        peer.do("drive-backup", **given)
        if "return" in peer.log[-1]:
            ended(peer, f"b{number}")
    transact(peer)


def test_arguments(compared):  # noqa: F811
    compared(arguments, *DISKS)


def test_bitmaps(compared):  # noqa: F811
    compared(bitmaps, *DISKS)


def test_a_backup_that_waits(compared):  # noqa: F811
    compared(held, *DISKS)


def test_drive_backup(compared):  # noqa: F811
    compared(drives, *blockdev("top"))
