"""Backups of disks that a guest writes to over NBD: the copy is what was there at the start."""

import contextlib
import json
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest

from tests.support.daemon import DaemonProcess, QmpError

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")

MIB = 1 << 20
SIZE = 24 * MIB


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, timeout=60)
    return done.stdout.decode()


class Guest:
    """A client of the export ``disk`` with a model of what it holds."""

    def __init__(self, path, model, seed):
        self.model = model
        self.random = random.Random(seed)
        self.slowest = 0.0
        self.errors = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rwb")
        assert self._stream.read(18)[:16] == b"NBDMAGICIHAVEOPT"
        self._stream.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 4) + b"disk")
        self._stream.flush()
        self._stream.read(10)
        self._stop = threading.Event()
        self._thread = None

    def ask(self, command, offset=0, length=0, data=b"", flags=0):
        request = struct.pack(">IHHQQI", 0x25609513, flags, command, 1, offset, length)
        began = time.monotonic()
        self._stream.write(request + data)
        self._stream.flush()
        error = struct.unpack(">II", self._stream.read(16)[:8])[1]
        self.slowest = max(self.slowest, time.monotonic() - began)
        return error

    def write(self):
        """One request of a random kind."""
        offset = self.random.randrange(SIZE // 512) * 512
        length = min(SIZE - offset, self.random.choice((512, 4096, 65536, 300_032)))
        if self.random.randrange(5):
            data = self.random.randbytes(length)
            error = self.ask(1, offset, length, data)
        else:
            data = bytes(length)
            error = self.ask(6, offset, length)
        if error:
            self.errors += 1
        else:
            self.model[offset : offset + length] = data

    def start(self):
        """Write until ``stop``."""
        self._stop.clear()

        def work():
            with contextlib.suppress(OSError, struct.error):
                while not self._stop.is_set():
                    self.write()

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def stop(self):
        self._stop.set()
        self._thread.join()

    def close(self):
        self._socket.close()


def node(name, image_format, filename=None, **members):
    file = {"driver": "file", "filename": filename or f"{name}.img"}
    return json.dumps({"driver": image_format, "node-name": name, "file": file, **members})


def new_image(directory, name, image_format, options=()):
    run("qemu-img", "create", "-q", "-f", image_format, *options, f"{name}.img", str(SIZE),
        cwd=directory)  # fmt: skip


@contextlib.contextmanager
def daemon(directory, disk_format, target_format, *, seed=0, options=(), target_options=()):
    """A daemon with ``disk`` (exported, above a base) and ``target``; (qmp, guest)."""
    generator = random.Random(seed)
    model = bytearray(SIZE)
    for start in range(0, SIZE, MIB):
        kind = generator.randrange(4)
        if kind:
            model[start : start + MIB] = generator.randbytes(4096) * 256
        if kind == 3:
            model[start : start + MIB // 2] = bytes(MIB // 2)
    (directory / "raw.bin").write_bytes(model)
    if disk_format == "qcow2":
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw.bin", "base.img", cwd=directory)
        run("qemu-img", "create", "-q", "-f", "qcow2", *options, "-b", "base.img", "-F", "qcow2",
            "disk.img", cwd=directory)  # fmt: skip
    else:
        shutil.copy(directory / "raw.bin", directory / "disk.img")
    new_image(directory, "target", target_format, target_options)
    with DaemonProcess(
        directory,
        "--blockdev", node("disk", disk_format, discard="unmap"),
        "--blockdev", node("target", target_format, discard="unmap"),
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "type=nbd,id=exp,node-name=disk,name=disk,writable=on",
    ) as process:  # fmt: skip
        qmp = process.qmp()
        qmp.daemon = process
        guest = Guest(directory / "nbd.sock", model, seed)
        try:
            for _ in range(30):
                guest.write()
            yield qmp, guest
        finally:
            guest.close()


def content(directory, name, image_format):
    run("qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", f"{name}.img", "out.bin",
        cwd=directory)  # fmt: skip
    return (directory / "out.bin").read_bytes()


KINDS = [
    ("qcow2", "qcow2", {}, ()),
    ("qcow2", "qcow2", {"compress": True}, ("-o", "compression_type=zstd")),
    ("qcow2", "raw", {}, ()),
    ("raw", "qcow2", {}, ("-o", "cluster_size=4k")),
    ("raw", "raw", {}, ()),
    ("qcow2", "qcow2", {"x_perf": {"max-workers": 1, "max-chunk": 262144}},
     ("-o", "cluster_size=256k,preallocation=metadata")),
]  # fmt: skip


@pytest.mark.parametrize(("disk", "target", "how", "options"), KINDS)
def test_full_backup_under_a_guest(tmp_path, disk, target, how, options):
    with daemon(tmp_path, disk, target, seed=len(options), target_options=options) as (qmp, guest):
        before = bytes(guest.model)
        qmp("blockdev-backup", device="disk", target="target", sync="full", job_id="b",
            speed=4 * MIB, **how)  # fmt: skip
        guest.start()
        time.sleep(0.3)
        qmp("block-job-set-speed", device="b", speed=0)
        qmp.wait("JOB_STATUS_CHANGE", id="b", status="null")
        guest.stop()
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
        assert not guest.errors
        assert bytes(guest.model) != before
        assert qmp.daemon.stop() == 0
    assert content(tmp_path, "target", target) == before
    assert content(tmp_path, "disk", disk) == bytes(guest.model)
    for name, kind in (("disk", disk), ("target", target)):
        if kind == "qcow2":
            run("qemu-img", "check", "-q", f"{name}.img", cwd=tmp_path)


def test_incremental_chain_by_transactions(tmp_path):
    """Full, then three increments with their bitmap's changes only; all restored and compared."""
    with daemon(tmp_path, "qcow2", "qcow2") as (qmp, guest):
        points = [bytes(guest.model)]
        qmp("transaction", actions=[
            {"type": "block-dirty-bitmap-add",
             "data": {"node": "disk", "name": "b0", "persistent": True}},
            {"type": "blockdev-backup",
             "data": {"device": "disk", "target": "target", "sync": "full", "job-id": "j0"}},
        ])  # fmt: skip
        guest.start()
        qmp.wait("JOB_STATUS_CHANGE", id="j0", status="null")
        below = "target"
        for number in range(1, 4):
            name = f"inc{number}"
            new_image(tmp_path, name, "qcow2", ("-b", f"{below}.img", "-F", "qcow2"))
            qmp("blockdev-add", **json.loads(node(name, "qcow2", backing=None)))
            guest.stop()
            points.append(bytes(guest.model))
            qmp("blockdev-backup", device="disk", target=name, sync="incremental", bitmap="b0",
                job_id=f"j{number}")  # fmt: skip
            guest.start()
            qmp.wait("JOB_STATUS_CHANGE", id=f"j{number}", status="null")
            below = name
        guest.stop()
        assert not guest.errors
        assert qmp.daemon.stop() == 0
    for name, point in zip(("target", "inc1", "inc2", "inc3"), points, strict=True):
        assert content(tmp_path, name, "qcow2") == point
    info = json.loads(run("qemu-img", "info", "--output=json", "disk.img", cwd=tmp_path))
    (bitmap,) = info["format-specific"]["data"]["bitmaps"]
    assert bitmap["flags"] == ["auto"]


def test_fleecing(tmp_path):
    """The past, read over NBD by qemu-img while the guest writes; a dirty bitmap beside it."""
    with daemon(tmp_path, "qcow2", "qcow2") as (qmp, guest):
        guest.close()
        qmp("block-export-del", id="exp", mode="hard")
        qmp.wait("BLOCK_EXPORT_DELETED", id="exp")
        qmp("block-dirty-bitmap-add", node="disk", name="b0", disabled=True)
        qmp("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk",
            target="target")  # fmt: skip
        qmp("blockdev-add", driver="snapshot-access", node_name="past", file="cbw", read_only=True)
        qmp("block-export-add", type="nbd", id="exp", node_name="cbw", name="disk", writable=True)
        qmp("block-export-add", type="nbd", id="old", node_name="past", name="past")
        guest = Guest(tmp_path / "nbd.sock", guest.model, 5)
        before = bytes(guest.model)
        guest.start()
        for _ in range(3):
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", "nbd+unix:///past?socket=nbd.sock",
                "past.bin", cwd=tmp_path)  # fmt: skip
            assert (tmp_path / "past.bin").read_bytes() == before
        guest.stop()
        assert not guest.errors
        assert bytes(guest.model) != before
        guest.close()
        for export in ("old", "exp"):
            qmp("block-export-del", id=export, mode="hard")
            qmp.wait("BLOCK_EXPORT_DELETED", id=export)
        for name in ("past", "cbw"):
            qmp("blockdev-del", node_name=name)
    assert content(tmp_path, "disk", "qcow2") == bytes(guest.model)


@pytest.mark.skipif(not shutil.which("nbdinfo"), reason="nbdinfo is not installed")
def test_a_dirty_bitmap_is_exported(tmp_path):
    with daemon(tmp_path, "qcow2", "qcow2") as (qmp, guest):
        qmp("block-dirty-bitmap-add", node="disk", name="b0", granularity=65536)
        guest.ask(1, 3 * 65536, 512, b"x" * 512)
        guest.ask(1, 7 * 65536 - 512, 1024, b"x" * 1024)
        with pytest.raises(QmpError, match="Enabled bitmap 'b0' incompatible with readonly export"):
            qmp("block-export-add", type="nbd", id="ro", node_name="disk", name="r", bitmaps=["b0"])
        with pytest.raises(QmpError, match="Bitmap 'no' is not found"):
            qmp("block-export-add", type="nbd", id="ro", node_name="disk", name="r",
                writable=True, bitmaps=["b0", "no"])  # fmt: skip
        qmp("block-dirty-bitmap-disable", node="disk", name="b0")
        qmp("block-export-add", type="nbd", id="ro", node_name="disk", name="r",
            bitmaps=[{"node": "disk", "name": "b0"}])  # fmt: skip
        text = run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0",
                   "nbd+unix:///r?socket=nbd.sock", cwd=tmp_path)  # fmt: skip
        assert [(e["offset"], e["length"]) for e in json.loads(text) if e["type"]] == [
            (3 * 65536, 65536), (6 * 65536, 2 * 65536)
        ]  # fmt: skip
        busy = "Bitmap 'b0' is currently in use by another operation and cannot be used"
        for name in ("clear", "remove", "enable"):
            with pytest.raises(QmpError, match=busy):
                qmp(f"block-dirty-bitmap-{name}", node="disk", name="b0")
        with pytest.raises(QmpError, match=busy):
            qmp("blockdev-backup", device="disk", target="target", sync="incremental",
                bitmap="b0", job_id="b")  # fmt: skip
        qmp("block-export-del", id="ro")
        qmp.wait("BLOCK_EXPORT_DELETED", id="ro")
        qmp("block-dirty-bitmap-clear", node="disk", name="b0")


