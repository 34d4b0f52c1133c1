"""Amend and check jobs where there is no room: a clear error, nothing lost, and once more."""

import subprocess

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.qcow2_damage import Image
from tests.support.qcow2_images import check, needs, run
from tests.support.room import KINDS, Room

MIB = 1 << 20

pytestmark = needs("qemu-img", "qemu-io")


@pytest.fixture(params=KINDS)
def room(tmp_path, request):
    with Room(tmp_path / "small", request.param) as room:
        yield room


def reads(path, kind, secret):
    """Whether a passphrase opens it, for qemu-io, and what the guest wrote is there."""
    prefix = "encrypt.format=luks,encrypt." if kind == "qcow2" else ""
    image = f"driver={kind},file.filename={path},{prefix}key-secret=s"
    words = ("--object", f"secret,id=s,data={secret}", "-c", "read -P 7 0 1M", "--image-opts")
    return not subprocess.run(
        ["qemu-io", *words, image], capture_output=True, timeout=60
    ).returncode


def make(qmp, path, kind):
    """A node ``disk`` of 8 MiB with LUKS; the first passphrase is ``old``."""
    file = {"driver": "file", "filename": "disk"}
    key = {"key-secret": "old"}
    new = key | {"iter-time": 10}
    if kind == "qcow2":
        key, new = ({"encrypt": member | {"format": "luks"}} for member in (key, new))
    qmp(
        "blockdev-create",
        job_id="c",
        options={"driver": kind, "file": file, "size": 8 * MIB, **new},
    )
    qmp.wait("JOB_STATUS_CHANGE", id="c", status="concluded")
    qmp("job-dismiss", id="c")
    run("fallocate", "--dig-holes", path)  # material of a key takes room when there is one
    qmp("blockdev-add", driver=kind, node_name="disk", file=file, **key)
    qmp("human-monitor-command", command_line='qemu-io disk "write -P 7 0 1M"')


def amend(qmp, kind, **what):
    options = {"driver": kind, **{k.replace("_", "-"): v for k, v in what.items()}}
    if kind == "qcow2":
        options = {"driver": kind, "encrypt": options | {"format": "luks"}}
        del options["encrypt"]["driver"]
    qmp("x-blockdev-amend", job_id="a", node_name="disk", options=options)
    qmp.wait("JOB_STATUS_CHANGE", id="a", status="concluded")
    (job,) = qmp("query-jobs")
    qmp("job-dismiss", id="a")
    qmp.events.clear()
    return job.get("error")


def slots(qmp):
    (node,) = (n for n in qmp("query-named-block-nodes") if n["node-name"] == "disk")
    data = node["image"]["format-specific"]["data"]
    return [slot["active"] for slot in data.get("encrypt", data)["slots"]]


@pytest.mark.parametrize("kind", ["luks", "qcow2"])
def test_passphrases(kind, room):
    pytest.importorskip("cryptography")
    path = room.path / "disk"
    path.touch()
    secrets = [("--object", f"secret,id={name},data={name}") for name in ("old", "new")]
    with DaemonProcess(room.path, *secrets[0], *secrets[1]) as daemon:
        qmp = daemon.qmp()
        make(qmp, path, kind)
        add = {"state": "active", "new_secret": "new", "iter_time": 10}
        erase = {"state": "inactive", "old_secret": "old"}
        room.fill()
        assert amend(qmp, kind, **add) == room.message
        assert slots(qmp) == [True] + [False] * 7
        room.more(48)
        assert amend(qmp, kind, **add) is None
        assert slots(qmp) == [True, True] + [False] * 6
        room.fill()
        failed = amend(qmp, kind, **erase)
        # What is there can be overwritten on a full disk, and cannot under a quota.
        assert failed == (None if room.kind == "full" else room.message)
        room.more(96)
        if failed:
            assert amend(qmp, kind, **erase) is None
        assert slots(qmp) == [False, True] + [False] * 6
        qmp("quit")
    assert reads(path, kind, "new") and not reads(path, kind, "old")
    if kind == "qcow2":
        image = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={path}"
        run("qemu-img", "check", "--object", "secret,id=s,data=new", "--image-opts", image)


@pytest.mark.parametrize("fix", ["none", "leaks"])
def test_checks(fix, room):
    """A check writes nothing, a repair may fail; what it found is given back when there is room."""
    path = room.path / "i.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", "-c", "discard 1M 1M", path)
    image = Image(path)
    free = [c for c in range(image.size // 4096) if image.refcount(c * 4096) == 0]
    for cluster in free[10:22]:
        image.set_refcount(cluster * 4096, 1)
    with DaemonProcess(room.path) as daemon:
        qmp = daemon.qmp()
        qmp("x-liveblock-events")
        qmp("blockdev-add", driver="qcow2", node_name="disk",
            file={"driver": "file", "filename": "i.qcow2"})  # fmt: skip

        def once(number):
            qmp("x-liveblock-check", job_id=f"c{number}", node="disk", fix=fix, auto_dismiss=False)
            qmp.wait("JOB_STATUS_CHANGE", id=f"c{number}", status="concluded")
            (job,) = qmp("query-jobs")
            qmp("job-dismiss", id=f"c{number}")
            return job.get("error")

        room.fill()
        failed = once(0)
        assert failed == (room.message if fix == "leaks" and room.kind == "quota" else None)
        room.more(96)
        assert once(1) is None
        found = qmp("x-liveblock-query-check", job_id="c1")[0]
        assert found["corruptions"] == 0 and found["leaks"] == (12 if fix == "none" else 0)
        qmp("quit")
    assert check(path) == ({"leaks": 12} if fix == "none" else {})
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 1 2M 2M", path)
