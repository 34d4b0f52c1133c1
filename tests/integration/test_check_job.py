"""x-liveblock-check: an image that a guest writes to over NBD, looked at by qemu-img afterwards."""

from __future__ import annotations

import random
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from liveblockd.qapi import parse
from liveblockd.qmp.commands.check import LiveblockCheckReport
from tests.support.daemon import DaemonProcess, QmpError
from tests.support.qcow2_damage import Image
from tests.support.qcow2_images import check, needs, run

pytestmark = needs("qemu-img", "qemu-io")
SIZE = 64 << 20
LEAKS = 12


class Writer(threading.Thread):
    """A guest that writes 4 KiB at random places of the second half, one after the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.written = 0
        self.stopping = threading.Event()
        self.failed: Exception | None = None

    def run(self) -> None:
        rng = random.Random(1)
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                client.connect(str(self.path))
                stream = client.makefile("rwb")
                stream.read(18)
                stream.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 1) + b"d")
                stream.flush()
                stream.read(10)
                while not self.stopping.is_set():
                    offset = rng.randrange(SIZE // 2, SIZE, 4096)
                    request = struct.pack(">IHHQQI", 0x25609513, 0, 1, 0, offset, 4096)
                    stream.write(request + b"\x77" * 4096)
                    stream.flush()
                    magic, error = struct.unpack(">II", stream.read(16)[:8])
                    assert (magic, error) == (0x67446698, 0)
                    self.written += 1
        except Exception as error:
            self.failed = error

    def write_some(self) -> None:
        """Return when 50 more have been written, however long that takes."""
        enough, deadline = self.written + 50, time.monotonic() + 60
        while self.written < enough:
            assert self.failed is None, self.failed
            assert time.monotonic() < deadline, "writes wait"
            time.sleep(0.005)


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    path = tmp_path / "i.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(SIZE))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 8M", "-c", "discard 1M 1M", path)
    image = Image(path)
    free = [c for c in range(image.size // 4096) if image.refcount(c * 4096) == 0]
    for cluster in free[10 : 10 + LEAKS]:
        image.set_refcount(cluster * 4096, 1)
    assert check(path) == {"leaks": LEAKS}
    return path


def start(daemon: DaemonProcess):
    qmp = daemon.qmp()
    qmp("x-liveblock-events")
    qmp("blockdev-add", driver="qcow2", node_name="disk",
        file={"driver": "file", "filename": "i.qcow2"})  # fmt: skip
    qmp("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    qmp("block-export-add", type="nbd", id="e", node_name="disk", name="d", writable=True)
    return qmp


def counts(found: dict) -> tuple[int, ...]:
    return tuple(found[k] for k in ("corruptions", "leaks", "leaks-fixed", "check-errors"))


def test_check_and_repair_under_load(tmp_path: Path, leaky: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        qmp = start(daemon)
        writer = Writer(tmp_path / "nbd.sock")
        writer.start()
        for number in range(6):
            fix = "leaks" if number == 4 else "none"
            speed = 1 if number == 1 else 1 << 20
            qmp("x-liveblock-check", job_id=f"c{number}", node="disk", fix=fix, speed=speed)
            if number == 1:  # it waits for days between its pieces, and nobody waits for it
                writer.write_some()
                assert [job["status"] for job in qmp("query-jobs")] == ["running"]
                qmp("job-cancel", id="c1")
            assert qmp("query-block-jobs") == []
            qmp.wait("JOB_STATUS_CHANGE", id=f"c{number}", status="null")
        writer.write_some()
        writer.stopping.set()
        writer.join(60)
        assert writer.failed is None
        found = qmp("x-liveblock-query-check")
        assert [r["id"] for r in found] == ["c5", "c4", "c3", "c2", "c0"]
        assert [counts(r) for r in found] == [
            (0, 0, 0, 0), (0, 0, LEAKS, 0), *[(0, LEAKS, 0, 0)] * 3
        ]  # fmt: skip
        assert parse(LiveblockCheckReport, found[0]).node_name == "disk"
        event = qmp.wait("X_LIVEBLOCK_CHECK_COMPLETED", id="c4")
        assert event["data"]["leaks-fixed"] == LEAKS and event["data"]["node-name"] == "disk"
        assert not [e for e in qmp.events if e["event"].startswith("BLOCK_JOB")]
        assert qmp("x-liveblock-query-check", job_id="c2", node="disk")[0]["leaks"] == LEAKS
        assert qmp("x-liveblock-query-check", node="other") == []
    assert check(leaky) == {}
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 1 2M 6M", leaky)


def test_killed_in_the_middle_of_a_repair(tmp_path: Path, leaky: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        qmp = start(daemon)
        writer = Writer(tmp_path / "nbd.sock")
        writer.start()
        qmp("x-liveblock-check", job_id="c", node="disk", fix="leaks", auto_finalize=False)
        qmp.wait("JOB_STATUS_CHANGE", id="c", status="pending")
        daemon.stop(signal.SIGKILL)
        writer.join(60)
    left = check(leaky)
    assert set(left) <= {"leaks"}
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 1 2M 6M", leaky)


def test_pause_and_what_is_refused(tmp_path: Path, leaky: Path) -> None:
    raw = tmp_path / "r.raw"
    raw.write_bytes(bytes(4096))
    with DaemonProcess(tmp_path) as daemon:
        qmp = start(daemon)
        with pytest.raises(QmpError, match="This image format does not support checks"):
            qmp("blockdev-add", driver="raw", node_name="raw",
                file={"driver": "file", "filename": "r.raw"})  # fmt: skip
            qmp("x-liveblock-check", job_id="c", node="raw")
        with pytest.raises(QmpError, match="Cannot find device='no'"):
            qmp("x-liveblock-check", job_id="c", node="no")
        with pytest.raises(QmpError, match="does not accept value 'all'"):
            qmp("x-liveblock-check", job_id="c", node="disk", fix="all")
        qmp("x-liveblock-check", job_id="c", node="disk", speed=1)
        with pytest.raises(QmpError, match="already in use"):
            qmp("x-liveblock-check", job_id="c", node="disk")
        qmp("job-pause", id="c")
        qmp.wait("JOB_STATUS_CHANGE", id="c", status="paused")
        job = qmp("query-jobs")[0]
        assert job["type"] == "x-liveblock-check" and job["status"] == "paused"
        assert job["current-progress"] < job["total-progress"]
        qmp("x-liveblock-check", job_id="second", node="disk", auto_dismiss=False)
        qmp.wait("JOB_STATUS_CHANGE", id="second", status="concluded")
        failed = next(j for j in qmp("query-jobs") if j["id"] == "second")
        assert failed["error"] == "The image is being checked already"
        qmp("job-dismiss", id="second")
        qmp("blockdev-snapshot-sync", node_name="disk", snapshot_file="o.qcow2",
            snapshot_node_name="o")  # fmt: skip
        qmp("job-cancel", id="c")
        qmp.wait("JOB_STATUS_CHANGE", id="c", status="null")
        with pytest.raises(QmpError, match=r"read-only|Read-only|not permitted"):
            qmp("x-liveblock-check", job_id="d", node="disk", fix="leaks")
        qmp("x-liveblock-check", job_id="e", node="disk")
        qmp.wait("JOB_STATUS_CHANGE", id="e", status="null")
        assert qmp("x-liveblock-query-check", job_id="e")[0]["leaks"] == LEAKS