def test_a_full_target_stops_the_backup_and_no_guest(tmp_path):
    """on-target-error=stop waits for room; with break-snapshot the guest notices nothing."""
    with daemon(tmp_path, "raw", "raw") as (qmp, guest):
        rule = {"event": "none", "errno": 28, "iotype": "write", "once": True}
        qmp("blockdev-add", driver="blkdebug", node_name="full", image="target",
            inject_error=[rule])  # fmt: skip
        before = bytes(guest.model)
        qmp("blockdev-backup", device="disk", target="full", sync="full", job_id="b",
            on_target_error="enospc", on_cbw_error="break-snapshot")  # fmt: skip
        qmp.wait("BLOCK_JOB_ERROR", operation="write", action="stop")
        qmp.wait("JOB_STATUS_CHANGE", id="b", status="paused")
        (job,) = qmp("query-block-jobs")
        assert job["io-status"] == "nospace"
        for _ in range(20):
            guest.write()
        assert not guest.errors
        qmp("block-job-resume", device="b")
        qmp.wait("JOB_STATUS_CHANGE", id="b", status="null")
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
        assert qmp.daemon.stop() == 0
    assert content(tmp_path, "target", "raw") == before


@pytest.mark.parametrize(
    ("sync", "how", "backing"),
    [
        ("full", {}, None),
        ("full", {"format": "raw"}, None),
        ("top", {}, "base.img"),
        ("none", {}, "disk.img"),
        ("full", {"mode": "existing", "format": "qcow2"}, None),
    ],
)
def test_drive_backup_makes_its_target(tmp_path, sync, how, backing):
    with daemon(tmp_path, "qcow2", "qcow2") as (qmp, guest):
        before = bytes(guest.model)
        if "mode" in how:
            new_image(tmp_path, "new", "qcow2")
            run("qemu-io", "-f", "qcow2", "-c", f"write -P 0xee 0 {SIZE}", "new.img", cwd=tmp_path)
        actions = [{"type": "drive-backup", "data": {
            "device": "disk", "target": "new.img", "sync": sync, "job-id": "b", **how
        }}]  # fmt: skip
        qmp("transaction", actions=actions, properties={"completion-mode": "grouped"})
        guest.start()
        if sync == "none":
            time.sleep(0.3)
            qmp("block-job-cancel", device="b")
        qmp.wait("JOB_STATUS_CHANGE", id="b", status="null")
        guest.stop()
        assert not guest.errors
        kind = how.get("format", "qcow2")
        info = json.loads(run("qemu-img", "info", "--output=json", "new.img", cwd=tmp_path))
        assert info["format"] == kind
        assert info.get("backing-filename") == backing
        nodes = {n["node-name"] for n in qmp("query-named-block-nodes", flat=True)}
        assert {n for n in nodes if not n.startswith("#")} == {"disk", "target"}
        with pytest.raises(QmpError, match="Could not create '/nowhere/x': No such file"):
            qmp("drive-backup", device="disk", target="/nowhere/x", sync="full", job_id="c")
        with pytest.raises(QmpError, match="Unknown file format 'x'"):
            qmp("drive-backup", device="disk", target="x", sync="full", job_id="c", format="x")
        with pytest.raises(QmpError, match="Invalid job ID ''"):
            qmp("drive-backup", device="disk", target="gone.img", sync="full")
        assert not (tmp_path / "gone.img").exists()
        with pytest.raises(QmpError):
            qmp("drive-backup", device="disk", target="disk.img", sync="full", job_id="c")
        assert qmp.daemon.stop() == 0
    assert content(tmp_path, "disk", "qcow2") == bytes(guest.model)
    if sync != "none":
        assert content(tmp_path, "new", kind) == before


