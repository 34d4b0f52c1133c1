"""Speeds, pauses, cancels of jobs while a transaction waits for slow disks: at once, or after it.

Two drives are on an nbdkit that takes its time for each write. Their guests write, so that the
transaction (backups and bitmaps of both) has to wait for requests in flight.
"""

import json
import random
import shutil
import subprocess
import threading
import time
from contextlib import ExitStack

import pytest

from tests.support.daemon import TIMEOUT, DaemonProcess, nbd_write
from tests.support.qcow2_images import needs

pytestmark = [needs("nbdkit", "qemu-img")]

MIB = 1 << 20
SIZE = 8 * MIB
#: seconds that a slow disk takes for a write
DELAY = 0.7
#: seconds that a client may wait; 100 ms are promised, tests run on busy machines
SOON = 0.2


def slow_disk(stack, path):
    """An nbdkit with a disk that is slow."""
    command = ["nbdkit", "--exit-with-parent", "-f", "-U", path, "--filter=delay", "file"]
    options = [path.with_suffix(".raw"), f"delay-write={DELAY * 1000:.0f}ms"]
    server = stack.enter_context(subprocess.Popen([*command, *options]))
    stack.callback(server.terminate)
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < deadline and server.poll() is None
        time.sleep(0.01)


class Guest(threading.Thread):
    """Writes a new number to the first bytes of a drive again and again."""

    def __init__(self, folder, name):
        super().__init__(daemon=True)
        self.where = str(folder / "nbd.sock"), name
        self.number = 0
        self.stop = threading.Event()
        self.failed = None

    def run(self):
        try:
            while not self.stop.is_set():
                self.number += 1
                nbd_write(*self.where, 0, self.number.to_bytes(8, "big"))
        except Exception as error:
            self.failed = error

    def end(self):
        self.stop.set()
        self.join(TIMEOUT)
        assert not self.is_alive() and self.failed is None, self.failed


def writing(folder):
    """Guests of both drives, each with a write in flight."""
    guests = [Guest(folder, name) for name in ("d0", "d1")]
    for guest in guests:
        guest.start()
    while any(guest.number < 2 for guest in guests):
        time.sleep(0.01)
    time.sleep(DELAY / 7)
    return guests


@pytest.fixture
def daemon(tmp_path):
    with ExitStack() as stack:
        options = ["--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd.sock"]
        (tmp_path / "data.raw").write_bytes(random.Random(1).randbytes(MIB) * (SIZE // MIB))
        for name in ("d0", "d1"):
            shutil.copy(tmp_path / "data.raw", tmp_path / f"{name}.raw")
            slow_disk(stack, tmp_path / f"{name}.sock")
            server = f"server.type=unix,server.path={tmp_path}/{name}.sock"
            options += ["--blockdev", f"driver=nbd,node-name={name},{server}"]
            options += ["--export", f"type=nbd,id=e{name},node-name={name},name={name},writable=on"]
        for name in ("t0", "t1", "t2", "t3", "d2", "d3"):
            path = tmp_path / f"{name}.raw"
            if name.startswith("d"):
                shutil.copy(tmp_path / "data.raw", path)
            else:
                path.write_bytes(bytes(SIZE))
            options += ["--blockdev", f"driver=file,node-name={name},filename={path}"]
        yield stack.enter_context(DaemonProcess(tmp_path, *options))


def actions(*more, speed=0):
    found = [*more]
    for n in (0, 1):
        found += [
            {"type": "block-dirty-bitmap-add", "data": {"node": f"d{n}", "name": "b"}},
            {"type": "blockdev-backup", "data": {
                "job-id": f"b{n}", "device": f"d{n}", "target": f"t{n}", "sync": "full",
                "speed": speed}},
        ]  # fmt: skip
    return found


def begin(qmp, steps):
    """Ask for a transaction; its answer is not waited for."""
    request = {"execute": "transaction", "arguments": {"actions": steps}}
    qmp.socket.sendall(json.dumps(request).encode())


def answer(qmp):
    while "event" in (found := qmp.receive()):
        qmp.events.append(found)
    return found


def timed(qmp, command, **arguments):
    began = time.monotonic()
    qmp(command, **arguments)
    return time.monotonic() - began


@pytest.mark.parametrize("abort", [False, True])
def test_of_jobs_on_other_disks(abort, daemon, tmp_path):
    one, other = daemon.qmp(), daemon.qmp()
    other("blockdev-mirror", job_id="m", device="d2", target="t2", sync="full", speed=256 << 10)
    other("blockdev-backup", job_id="k", device="d3", target="t3", sync="full", speed=256 << 10)
    guests = writing(tmp_path)
    steps = actions({"type": "abort", "data": {}}) if abort else actions()
    began = time.monotonic()
    begin(one, list(reversed(steps)) if abort else steps)
    times = {
        "speed": timed(other, "block-job-set-speed", device="m", speed=128 << 10),
        "pause": timed(other, "job-pause", id="m"),
        "resume": timed(other, "job-resume", id="m"),
        "block pause": timed(other, "block-job-pause", device="m"),
        "block resume": timed(other, "block-job-resume", device="m"),
        "unlimited": timed(other, "block-job-set-speed", device="m", speed=0),
        "cancel": timed(other, "job-cancel", id="k"),
    }
    other.wait("BLOCK_JOB_CANCELLED", device="k")
    cancelled = time.monotonic() - began
    found = answer(one)
    took = time.monotonic() - began
    print(times, cancelled, took, found)  # noqa: T201 (with pytest -s)
    assert took > SOON, "there was nothing to wait for"
    assert all(seconds < SOON for seconds in times.values()), times
    assert ("error" in found) == abort
    other.wait("BLOCK_JOB_READY", device="m")
    other("job-cancel", id="m")
    for job in ("b0", "b1"):
        if not abort:
            other.wait("BLOCK_JOB_COMPLETED", device=job)
    for guest in guests:
        guest.end()
    other.wait("JOB_STATUS_CHANGE", id="m", status="null")
    assert (tmp_path / "t2.raw").read_bytes() == (tmp_path / "data.raw").read_bytes()
    for number, guest in enumerate(guests):
        kept = int.from_bytes((tmp_path / f"t{number}.raw").read_bytes()[:8], "big")
        assert kept == 0 if abort else 0 < kept < guest.number
    bitmaps = {n["node-name"] for n in other("query-named-block-nodes") if n.get("dirty-bitmaps")}
    assert bitmaps == (set() if abort else {"d0", "d1"})


def test_of_jobs_that_the_transaction_starts(daemon, tmp_path):
    """They are there when it is over: who names one sooner is told so, or waits for that."""
    one, other = daemon.qmp(), daemon.qmp()
    guests = writing(tmp_path)
    begin(one, actions(speed=MIB))
    for event in ("b0", "b1"):
        other.wait("JOB_STATUS_CHANGE", id=event, status="created")
    other("block-job-set-speed", device="b0", speed=MIB // 2)
    other("job-pause", id="b1")
    other("job-cancel", id="b0")
    assert "return" in answer(one)
    other.wait("BLOCK_JOB_CANCELLED", device="b0")
    other.wait("JOB_STATUS_CHANGE", id="b1", status="paused")
    other("job-resume", id="b1")
    other("block-job-set-speed", device="b1", speed=0)
    other.wait("BLOCK_JOB_COMPLETED", device="b1")
    for guest in guests:
        guest.end()
    kept = int.from_bytes((tmp_path / "t1.raw").read_bytes()[:8], "big")
    assert 0 < kept < guests[1].number
