"""``backing-mask-protocol``: a base without a format of its own is called raw in the header.

The header names a driver; one that says ``file`` is opened by few programs. Not in QEMU 7.2.
"""

import json
import subprocess

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")


def run(directory, *command):
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.parametrize(("mask", "name"), [(None, "file"), (False, "file"), (True, "raw")])
@pytest.mark.parametrize("job", ["stream", "commit"])
def test_format_in_the_header(job, mask, name, tmp_path):
    (tmp_path / "base.raw").write_bytes(b"\7" * (1 << 20))
    below = ("base.raw", "raw")
    for image in ("mid", "top"):
        run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-b", below[0], "-F", below[1],
            f"{image}.qcow2")  # fmt: skip
        below = (f"{image}.qcow2", "qcow2")
    run(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write -P 5 64k 64k", "mid.qcow2")
    run(tmp_path, "qemu-img", "convert", "-O", "raw", "top.qcow2", "all.raw")
    with DaemonProcess(tmp_path) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", driver="file", node_name="base", filename="base.raw")
        backing = "base"
        for image in ("mid", "top"):
            file = {"driver": "file", "filename": f"{image}.qcow2"}
            qmp("blockdev-add", driver="qcow2", node_name=image, file=file, backing=backing)
            backing = image
        masked = {} if mask is None else {"backing_mask_protocol": mask}
        top = {} if job == "stream" else {"top_node": "mid"}
        qmp(f"block-{job}", job_id="j", device="top", base_node="base", **top, **masked)
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
    info = json.loads(run(tmp_path, "qemu-img", "info", "--output=json", "top.qcow2"))
    assert info["backing-filename"] == "base.raw"
    assert info["backing-filename-format"] == name
    run(tmp_path, "qemu-img", "compare", "-q", "top.qcow2", "all.raw")
