"""The journal of jobs: daemons that are killed or stopped at work, and the one that comes after."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from liveblockd.daemon.journal import _place
from tests.support.daemon import DaemonProcess, QmpError, nbd_write

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")

MIB = 1 << 20


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=60).stdout


@pytest.fixture
def images(tmp_path):
    """base <- mid <- top, of 4 MiB: each has some of it."""
    for name, below, writes in (
        ("base", None, ["write -P 1 0 4M"]),
        ("mid", "base", ["write -P 2 1M 2M"]),
        ("top", "mid", ["write -P 3 2M 64k"]),
    ):
        backing = ("-b", f"{below}.qcow2", "-F", "qcow2") if below else ()
        run(
            "qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{name}.qcow2", "4M", cwd=tmp_path
        )
        for write in writes:
            run("qemu-io", "-f", "qcow2", "-c", write, f"{name}.qcow2", cwd=tmp_path)
    return tmp_path


DRIVE = ("--drive", "file=top.qcow2,id=d,format=qcow2,node-name=n")


def daemon(directory, *options, journal="journal=journal"):
    return DaemonProcess(directory, "--jobs", journal, *DRIVE, *options)


def remembered(qmp):
    return {job["id"]: job for job in qmp("x-liveblock-query-job-journal")}


def until_copying(qmp, job):
    while not any(j["device"] == job and j["offset"] for j in qmp("query-block-jobs")):
        pass


def killed_at_work(directory, command, **arguments):
    """A daemon that is killed while a slow job copies."""
    with daemon(directory) as first:
        qmp = first.qmp()
        qmp(command, device="d", job_id="j", speed=MIB // 2, **arguments)
        until_copying(qmp, "j")
        qmp("block-job-set-speed", device="j", speed=MIB // 4)
        while f'"speed": {MIB // 4}}}' not in (directory / "journal").read_text():
            qmp("query-block-jobs")
        first.stop(signal.SIGKILL)
    (directory / "daemon.pid").unlink()


def reads(directory, name, pattern, offset, length):
    said = run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} {offset} {length}", name,
               cwd=directory)  # fmt: skip
    assert b"verification failed" not in said


def holds_what_it_did(directory, name):
    for pattern, offset, length in (
        (1, 0, "1M"),
        (2, "1M", "1M"),
        (3, "2M", "64k"),
        (1, "3M", "1M"),
    ):
        reads(directory, name, pattern, offset, length)
    run("qemu-img", "check", "-q", name, cwd=directory)


def backing(directory, name):
    info = json.loads(run("qemu-img", "info", "--output=json", name, cwd=directory))
    return info.get("backing-filename")


JOBS = {
    "stream all": ("block-stream", {}, "top.qcow2", None),
    "stream to base": ("block-stream", {"base": "base.qcow2"}, "top.qcow2", "base.qcow2"),
    "commit": (
        "block-commit",
        {"top": "mid.qcow2", "base": "base.qcow2"},
        "top.qcow2",
        "base.qcow2",
    ),
}


@pytest.mark.parametrize("what", JOBS)
def test_it_goes_on_after_a_kill(images, what):
    command, arguments, name, below = JOBS[what]
    killed_at_work(images, command, **arguments)
    with daemon(images) as second:
        qmp = second.qmp()
        assert remembered(qmp)["j"]["result"] == "running"
        (job,) = qmp("query-block-jobs")
        assert job["device"] == "j" and job["speed"] == MIB // 4
        qmp("block-job-set-speed", device="j", speed=0)
        qmp.wait("BLOCK_JOB_COMPLETED", device="j")
        assert remembered(qmp)["j"]["result"] == "completed"
        assert second.stop() == 0
        assert "'j' " in second.errors.decode()
    holds_what_it_did(images, name)
    assert backing(images, name) == below
    with daemon(images) as third:
        assert third.qmp()("query-block-jobs") == []


def test_a_commit_of_a_drive_goes_on(images):
    """Where its guest was last is written down, so that the base is known not to be newer."""
    killed_at_work(images, "block-commit", base="base.qcow2")
    with daemon(images) as second:
        qmp = second.qmp()
        qmp("block-job-set-speed", device="j", speed=0)
        qmp.wait("BLOCK_JOB_READY", device="j")
        qmp("block-job-complete", device="j")
        qmp.wait("BLOCK_JOB_COMPLETED", device="j")
    holds_what_it_did(images, "base.qcow2")


@pytest.mark.parametrize("base", ["mid.qcow2", "base.qcow2"])
def test_the_guest_of_a_commit_that_goes_on_comes_after_it(base, images):
    """Its export is made by QMP, as the export of a disk without a job is."""
    killed_at_work(images, "block-commit", base=base)
    with daemon(images) as second:
        qmp = second.qmp()
        address = {"type": "unix", "data": {"path": "nbd.sock"}}
        qmp("nbd-server-start", addr=address)
        qmp("block-dirty-bitmap-add", node="n", name="b", disabled=True)
        qmp("block-export-add", type="nbd", id="ro", node_name="n", name="ro", bitmaps=["b"])
        qmp("block-export-add", type="nbd", id="e", node_name="n", writable=True)
        nbd_write(str(images / "nbd.sock"), "n", 0, b"g" * 512)
        qmp("block-job-set-speed", device="j", speed=0)
        while not qmp("query-block-jobs")[0]["ready"]:  # perhaps before anybody could be told
            pass
        nbd_write(str(images / "nbd.sock"), "n", 512, b"g" * 512)
        qmp("block-job-complete", device="j")
        qmp.wait("BLOCK_JOB_COMPLETED", device="j")
        nbd_write(str(images / "nbd.sock"), "n", 1024, b"g" * 512)
    reads(images, base, ord("g"), 0, 1536)
    reads(images, base, 1, 1536, MIB - 1536)


def test_a_commit_of_an_active_node_does_not(images):
    """Its guest may have been switched over, and what it wrote to the base since be lost by it."""
    nodes = ("--blockdev", "qcow2,node-name=n,file.driver=file,file.filename=top.qcow2")
    with DaemonProcess(images, "--jobs", "journal=journal", *nodes) as first:
        qmp = first.qmp()
        base = qmp("query-named-block-nodes")
        (name,) = (n["node-name"] for n in base if n["image"]["filename"].endswith("base.qcow2")
                   and n["drv"] == "qcow2")  # fmt: skip
        qmp("block-commit", device="n", job_id="j", base_node=name, speed=MIB // 4)
        until_copying(qmp, "j")
        first.stop(signal.SIGKILL)
    (images / "daemon.pid").unlink()
    before = (images / "base.qcow2").read_bytes()
    with DaemonProcess(images, "--jobs", "journal=journal", *nodes) as second:
        qmp = second.qmp()
        assert qmp("query-block-jobs") == []
        assert remembered(qmp)["j"]["result"] == "interrupted"
        with pytest.raises(QmpError, match="is not resumed"):
            qmp("x-liveblock-resume-job", id="j")
    assert (images / "base.qcow2").read_bytes() == before


def test_it_does_not_where_that_is_not_wanted(images):
    killed_at_work(images, "block-stream")
    with daemon(images, journal="journal=journal,resume=off") as second:
        qmp = second.qmp()
        assert qmp("query-block-jobs") == []
        record = remembered(qmp)["j"]
        assert record["result"] == "interrupted" and record["type"] == "stream"
        names = [str(images / f"{name}.qcow2") for name in ("top", "mid", "base")]
        assert record["images"] == names and "base" not in record
        qmp("x-liveblock-resume-job", id="j")
        with pytest.raises(QmpError, match="No job 'j' was interrupted"):
            qmp("x-liveblock-resume-job", id="j")
        qmp("block-job-set-speed", device="j", speed=0)
        qmp.wait("BLOCK_JOB_COMPLETED", device="j")


@pytest.mark.parametrize("change", ["another chain", "another file"])
def test_it_does_not_where_images_have_changed(images, change):
    killed_at_work(images, "block-commit", top="mid.qcow2", base="base.qcow2")
    if change == "another chain":
        for name in ("mid", "top"):
            run("qemu-img", "convert", "-O", "qcow2", f"{name}.qcow2", f"{name}.new", cwd=images)
        (images / "top.new").rename(images / "top.qcow2")
        reason = "not open"
    else:
        shutil.copy(images / "mid.qcow2", images / "mid.new")
        (images / "mid.new").rename(images / "mid.qcow2")
        reason = "another file"
    before = (images / "base.qcow2").read_bytes()
    with daemon(images) as second:
        qmp = second.qmp()
        assert qmp("query-block-jobs") == []
        assert remembered(qmp)["j"]["result"] == "interrupted"
        with pytest.raises(QmpError, match=reason):
            qmp("x-liveblock-resume-job", id="j")
        second.stop()
        assert reason in second.errors.decode()
    assert (images / "base.qcow2").read_bytes() == before
    holds_what_it_did(images, "top.qcow2")


def test_one_that_was_done_before_anybody_knew(images):
    killed_at_work(images, "block-stream", base="base.qcow2")
    run("qemu-img", "rebase", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=images)
    with daemon(images) as second:
        qmp = second.qmp()
        assert qmp("query-block-jobs") == []
        assert remembered(qmp)["j"]["result"] == "completed"


def test_a_signal_interrupts_and_quit_ends(images):
    with daemon(images) as first:
        qmp = first.qmp()
        qmp("block-stream", device="d", job_id="j", speed=MIB)
        assert first.stop() == 0
    with daemon(images) as second:
        qmp = second.qmp()
        assert [job["device"] for job in qmp("query-block-jobs")] == ["j"]
        qmp("quit")
        second.wait()
    with daemon(images) as third:
        qmp = third.qmp()
        assert qmp("query-block-jobs") == []
        assert remembered(qmp)["j"]["result"] == "cancelled"


def test_what_cannot_be_resumed_is_told(images):
    with daemon(images) as first:
        qmp = first.qmp()
        qmp("drive-mirror", device="d", job_id="m", target="copy.qcow2", sync="full", speed=1)
        first.stop(signal.SIGKILL)
    (images / "daemon.pid").unlink()
    with daemon(images) as second:
        command = [sys.executable, "-m", "liveblockd.ctl", "-s", "qmp.sock", "history"]
        assert b"copy.qcow2" in run(*command, cwd=images)
        record = remembered(second.qmp())["m"]
        assert record["result"] == "interrupted"
        assert record["base"] == str(images / "copy.qcow2")
        second.stop()
        assert "A job of type 'mirror' cannot be resumed" in second.errors.decode()
    with daemon(images) as third:
        qmp = third.qmp()
        with pytest.raises(QmpError, match="A job of type 'mirror' cannot be resumed"):
            qmp("x-liveblock-resume-job", id="m")
        third.stop()
        assert not third.errors, "it is told once"


EXPORT = (
    "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
    "--export", "nbd,id=e,node-name=n,name=e,writable=on",
)  # fmt: skip


class TestDrives:
    def test_it_is_opened_where_its_guest_was(self, images):
        with daemon(images, *EXPORT) as first:
            qmp = first.qmp()
            qmp("blockdev-snapshot-sync", device="d", snapshot_file="new.qcow2")
            nbd_write(str(images / "nbd.sock"), "e", 0, b"\x09" * 65536)
            first.stop(signal.SIGKILL)
        (images / "daemon.pid").unlink()
        (images / "nbd.sock").unlink()
        before = (images / "top.qcow2").read_bytes()
        with daemon(images, *EXPORT) as second:
            (drive,) = second.qmp()("query-block")
            assert drive["inserted"]["image"]["filename"] == str(images / "new.qcow2")
            nbd_write(str(images / "nbd.sock"), "e", 65536, b"\x08" * 65536)
            second.stop()
            assert "was last on" in second.errors.decode()
        reads(images, "new.qcow2", 8, "64k", "64k")
        assert (images / "top.qcow2").read_bytes() == before, "a guest's write below an overlay"

    def test_it_is_back_after_a_commit(self, images):
        with daemon(images) as first:
            qmp = first.qmp()
            qmp("blockdev-snapshot-sync", device="d", snapshot_file="new.qcow2")
            qmp("block-commit", device="d", job_id="j", base="top.qcow2")
            qmp.wait("BLOCK_JOB_READY")
            qmp("block-job-complete", device="j")
            qmp.wait("BLOCK_JOB_COMPLETED")
            first.stop(signal.SIGKILL)
        (images / "daemon.pid").unlink()
        with daemon(images) as second:
            (drive,) = second.qmp()("query-block")
            assert drive["inserted"]["image"]["filename"] == "top.qcow2"
            second.stop()
            assert "was last on" not in second.errors.decode()

    @pytest.mark.parametrize("name", ["top.qcow2", "new.qcow2"])
    def test_another_file_of_that_name_is_an_error(self, images, name):
        with daemon(images) as first:
            first.qmp()("blockdev-snapshot-sync", device="d", snapshot_file="new.qcow2")
            first.stop()
        shutil.copy(images / name, images / "other")
        (images / "other").rename(images / name)
        said = f"Drive 'd' was last on .*, but '{images / name}' is another file now"
        with pytest.raises(AssertionError, match=said), daemon(images):
            pass
        (images / "journal").unlink()
        with daemon(images) as second:
            (drive,) = second.qmp()("query-block")
            assert drive["inserted"]["image"]["filename"] == "top.qcow2"

    def test_the_configuration_is_obeyed_when_it_changes(self, images):
        with daemon(images) as first:
            first.qmp()("blockdev-snapshot-sync", device="d", snapshot_file="new.qcow2")
            first.stop()
        for name in ("new", "mid", "top"):  # what was known is forgotten with the second
            drive = ("--drive", f"file={name}.qcow2,id=d,format=qcow2")
            with DaemonProcess(images, "--jobs", "journal=journal", *drive) as next_one:
                (found,) = next_one.qmp()("query-block")
                assert found["inserted"]["image"]["filename"] == f"{name}.qcow2"

    def test_an_overlay_that_has_gone_is_an_error(self, images):
        with daemon(images) as first:
            first.qmp()("blockdev-snapshot-sync", device="d", snapshot_file="new.qcow2")
            first.stop()
        (images / "new.qcow2").unlink()
        with pytest.raises(AssertionError, match="was last on"), daemon(images):
            pass


def test_one_daemon_a_journal(images):
    with daemon(images):
        other = DaemonProcess(images, "--jobs", "journal=journal", "--pidfile", "other.pid")
        _, errors = other.process.communicate(timeout=20)
        assert other.process.returncode == 1
        assert b"'journal' belongs to a running daemon" in errors


def test_under_systemd_it_is_in_the_state_directory(images):
    with DaemonProcess(images, environment={"STATE_DIRECTORY": str(images)}) as only:
        assert remembered(only.qmp()) == {}
    assert (images / "jobs.journal").exists()


def test_without_a_journal(images):
    with DaemonProcess(images, *DRIVE) as without:
        qmp = without.qmp()
        for name, arguments in (("query-job-journal", {}), ("resume-job", {"id": "j"})):
            with pytest.raises(QmpError, match="There is no journal"):
                qmp(f"x-liveblock-{name}", **arguments)


def test_a_journal_that_cannot_be_made(images):
    with (
        pytest.raises(AssertionError, match="Could not open 'nowhere/journal'"),
        daemon(images, journal="journal=nowhere/journal"),
    ):
        pass


def test_a_drive_on_a_node_without_a_plain_name_is_opened_there(images):
    with daemon(images) as first:
        qmp = first.qmp()
        qmp("blockdev-add", driver="null-co", node_name="away", size=4 * MIB, read_zeroes=True)
        qmp("blockdev-mirror", device="d", target="away", job_id="m", sync="none")
        qmp.wait("BLOCK_JOB_READY", device="m")
        qmp("block-job-complete", device="m")
        qmp.wait("BLOCK_JOB_COMPLETED", device="m")
        first.stop(signal.SIGKILL)
    (images / "daemon.pid").unlink()
    with daemon(images) as second:
        (drive,) = second.qmp()("query-block")
        assert drive["inserted"]["drv"] == "null-co"
        assert drive["inserted"]["image"]["virtual-size"] == 4 * MIB


@pytest.mark.parametrize(
    "one, other",
    [
        ("a", "file:a"), ("a", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}'),
        ("a", "x/../a"), ("nbd:unix:/s:exportname=e", "nbd+unix:///e?socket=/s"),
        ("nbd:h:10809:exportname=e", "nbd://h:10809/e"),
    ],
)  # fmt: skip
def test_names_of_the_same_place(one, other):
    assert _place(one) == _place(other)
    assert _place(one) != _place("nbd://elsewhere/e") != _place("b")