def test_sigkill_leaves_the_source(tmp_path):
    with daemon(tmp_path, "qcow2", "qcow2") as (qmp, guest):
        guest.ask(3)
        flushed = bytes(guest.model)
        qmp("blockdev-backup", device="disk", target="target", sync="full", job_id="b",
            speed=8 * MIB)  # fmt: skip
        untouched = 5 * MIB
        for number in range(20):
            guest.ask(1, number * 65536, 512, b"y" * 512)
        qmp.daemon.process.send_signal(signal.SIGKILL)
        qmp.daemon.wait()
    checked = subprocess.run(["qemu-img", "check", "-q", "disk.img"], cwd=tmp_path, timeout=60)
    assert checked.returncode in (0, 3), "leaked clusters at worst"
    assert content(tmp_path, "disk", "qcow2")[untouched:] == flushed[untouched:]


@pytest.mark.parametrize("how", ["quit", "SIGTERM"])
def test_the_daemon_ends_in_the_middle_of_it(tmp_path, how):
    with daemon(tmp_path, "qcow2", "qcow2") as (qmp, guest):
        qmp("block-dirty-bitmap-add", node="disk", name="b0", persistent=True, granularity=65536)
        for _ in range(10):
            guest.write()
        qmp("blockdev-backup", device="disk", target="target", sync="incremental", bitmap="b0",
            job_id="b", speed=65536)  # fmt: skip
        guest.write()
        if how == "quit":
            qmp("quit")
            assert qmp.daemon.wait() == 0
        else:
            assert qmp.daemon.stop() == 0
    assert content(tmp_path, "disk", "qcow2") == bytes(guest.model)
    info = json.loads(run("qemu-img", "info", "--output=json", "disk.img", cwd=tmp_path))
    assert info["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"], "not lost"
    run("qemu-img", "check", "-q", "disk.img", cwd=tmp_path)
