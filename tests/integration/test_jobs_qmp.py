"""Jobs over QMP in a daemon of their own: what comes before the return and what after it."""

import shutil
import subprocess
import time

import pytest

from tests.support.daemon import DaemonProcess, QmpError

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")

END = ["waiting", "pending", "COMPLETED", "concluded", "null"]


def run(*command, cwd):
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.fixture
def images(tmp_path):
    """base <- mid <- top, 8 MiB, all of base written."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M", cwd=tmp_path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 8M", "base.qcow2", cwd=tmp_path)
    for below, name in (("base", "mid"), ("mid", "top")):
        backing = ("-b", f"{below}.qcow2", "-F", "qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{name}.qcow2", cwd=tmp_path)
    return tmp_path


@pytest.fixture
def qmp(images):
    drive = "file=top.qcow2,if=virtio,format=qcow2"
    with DaemonProcess(images, "--drive", drive) as daemon:
        client = daemon.qmp()
        client.daemon = daemon
        yield client


def short(event):
    if event["event"] == "JOB_STATUS_CHANGE":
        return event["data"]["status"]
    return event["event"].removeprefix("BLOCK_JOB_")


def before_return(client, name, **arguments):
    """The events that came before the return of a command."""
    have = len(client.events)
    client(name, **arguments)
    return [short(event) for event in client.events[have:]]


def to_null(client):
    """All further events of the job."""
    have = len(client.events)
    while not client.events[have:] or short(client.events[-1]) != "null":
        client.events.append(client.receive())
    return [short(event) for event in client.events[have:]]


def only(jobs, **members):
    (job,) = jobs
    assert {key: job[key.replace("_", "-")] for key in members} == members


def test_a_drive_lends_its_name(qmp):
    assert before_return(qmp, "block_stream", device="virtio0") == ["created", "running"]
    assert to_null(qmp) == END
    assert qmp.events[-3]["data"] == {
        "type": "stream", "device": "virtio0", "len": 8 << 20, "offset": 8 << 20, "speed": 0
    }  # fmt: skip


def test_nothing_to_do_is_over_at_the_return(qmp):
    arguments = {"device": "virtio0", "base": "mid.qcow2"}
    assert before_return(qmp, "block-stream", **arguments) == ["created", "running", *END]


def test_pause_takes_effect_at_once_and_cancel_always(qmp):
    qmp("block-stream", device="virtio0", speed=1)
    qmp("block_job_pause", device="virtio0")
    qmp.wait("JOB_STATUS_CHANGE", status="paused")  # its next piece is six days away
    (job,) = qmp("query-block-jobs")
    only([job], paused=True, status="paused", speed=1)
    assert job["offset"] in (0, 64 << 10), "at most the first piece, if that was begun"
    with pytest.raises(QmpError, match="currently paused"):
        qmp("block-job-cancel", device="virtio0")
    qmp("block-job-cancel", device="virtio0", force=True)
    qmp.wait("BLOCK_JOB_CANCELLED", device="virtio0")
    qmp.wait("JOB_STATUS_CHANGE", status="null")
    assert qmp("query-jobs") == []


def test_finalize_and_dismiss_tell_before_they_return(qmp):
    manual = {"auto_finalize": False, "auto_dismiss": False}
    qmp("block-stream", device="virtio0", base="base.qcow2", **manual)
    qmp.wait("BLOCK_JOB_PENDING")
    assert before_return(qmp, "job-finalize", id="virtio0") == ["COMPLETED", "concluded"]
    only(qmp("query-jobs"), status="concluded", current_progress=8 << 20)
    with pytest.raises(QmpError, match="in state 'concluded' cannot accept command verb"):
        qmp("job-pause", id="virtio0")
    assert before_return(qmp, "job-dismiss", id="virtio0") == ["null"]
    with pytest.raises(QmpError, match="Block job 'virtio0' not found"):
        qmp("block-job-dismiss", id="virtio0")


def test_speed_is_kept(qmp):
    started = time.monotonic()
    qmp("block-stream", device="virtio0", speed=1 << 20)
    offset = 0
    while offset < 3 << 19:  # without a limit all 8 MiB are there at the first look
        (job,) = qmp("query-block-jobs")
        offset = job["offset"]
        assert offset <= (1 << 20) * (1 + time.monotonic() - started)
        time.sleep(0.01)
    qmp("block-job-set-speed", device="virtio0", speed=0)
    qmp.wait("JOB_STATUS_CHANGE", status="null")


def test_sigterm_with_jobs_of_every_kind_of_rest(images):
    run("cp", "base.qcow2", "other.qcow2", cwd=images)
    backing = ("-b", "other.qcow2", "-F", "qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", *backing, "otop.qcow2", cwd=images)
    drives = [f"file={name}.qcow2,if=virtio,format=qcow2" for name in ("top", "otop")]
    with DaemonProcess(images, "--drive", drives[0], "--drive", drives[1]) as daemon:
        qmp = daemon.qmp()
        qmp("block-stream", device="virtio0", speed=1)
        qmp("block-job-pause", device="virtio0")
        qmp("block-stream", device="virtio1", auto_finalize=False)
        qmp.wait("BLOCK_JOB_PENDING")
        assert daemon.stop() == 0
        names = [short(event) for event in qmp.rest()]
        assert names.count("CANCELLED") == 2 and names.count("null") == 2
    for name in ("top", "otop"):
        run("qemu-img", "check", "-q", f"{name}.qcow2", cwd=images)
        run("qemu-img", "compare", "-q", f"{name}.qcow2", "base.qcow2", cwd=images)


def test_the_name_in_the_header_leads_to_the_base(images):
    """A name that the daemon can open need not be one that leads there from the image."""
    (images / "elsewhere").mkdir()
    for name in ("mid", "base"):
        run("mv", f"{name}.qcow2", "elsewhere", cwd=images)
    rebase = ("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b")
    run(*rebase, "elsewhere/mid.qcow2", "top.qcow2", cwd=images)
    run("mv", "top.qcow2", "elsewhere", cwd=images)
    run(*rebase, "mid.qcow2", "elsewhere/top.qcow2", cwd=images)
    drive = "file=elsewhere/top.qcow2,if=virtio,format=qcow2"
    with DaemonProcess(images, "--drive", drive) as daemon:
        qmp = daemon.qmp()
        qmp("block-stream", device="virtio0", base="elsewhere/base.qcow2")
        qmp.wait("JOB_STATUS_CHANGE", status="null")
        assert not qmp.events[-3]["data"].get("error")
    run("qemu-img", "compare", "-q", "top.qcow2", "base.qcow2", cwd=images / "elsewhere")
