"""The human monitor of a running daemon: through QMP and on a socket of its own."""

import re
import shlex
import shutil
import socket
import subprocess

import pytest

from tests.support.daemon import DaemonProcess

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)


@pytest.fixture
def daemon(tmp_path):
    for command in (
        "qemu-img create -q -f qcow2 a.qcow2 4M",
        "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2",
        "qemu-io -f qcow2 -c 'write -q -P 3 0 4M' b.qcow2",
        "qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 d.qcow2",
    ):
        subprocess.run(shlex.split(command), check=True, cwd=tmp_path, timeout=20)
    with DaemonProcess(
        tmp_path, "--drive", "file=d.qcow2,id=virtio0",
        "--chardev", "socket,id=q,path=qmp.sock,server=on,wait=off", "--monitor", "q",
        "--chardev", "socket,id=h,path=hmp.sock,server=on,wait=off", "--monitor", "h,mode=readline",
    ) as daemon:  # fmt: skip
        yield daemon


def hmp(client, line):
    return client("human-monitor-command", command_line=line)


def test_the_two_recipes(daemon):
    client = daemon.qmp()
    text = hmp(client, "info block")
    assert text.splitlines()[0].startswith("virtio0 (#block")
    assert text.endswith("    Backing file:     b.qcow2 (chain depth: 2)\r\n")
    assert hmp(client, "block_stream virtio0 a.qcow2") == ""
    client.wait("JOB_STATUS_CHANGE", id="virtio0", status="null")
    assert "Backing file:     a.qcow2 (chain depth: 1)\r\n" in hmp(client, "info block virtio0")

    client.events.clear()
    assert hmp(client, "snapshot_blkdev virtio0 new.qcow2 qcow2") == ""
    assert "new.qcow2 (qcow2)" in hmp(client, "info block")
    assert hmp(client, "block_stream virtio0") == ""
    client.wait("JOB_STATUS_CHANGE", id="virtio0", status="null")
    assert "Backing file" not in hmp(client, "info block")


def test_a_job_from_start_to_end(daemon):
    client = daemon.qmp()
    assert hmp(client, "info block-jobs") == "No active jobs\r\n"
    assert hmp(client, "block_stream virtio0 64k") == ""
    assert hmp(client, "block_job_pause virtio0") == ""
    assert hmp(client, "block_job_set_speed virtio0 1") == ""
    assert re.fullmatch(
        r"Streaming device virtio0: Completed \d+ of 4194304 bytes, "
        r"speed limit 1048576 bytes/s\r\n",
        hmp(client, "info block-jobs"),
    )
    assert hmp(client, "block_job_cancel -f virtio0") == ""
    client.wait("BLOCK_JOB_CANCELLED", device="virtio0")
    assert hmp(client, "block_job_pause nosuch") == "Error: Block job 'nosuch' not found\r\n"
    assert hmp(client, "block_resize virtio0 8") == ""
    assert client("query-block")[0]["inserted"]["image"]["virtual-size"] == 8 << 20
    assert hmp(client, "info status") == "VM status: running\r\n"
    assert hmp(client, "info blockstats").startswith("virtio0: rd_bytes=")


def test_interactive(daemon):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(daemon.directory / "hmp.sock"))
        file = client.makefile("rb")

        def prompt():
            text = b""
            while not text.endswith(b"(qemu) "):
                text += file.read(1)
            return text

        assert prompt().endswith(b"type 'help' for more information\r\n(qemu) ")
        client.sendall(b"info block-jobsx\x7f\r")
        assert prompt().endswith(b"\r\nNo active jobs\r\n(qemu) ")
        client.sendall(b"block_stream nosuch\n")
        assert prompt().endswith(
            b"\r\nError: Cannot find device='nosuch' nor node-name='nosuch'\r\n(qemu) "
        )
        client.sendall(b"quit\n")
        assert file.read() == b"quit\r\n"
        assert daemon.wait() == 0
