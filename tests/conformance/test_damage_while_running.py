"""A guest meets damaged metadata: the events are those of qemu-storage-daemon, reads go on here."""

import subprocess

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import needs, run
from tests.support.qsd import QsdProcess

pytestmark = needs("qemu-img", "qemu-io", "qemu-storage-daemon")
COPIED = 1 << 63
#: of a fresh image of 64 KiB clusters: refcount table, block, L1, L2, data from here on
TABLE, BLOCK, L1, L2 = 0x10000, 0x20000, 0x30000, 0x40000
READ, WRITE, ALLOCATE = "read 0 512", "write -P 9 0 512", "write -P 9 32M 64k"

#: name: (place, value, what the guest does, members of the event that must be the same)
CASES = {
    "unaligned data": (L2, COPIED | 0x50200, READ, {"msg", "fatal", "offset", "size"}),
    "unaligned L2 table": (L1, COPIED | 0x40200, READ, {"msg", "fatal", "offset", "size"}),
    "unaligned refcount block": (TABLE, 0x20200, ALLOCATE, {"msg", "fatal", "offset", "size"}),
    "data in an L2 table": (L2, COPIED | L2, WRITE, {"fatal", "offset"}),
    "data in the refcount table": (L2, COPIED | TABLE, WRITE, {"fatal", "offset"}),
    "L2 table in a refcount block": (L1, COPIED | BLOCK, ALLOCATE, {"fatal", "offset"}),
    "no refcounts": (TABLE, 0, ALLOCATE, {"fatal"}),
}


def guest(directory, command):
    """Whether it worked."""
    uri = f"nbd+unix:///disk?socket={directory}/nbd"
    mode = ["-r"] if command.startswith("read") else []
    done = subprocess.run(
        ["qemu-io", *mode, "-f", "raw", "-c", command, uri],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return "failed" not in done.stdout + done.stderr and done.returncode == 0


def damaged_image(directory, place, value):
    directory.mkdir()
    path = directory / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(value.to_bytes(8, "big"))
    return path


def options(path):
    return (
        "--blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={path}",
        "--nbd-server", f"addr.type=unix,addr.path={path.parent}/nbd",
        "--export", "type=nbd,id=e,node-name=disk,writable=on",
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_guest_meets_damage(tmp_path, name):
    place, value, command, same = CASES[name]
    events = []
    for kind in (QsdProcess, DaemonProcess):
        path = damaged_image(tmp_path / kind.__name__, place, value)
        with kind(path.parent, *options(path)) as daemon:
            qmp = daemon.qmp()
            assert not guest(path.parent, command)
            events.append(qmp.wait("BLOCK_IMAGE_CORRUPTED")["data"])
            assert not guest(path.parent, "write -P 3 128k 512"), "writes have ended"
            if kind is DaemonProcess:
                if place != L1:
                    assert guest(path.parent, "read -P 1 128k 512"), "reads go on"
                assert not guest(path.parent, "flush")
                nodes = qmp("query-named-block-nodes")
                disk = next(node for node in nodes if node["node-name"] == "disk")
                assert disk["image"]["format-specific"]["data"]["corrupt"] is True
                qmp("query-version")
                kinds = [event["event"] for event in qmp.events]
                assert kinds.count("BLOCK_IMAGE_CORRUPTED") == 1
        content = path.read_bytes()
        assert content[79] & 2, "the corrupt bit"
        assert content[0x70000:0x70200] == b"\1" * 512, "what was refused is not there"
    expected, found = events
    assert {k: expected.get(k) for k in same} == {k: found.get(k) for k in same}
    assert found["node-name"] == expected["node-name"] == "disk"
    assert found["device"] == expected["device"] == ""


def test_a_read_only_image_is_not_marked(tmp_path):
    path = damaged_image(tmp_path / "image", L2, COPIED | 0x50200)
    before = path.read_bytes()
    blockdev, node, *rest = options(path)
    rest[-1] = "type=nbd,id=e,node-name=disk"
    with DaemonProcess(path.parent, blockdev, node + ",read-only=on", *rest) as daemon:
        qmp = daemon.qmp()
        assert not guest(path.parent, "read 0 512")
        assert qmp.wait("BLOCK_IMAGE_CORRUPTED")["data"]["fatal"] is False
        assert guest(path.parent, "read -P 1 128k 512")
    assert path.read_bytes() == before


def test_what_is_marked_corrupt_is_opened_read_only_alone(tmp_path):
    path = damaged_image(tmp_path / "image", 72, 2)
    with DaemonProcess(path.parent) as daemon:
        qmp = daemon.qmp()
        file = {"driver": "file", "filename": str(path)}
        with pytest.raises(Exception, match="Image is corrupt; cannot be opened read/write"):
            qmp("blockdev-add", driver="qcow2", node_name="disk", file=file)
        qmp("blockdev-add", driver="qcow2", node_name="disk", file=file, read_only=True)
