"""A daemon that is killed in the middle of transactions leaves images that are whole."""

import json
import random
import shutil
import threading
import time

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import check, needs, run

SEED = 20


def newest(directory, number):
    """The last overlay of a disk that is an image, from the disk itself on."""
    found = directory / f"d{number}.qcow2"
    for turn in range(10_000):
        path = directory / f"s{turn}-{number}.qcow2"
        if not path.exists() or path.read_bytes()[:4] != b"QFI\xfb":
            return found, turn
        info = json.loads(run("qemu-img", "info", "--output=json", path))
        assert info["backing-filename"] == found.name
        found = path
    raise AssertionError("no end")


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("round_", range(3))
def test_killed_at_any_moment(tmp_path, round_):
    rng = random.Random(SEED + round_)
    options = []
    for number in (0, 1):
        name = tmp_path / f"d{number}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", name, "4M")
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} 0 3M", name)
        shutil.copy(name, tmp_path / f"copy{number}")
        file = f"file.driver=file,file.filename={name.name}"
        options += ["--blockdev", f"driver=qcow2,node-name=d{number},{file}"]
    with DaemonProcess(tmp_path, *options) as daemon:
        qmp = daemon.qmp()
        # Without a user an overlay would be closed at once.
        qmp("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        for name in ("d0", "d1"):
            qmp("block-export-add", type="nbd", id=name, node_name=name, writable=True)
        killer = threading.Timer(0.02 + rng.random() * 0.3, daemon.process.kill)
        killer.start()
        names = ["d0", "d1"]
        deadline = time.monotonic() + 20
        done = 0
        try:
            while time.monotonic() < deadline:
                new = [f"s{done}-{number}" for number in (0, 1)]
                members = [
                    {"node-name": old, "snapshot-node-name": over, "snapshot-file": f"{over}.qcow2"}
                    for old, over in zip(names, new, strict=True)
                ]
                kind = "blockdev-snapshot-sync"
                qmp("transaction", actions=[{"type": kind, "data": data} for data in members])
                names, done = new, done + 1
        except (EOFError, OSError):
            pass
        killer.join()
    turns = []
    for number in (0, 1):
        top, turn = newest(tmp_path, number)
        turns.append(turn)
        assert check(top).keys() <= {"leaks"}
        run("qemu-img", "compare", "-q", "-F", "qcow2", top, tmp_path / f"copy{number}")
    assert all(done <= turn <= done + 1 for turn in turns), (turns, done, SEED + round_)
