"""Killed at any moment of snapshots, commits and mirrors, always started again with the same words.

Whatever image the drive was on, the next daemon opens it there: every write that was answered with
FUA is read after the next start, and none goes below an overlay.
"""

import contextlib
import random
import shutil
import socket
import struct
import threading
import time

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import run

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")

SIZE = 4 << 20
BLOCK = 4096
WORDS = (
    "--jobs", "journal=journal",
    "--drive", "file=disk.qcow2,id=d,format=qcow2,node-name=n",
    "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
    "--export", "nbd,id=e,node-name=n,name=e,writable=on",
)  # fmt: skip


class Guest:
    """Writes blocks, each with its number; ``answered`` and ``tried``: offset -> number."""

    def __init__(self, path):
        self.path = path
        self.answered = {}
        self.tried = {}
        self.number = 0

    def connect(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(self.path)
        self.stream = self.socket.makefile("rwb")
        self.stream.read(18)
        self.stream.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 1) + b"e")
        self.stream.flush()
        self.stream.read(10)

    def ask(self, flags, command, offset, length, data=b""):
        self.stream.write(struct.pack(">IHHQQI", 0x25609513, flags, command, 0, offset, length))
        self.stream.write(data)
        self.stream.flush()
        answer = self.stream.read(16)
        if len(answer) < 16:
            raise ConnectionError
        assert struct.unpack(">I", answer[4:8]) == (0,)
        return self.stream.read(length) if command == 0 else b""

    def work(self, rng):
        with contextlib.suppress(OSError):
            while True:
                offset = rng.randrange(SIZE // BLOCK) * BLOCK
                self.number += 1
                self.tried.setdefault(offset, set()).add(self.number)
                self.ask(1, 1, offset, BLOCK, self.number.to_bytes(8) * (BLOCK // 8))
                self.answered[offset], self.tried[offset] = self.number, set()

    def look(self):
        """Everything that was answered is there, or what came after it."""
        for offset, number in self.answered.items():
            found = self.ask(0, 0, offset, BLOCK)
            value = int.from_bytes(found[:8])
            assert found == value.to_bytes(8) * (BLOCK // 8)
            assert value == number or value in self.tried[offset], (
                f"at {offset:#x}: {value}, and not {number}"
            )
            self.answered[offset], self.tried[offset] = value, set()


def operate(qmp, rng, names):
    """One thing after the other that moves the drive to another image."""
    if qmp("query-block-jobs"):
        finish(qmp)
    while True:
        name = next(names)
        match rng.choice(["snapshot", "commit", "mirror"]):
            case "snapshot":
                qmp("blockdev-snapshot-sync", device="d", snapshot_file=name)
                continue
            case "commit":
                try:
                    base = qmp("query-block")[0]["inserted"]["image"]["backing-image"]["filename"]
                except KeyError:
                    continue
                qmp("block-commit", device="d", job_id="j", base=base)
            case _:
                qmp("drive-mirror", device="d", job_id="j", target=name, sync="full")
        finish(qmp)


def finish(qmp):
    """Let the job switch over; a commit may have been resumed before anybody could hear of it."""
    while not qmp("query-block-jobs")[0]["ready"]:
        time.sleep(0.005)
    qmp("block-job-complete", device="j")
    qmp.wait("JOB_STATUS_CHANGE", id="j", status="null")
    qmp.events.clear()


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))]
)
def test_nothing_answered_is_lost(seed, tmp_path):
    rng = random.Random(seed)
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", SIZE)
    guest = Guest(str(tmp_path / "nbd.sock"))
    moved = 0
    for round_ in range(5):
        with DaemonProcess(tmp_path, *WORDS) as daemon:
            guest.connect()
            guest.look()
            lane = threading.Thread(target=guest.work, args=(rng,))
            lane.start()
            qmp = daemon.qmp()
            names = (f"{round_}-{number}.qcow2" for number in range(1000))
            killer = threading.Timer(rng.uniform(0.3, 1.5), daemon.process.kill)
            killer.start()
            with contextlib.suppress(OSError, EOFError):
                operate(qmp, random.Random(f"{seed} {round_}"), names)
            killer.join()
            lane.join()
            daemon.wait()
            moved += "was last on" in daemon.errors.decode()
        for left in ("daemon.pid", "nbd.sock", "qmp.sock"):
            (tmp_path / left).unlink(missing_ok=True)
    with DaemonProcess(tmp_path, *WORDS):
        guest.connect()
        guest.look()
    assert moved, "it is about drives that are elsewhere"
    assert len(guest.answered) > 20
