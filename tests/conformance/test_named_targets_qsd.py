"""Targets by name over NBD, as Proxmox VE moves disks: drive-mirror with ``format=nbd``.

The same requests to qemu-storage-daemon and to liveblockd, each with a qemu-nbd of its own that has
the target.
"""

import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

from tests.conformance.test_against_qsd import run
from tests.conformance.test_random_requests_qsd import directories
from tests.support.in_step import InStep

__all__ = ["directories"]

NAMES = ("nbd:unix:target.sock:exportname=t", "nbd+unix:///t?socket=target.sock")
DISK = "driver=qcow2,node-name=d0,file.driver=file,file.filename=d0.qcow2"


@contextmanager
def served(*found):
    if shutil.which("qemu-nbd") is None:
        pytest.skip("qemu-nbd is not installed")
    servers = []
    try:
        for directory in found:
            (directory / "target.raw").write_bytes(b"\xff" * (2 << 20))
            command = ["qemu-nbd", "-f", "raw", "-k", str(directory / "target.sock"), "-x", "t",
                       "-t", "-e", "8", "target.raw"]  # fmt: skip
            servers.append(subprocess.Popen(command, cwd=directory))
        for directory in found:
            deadline = time.monotonic() + 60
            while not (directory / "target.sock").exists():
                assert time.monotonic() < deadline, "no qemu-nbd"
                time.sleep(0.01)
        yield
    finally:
        for server in servers:
            server.terminate()
            server.wait(20)


def compare(found):
    for directory in found:
        run(directory, "qemu-img", "compare", "-q", "-f", "raw", "-F", "raw",
            "nbd+unix:///g?socket=nbd.sock", NAMES[1])  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image_format", ["nbd", "raw"])
def test_a_target_on_an_nbd_server(name, image_format, directories):
    with served(*directories), InStep(*directories, "--blockdev", DISK) as both:
        both.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        both.do("block-export-add", type="nbd", id="g", node_name="d0", name="g", writable=True)
        given = {"job_id": "j", "device": "d0", "target": name, "sync": "full", "mode": "existing",
                 "format": image_format}  # fmt: skip
        both.do("drive-mirror", **given)
        both.look()
        both.do("block-job-cancel", device="j")
        compare(directories)
        for directory in directories:
            run(directory, "qemu-io", "-f", "raw", "-c", "write -P 9 100k 300k", NAMES[1])
        both.do("drive-backup", **given)
        both.look()
        compare(directories)
        both.do("drive-mirror", **given, node_name="moved")
        both.do("job-complete", id="j")
        both.look()
        for directory in directories:
            run(directory, "qemu-io", "-f", "raw", "-c", "write -P 8 1M 64k", "-c", "flush",
                "nbd+unix:///g?socket=nbd.sock")  # fmt: skip
        compare(directories)
        both.do("block-export-del", id="g")


@pytest.mark.parametrize("image_format", ["file", "host_device", "null-co", "copy-on-read"])
def test_drivers_that_are_no_formats(image_format, directories):
    with InStep(*directories, "--blockdev", DISK) as both:
        for target in ("flat.raw", "absent.raw"):
            both.do("drive-mirror", job_id="j", device="d0", target=target, sync="full",
                    mode="existing", format=image_format)  # fmt: skip
            both.look()
            both.do("job-cancel", id="j")
