"""``discard-source``: a backup of a fleecing snapshot gives back the room that the snapshot took.

As Proxmox VE backs up: the guest writes through copy-before-write, old contents go to a fleecing
image, and the backup to a slow place reads the past from both. Not in QEMU 7.2.
"""

import subprocess

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")

MIB = 1 << 20


def run(directory, *command):
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.parametrize("discard_source", [True, False])
def test_a_backup_of_the_past(discard_source, tmp_path):
    for name in ("disk", "fleece", "out"):
        run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", "8M")
    run(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", "-c", "write -P 2 5M 2M",
        "disk.qcow2")  # fmt: skip
    run(tmp_path, "qemu-img", "convert", "-O", "raw", "disk.qcow2", "then.raw")
    guest = "nbd+unix:///guest?socket=nbd.sock"
    with DaemonProcess(tmp_path) as daemon:
        qmp = daemon.qmp()
        for name in ("disk", "fleece", "out"):
            file = {"driver": "file", "filename": f"{name}.qcow2", "discard": "unmap"}
            qmp("blockdev-add", driver="qcow2", node_name=name, discard="unmap", file=file)
        qmp("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk",
            target="fleece", discard="unmap")  # fmt: skip
        qmp("blockdev-add", driver="snapshot-access", node_name="past", file="cbw", discard="unmap")
        qmp("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        qmp("block-export-add", type="nbd", id="g", node_name="cbw", name="guest", writable=True)
        run(tmp_path, "qemu-io", "-f", "raw", "-c", "write -P 9 0 2M", guest)
        qmp("blockdev-backup", job_id="b", device="past", target="out", sync="full",
            discard_source=discard_source, speed=MIB)  # fmt: skip
        run(tmp_path, "qemu-io", "-f", "raw", "-c", "write -P 8 2M 3M", guest)
        qmp("block-job-set-speed", device="b", speed=0)
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
        qmp.wait("JOB_STATUS_CHANGE", id="b", status="null")
        qmp("block-export-del", id="g")
        qmp("blockdev-del", node_name="past")
        qmp("blockdev-del", node_name="cbw")
    run(tmp_path, "qemu-img", "compare", "-q", "then.raw", "out.qcow2")
    run(tmp_path, "qemu-img", "check", "-q", "fleece.qcow2")
    kept = run(tmp_path, "qemu-img", "map", "fleece.qcow2").splitlines()[1:]
    assert bool(kept) is not discard_source
