"""Every live operation under a Linux guest that works on its file system and checks it itself.

Afterwards the file system is checked by e2fsck, and the images by qemu-img.
"""

import hashlib
import json
import random
import shutil
import signal

import pytest

from tests.guest.machine import PATIENCE, Guest, missing
from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import check, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing()), reason=missing() or "there can be a guest"),
]

MIB = 1024 * 1024
DISK = 96 * MIB
#: bytes a second of a job until the guest has got on beside it
SPEED = 64 * 1024


@pytest.fixture
def host(tmp_path):
    """A disk with an old file system, and a daemon that exports it."""
    make_disk(tmp_path)
    with Host(tmp_path) as host:
        yield host


def make_disk(directory):
    """``a.qcow2``: ext4 with 24 MiB of files, each of which has the name that ``init`` expects."""
    rng = random.Random("disk")
    files = directory / "files"
    for name in ("old", "writing", "trimming"):
        (files / name).mkdir(parents=True)
    for _ in range(24):
        data = rng.randbytes(MIB)
        (files / "old" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    raw = directory / "a.raw"
    run("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", files, raw, f"{DISK // 1024}k")
    run("qemu-img", "convert", "-O", "qcow2", raw, directory / "a.qcow2")
    raw.unlink()
    shutil.rmtree(files)


class Host:
    """The daemon, its drive ``virtio0`` and the guest's export."""

    def __init__(self, directory, image="a.qcow2"):
        self.directory = directory
        self.nbd = directory / "nbd.sock"
        self.daemon = DaemonProcess(
            directory,
            "--drive", f"id=virtio0,file={image},format=qcow2,node-name=a,discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.nbd}",
            "--export", "type=nbd,id=export0,node-name=a,name=disk,writable=on",
        )  # fmt: skip

    def __enter__(self):
        self.daemon.__enter__()
        self.qmp = self.daemon.qmp()
        self.qmp.socket.settimeout(PATIENCE)  # the guest takes most of the processor
        return self

    def __exit__(self, *exc):
        self.daemon.__exit__(*exc)

    def guest(self):
        return Guest(self.directory, self.nbd, "disk")

    def stop(self):
        """The daemon ends as a service does, with everything written."""
        assert self.daemon.stop() == 0, self.daemon.errors

    def snapshot(self, name):
        self.qmp("blockdev-snapshot-sync", device="virtio0", snapshot_file=f"{name}.qcow2",
                 snapshot_node_name=name, format="qcow2")  # fmt: skip

    def job(self, guest, command, *, complete=False, **arguments):
        """Run a job; the guest works before, meanwhile and afterwards."""
        guest.wait(2)
        self.qmp(command, job_id="job", speed=SPEED, **arguments)
        self.let_go(guest, "job")
        if complete:
            self.qmp.wait("BLOCK_JOB_READY", device="job")
            guest.wait(12)
            self.qmp("block-job-complete", device="job")
        self.completed("job")
        guest.wait(2)

    def let_go(self, guest, *jobs):
        """The jobs have begun, slowly: the guest does not wait for them."""
        guest.wait(2)
        for job in jobs:
            self.qmp("block-job-set-speed", device=job, speed=0)

    def completed(self, *jobs):
        for job in jobs:
            ended = self.qmp.wait("BLOCK_JOB_COMPLETED", device=job)
            assert "error" not in ended["data"], ended
            self.qmp.events.remove(ended)


def chain(directory, name):
    """Names of the images of a chain without ``.qcow2``, from the top, as the headers say."""
    info = ("qemu-img", "info", "-U", "--backing-chain", "--output=json")
    told = json.loads(run(*info, directory / f"{name}.qcow2"))
    return [image["filename"].removesuffix(".qcow2").rpartition("/")[2] for image in told]


def assert_sound(directory, *names, crashed=False, leaks=False):
    """The images are, and so is the file system in the first one, as QEMU's tools read it."""
    for name in names:
        found = check(directory / f"{name}.qcow2")
        assert not found or (leaks and set(found) == {"leaks"}), (name, found)
    raw = directory / "sound.raw"
    run("qemu-img", "convert", "-O", "raw", directory / f"{names[0]}.qcow2", raw)
    if crashed:
        run("e2fsck", "-p", "-E", "journal_only", raw)  # what a mount would do first
    run("e2fsck", "-f", "-n", raw)
    raw.unlink()


def test_merge(host, tmp_path):
    with host.guest() as guest:
        for name in "bcd":
            guest.wait(6)
            host.snapshot(name)
        host.job(guest, "block-stream", device="virtio0", base="a.qcow2")
        assert chain(tmp_path, "d") == ["d", "a"]
        (tmp_path / "b.qcow2").unlink()
        (tmp_path / "c.qcow2").unlink()
        host.job(guest, "block-stream", device="virtio0")
        (tmp_path / "a.qcow2").unlink()
        guest.finish()
    host.stop()
    assert chain(tmp_path, "d") == ["d"]
    assert_sound(tmp_path, "d")


def test_commits(host, tmp_path):
    with host.guest() as guest:
        for name in "bcd":
            guest.wait(6)
            host.snapshot(name)
        guest.wait(6)
        host.job(guest, "block-commit", device="virtio0", top_node="c", base_node="b")
        assert chain(tmp_path, "d") == ["d", "b", "a"]
        host.job(guest, "block-commit", device="virtio0", complete=True)
        (tmp_path / "d.qcow2").unlink()
        (tmp_path / "b.qcow2").unlink()
        guest.wait(6)
        guest.finish()
    host.stop()
    assert_sound(tmp_path, "a")


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_mirror(host, tmp_path, mode):
    with host.guest() as guest:
        host.snapshot("b")
        guest.wait(6)
        host.job(guest, "drive-mirror", device="virtio0", target="new.qcow2", format="qcow2",
                 sync="full", copy_mode=mode, node_name="new", complete=True)  # fmt: skip
        (tmp_path / "a.qcow2").unlink()
        (tmp_path / "b.qcow2").unlink()
        guest.wait(6)
        guest.finish()
    host.stop()
    assert_sound(tmp_path, "new")


JOBS = {
    "merge": ("block-stream", {"device": "virtio0"}),
    "commit": ("block-commit", {"device": "virtio0", "top_node": "b", "base_node": "a"}),
    "active commit": ("block-commit", {"device": "virtio0"}),
    "mirror": ("drive-mirror", {"device": "virtio0", "target": "new.qcow2", "format": "qcow2",
                                "sync": "full", "copy_mode": "write-blocking"}),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_killed(host, tmp_path, job):
    """SIGKILL in the middle of a job: the guest's disk is as it was then, without repair."""
    command, arguments = JOBS[job]
    with host.guest() as guest:
        for name in "bc":
            guest.wait(6)
            host.snapshot(name)
        host.qmp(command, job_id="job", speed=4 * MIB, **arguments)
        guest.wait(2)
        host.daemon.stop(signal.SIGKILL)
        kept = guest.kept()
    host.daemon.pidfile.unlink()  # who waits for the next daemon looks for it
    with Host(tmp_path, "c.qcow2") as host:
        with Guest(tmp_path, host.nbd, "disk", only_check=True, must=kept) as guest:
            guest.ended()
        host.stop()
    assert_sound(tmp_path, "c", leaks=True)


def backup(host, guest, number):
    """An incremental backup, and a full one of the same instant to hold it against."""

    def copy(job, **how):
        data = {"job-id": job, "device": "a", "target": job, "speed": SPEED, **how}
        return {"type": "blockdev-backup", "data": data}

    full, part = f"full{number}", f"part{number}"
    for name in (full, part):
        host.qmp("blockdev-add", driver="qcow2", node_name=name, backing=None,
                 file={"driver": "file", "filename": f"{name}.qcow2"})  # fmt: skip
    guest.wait(4)
    if number == 0:
        bitmap = {"node": "a", "name": "since", "persistent": True}
        actions = [{"type": "block-dirty-bitmap-add", "data": bitmap}, copy(part, sync="full")]
    else:
        actions = [copy(part, sync="incremental", bitmap="since")]
    host.qmp("transaction", actions=[*actions, copy(full, sync="full")])
    host.let_go(guest, full, part)
    host.completed(full, part)
    for name in (full, part):
        host.qmp("blockdev-del", node_name=name)


def create(directory, name, backing=None):
    below = ("-b", f"{backing}.qcow2", "-F", "qcow2") if backing else ()
    run("qemu-img", "create", "-q", "-f", "qcow2", *below, directory / f"{name}.qcow2", f"{DISK}")


def test_backups(host, tmp_path):
    """One full and three incremental backups; the last but one after the daemon came back."""
    names = [f"part{number}" for number in range(4)]
    for number, name in enumerate(names):
        create(tmp_path, name, names[number - 1] if number else None)
        create(tmp_path, f"full{number}")
    with host.guest() as guest:
        backup(host, guest, 0)
        backup(host, guest, 1)
        guest.finish()
    host.stop()
    with Host(tmp_path) as host, host.guest() as guest:
        backup(host, guest, 2)
        backup(host, guest, 3)
        guest.finish()
        host.stop()
    assert_sound(tmp_path, "a")
    for number, name in enumerate(names):
        run("qemu-img", "compare", tmp_path / f"full{number}.qcow2", tmp_path / f"{name}.qcow2")
        assert_sound(tmp_path, name, f"full{number}", crashed=True)
    create(tmp_path, "restored", "part3")
    with Host(tmp_path, "restored.qcow2") as host:
        with Guest(tmp_path, host.nbd, "disk", only_check=True) as guest:
            guest.ended()
        host.stop()
    assert_sound(tmp_path, "restored")
