"""The human monitor beside that of a QEMU without a machine: what ``info`` shows, drives.

The same ``-drive`` options, images and lines for both.
"""

import json
import re
import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.peer import Peer

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(
    QEMU is None or shutil.which("qemu-img") is None, reason="qemu-system-x86 is not installed"
)
MACHINE = (
    "qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none",
    "-qmp", "unix:qmp.sock,server=on,wait=off",
)  # fmt: skip


def drive(name, more=""):
    kind = "raw" if name == "r" else "qcow2"
    return f"id={name},if=none,file={name}.img,format={kind}{more}"


def images(directory, *snapshots):
    for name in "abc":
        create = ("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.img", "4M")
        subprocess.run(create, cwd=directory, check=True, timeout=60)
    (directory / "r.img").write_bytes(bytes(1 << 20))
    for name, snapshot in snapshots:
        create = ("qemu-img", "snapshot", "-c", snapshot, f"{name}.img")
        subprocess.run(create, cwd=directory, check=True, timeout=60)


def plain(text):
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text.replace("\r", ""))
    text = re.sub(r"disk size: .*", "disk size", text)
    return re.sub(r"#block\d+", "#block", text)


@pytest.fixture
def both(tmp_path):
    """Starts the two with such drives, gives them lines, and has their answers."""

    def answers(drives, lines, snapshots=(), prepare=None):
        found = []
        for name in ("theirs", "ours"):
            directory = tmp_path / name
            directory.mkdir()
            images(directory, *snapshots)
            if prepare is not None:
                prepare(directory)
        options = [part for text in drives for part in ("-drive", text)]
        with Peer(tmp_path / "theirs", *MACHINE, *options) as qemu:
            replies = [qemu.do("human-monitor-command", command_line=line) for line in lines]
            found.append([plain(reply["return"]) for reply in replies])
        options = [part for text in drives for part in ("--drive", text)]
        with DaemonProcess(tmp_path / "ours", *options) as daemon:
            client = daemon.qmp()
            replies = [client("human-monitor-command", command_line=line) for line in lines]
            found.append([plain(reply) for reply in replies])
        return found

    return answers


def same(lines, found):
    for line, theirs, ours in zip(lines, *found, strict=True):
        assert (line, ours) == (line, theirs)


def test_info_of_drives(both):
    drives = [drive("a", ",cache=none,discard=unmap"), drive("b", ",cache=writethrough"),
              drive("r", ",readonly=on,cache=unsafe")]  # fmt: skip
    lines = ["info block", "info block -v", "info block b", "info block -v b", "info block nope",
             "info block -x", "info block-jobs", "snapshot_blkdev a over.img", "info block a",
             "info block -v a", "info jobs"]  # fmt: skip
    same(lines, both(drives, lines, [("b", "one"), ("b", "two with a long name")]))


@pytest.mark.parametrize(
    ("drives", "snapshots"),
    [
        (["a"], []), (["r"], []), ([], []),
        (["a", "b"], ["a:one", "b:one"]),
        (["a", "b"], ["a:one", "b:one", "a:two", "b:three"]),
        (["r", "a"], ["a:one", "a:two"]),
        (["r-", "a"], ["a:one", "a:two"]),
        (["a", "c-"], ["c:one"]),
        (["a", "b"], ["b:one", "b:two", "a:two"]),
    ],
)  # fmt: skip
def test_info_snapshots(both, drives, snapshots):
    """A minus sign is a drive for reading only, whose snapshots count for nothing."""
    options = [drive(name[0], ",readonly=on" if "-" in name else "") for name in drives]
    lines = ["info snapshots"]
    same(lines, both(options, lines, [name.split(":") for name in snapshots]))


def test_nodes_are_disks_too(both):
    lines = ["drive_add -n 0 driver=qcow2,file.driver=file,file.filename=b.img",
             "drive_add -n 0 driver=qcow2,node-name=b,file.driver=file,file.filename=b.img",
             "drive_add -n 0 driver=qcow2,node-name=b,file.driver=file,file.filename=c.img",
             "drive_add -n 0 driver=qcow2,node-name=c,file=nope",
             "info block", "info block -n b", "info snapshots", "drive_del b",
             "drive_add 0 " + drive("c"), "drive_add 0 " + drive("c"), "info block",
             "drive_del c", "info block"]  # fmt: skip
    same(lines, both([drive("a")], lines, [("a", "one"), ("b", "one"), ("a", "two")]))


def test_limits_of_drives(both):
    limits = ["throttling.bps-total=1000,throttling.bps-total-max=5000,"
              "throttling.bps-total-max-length=3", "bps=1000,iops_rd=5,throttling.group=g",
              "bps=1000,bps_rd=5", "bps=1k", "bps=-1", "throttling.bps-write-max=9", "group=g",
              "iops=0x20,iops_size=4096", "iops_size=4096", "bps=0"]  # fmt: skip
    lines = []
    for text in limits:
        lines += [f"drive_add 0 {drive('b', ',' + text)}", "info block", "drive_del b"]
    for numbers in ("1 0 0 4 0 0", "0 2 3 0 5 6", "1 2 3 4 5 6", "1 2", "", "x 0 0 0 0 0",
                    "0 0 0 0 0 0 0", "0x10 0 0 0 0 0", "-1 0 0 0 0 0", "0 0 0 0 0 0"):  # fmt: skip
        lines += [f"block_set_io_throttle a {numbers}", "info block"]
    lines += ["block_set_io_throttle b 1 0 0 0 0 0", "block_set_io_throttle a 9999999 0 0 0 0 0",
              "snapshot_blkdev a over.img", "info block"]  # fmt: skip
    same(lines, both([drive("a", ",iops_rd=7")], lines))


@pytest.mark.parametrize("option", ["on", "off"])
def test_copy_on_read(tmp_path, both, option):
    """What is copied is the same to the cluster; ``both`` makes the images."""
    over = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", "b.img", "-F", "qcow2", "over.img")
    fill = ("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 64k", "b.img")
    reads = ["read -P 1 100k 1k", "read 700k 324k", "read 3100k 20k", "write -P 3 2M 100",
             "read -P 0 3900k 1", "read -P 0 -s 100 -l 1k 2M 4k"]  # fmt: skip
    drives = [f"id=d,if=none,file=over.img,format=qcow2,copy-on-read={option}"]
    lines = [f'qemu-io d "{request}"' for request in reads]

    def prepare(directory):
        for command in (fill, over):
            subprocess.run(command, cwd=directory, check=True, timeout=60, capture_output=True)

    same(lines, both(drives, lines, prepare=prepare))
    maps = []
    for name in ("theirs", "ours"):
        command = ("qemu-img", "map", "--output=json", "over.img")
        run = subprocess.run(command, cwd=tmp_path / name, check=True, capture_output=True)
        found = json.loads(run.stdout)  # of zeros QEMU makes entries without data
        maps.append([(e["start"], e["length"], e["depth"]) for e in found if e["data"]])
    assert maps[0] == maps[1]
    assert len([start for start, _, depth in maps[0] if not depth]) == (4 if option == "on" else 1)
