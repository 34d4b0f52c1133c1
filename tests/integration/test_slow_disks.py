"""Jobs on disks that are slow: those on fast ones, and guests, are as fast as without them."""

import os
import shutil
import statistics
import subprocess
import time
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.daemon import TIMEOUT, DaemonProcess

MIB = 1 << 20
SIZE = 64 * MIB
SLOW = 4
NEEDED = ("nbdfuse", "nbdkit", "qemu-io")

pytestmark = [
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"needs {NEEDED}"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"
    ),
]


@contextmanager
def slow_disk(path):
    """A host file that takes 0.2 s for each write."""
    path.touch()
    disk = ("nbdkit", "-s", "--filter=delay", "memory", str(SIZE), "wdelay=200ms")
    command = ["nbdfuse", str(path), "--command", *disk]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 20
            while path.stat().st_size != SIZE:
                if server.poll() is not None:
                    pytest.skip("FUSE cannot be used here")
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield
        finally:
            subprocess.run(["umount", "-l", str(path)], check=False, stderr=subprocess.DEVNULL)
            server.terminate()
            server.wait(TIMEOUT)


def image(name, path, **more):
    text = "".join(f",{key.replace('_', '-')}={value}" for key, value in more.items())
    file = f"file.driver=file,file.filename={path}"
    return ("--blockdev", f"driver=raw,node-name={name},{file}{text}")


@pytest.mark.parametrize("kind", ["blockdev-backup", "blockdev-mirror"])
def test_who_is_fast_stays_fast(kind, tmp_path):
    (tmp_path / "data.raw").write_bytes(os.urandom(MIB) * (SIZE // MIB))
    for name in ("fast", "guest"):
        (tmp_path / f"{name}.raw").touch()
        os.truncate(tmp_path / f"{name}.raw", SIZE)
    options = [*image("source", "data.raw", read_only="on"), *image("fast", "fast.raw")]
    options += image("guest", "guest.raw")
    options += ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    options += ["--export", "type=nbd,id=x,node-name=guest,name=guest,writable=on"]
    with ExitStack() as stack:
        for number in range(SLOW):
            stack.enter_context(slow_disk(tmp_path / f"slow{number}.raw"))
            options += image(f"slow{number}", f"slow{number}.raw")
            options += image(f"source{number}", "data.raw", read_only="on")
        daemon = stack.enter_context(DaemonProcess(tmp_path, *options))
        qmp = daemon.qmp()

        def fast():
            began = time.monotonic()
            qmp("blockdev-backup", job_id="f", device="source", target="fast", sync="full")
            qmp.wait("BLOCK_JOB_COMPLETED", device="f")
            took = time.monotonic() - began
            qmp.wait("JOB_STATUS_CHANGE", id="f", status="null")
            qmp.events.clear()
            return took

        alone = statistics.median(fast() for _ in range(3))
        for number in range(SLOW):
            qmp(kind, job_id=f"j{number}", device=f"source{number}", target=f"slow{number}",
                sync="full")  # fmt: skip
        time.sleep(0.5)
        beside = statistics.median(fast() for _ in range(3))
        began = time.monotonic()
        nbd = f"nbd+unix:///guest?socket={tmp_path}/nbd.sock"
        words = ("-c", "write -P 5 0 1M", "-c", "flush", "-c", "read -P 5 0 1M")
        subprocess.run(["qemu-io", "-f", "raw", *words, nbd], check=True, timeout=TIMEOUT)
        guest = time.monotonic() - began
        slow = qmp("query-block-jobs")
        assert len(slow) == SLOW
        assert all(job["offset"] < SIZE for job in slow), "they are to be at work"
        for number in range(SLOW):
            qmp("block-job-cancel", device=f"j{number}", force=True)
        for number in range(SLOW):
            qmp.wait("JOB_STATUS_CHANGE", id=f"j{number}", status="null")
        qmp("quit")
        daemon.wait()
    assert (tmp_path / "fast.raw").read_bytes() == (tmp_path / "data.raw").read_bytes()
    # A fifth of the processors would be fair; a piece of a slow disk takes more than a second.
    assert beside < 10 * alone + 0.5, (alone, beside)
    assert guest < 2, guest
