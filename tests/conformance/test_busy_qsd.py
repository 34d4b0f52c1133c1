"""``busy`` of query-block-jobs, at every rest of a job: what qemu-storage-daemon says, and we.

It is false where a job waits and has nothing in flight, also while it is ready: clients that know
no BLOCK_JOB_READY look for that.
"""

import time

import pytest

from tests.support.daemon import TIMEOUT, DaemonProcess
from tests.support.qcow2_images import needs, run
from tests.support.qsd import QsdProcess

pytestmark = needs("qemu-img", "qemu-io", "qemu-storage-daemon")

KINDS = {
    "mirror": ("blockdev-mirror", {"target": "t", "sync": "full"}),
    "mirror, write-blocking": (
        "blockdev-mirror",
        {"target": "t", "sync": "full", "copy_mode": "write-blocking"},
    ),
    "mirror of what is written": ("blockdev-mirror", {"target": "t", "sync": "none"}),
    "active commit": ("block-commit", {}),
    "commit": ("block-commit", {"top_node": "mid"}),
    "stream": ("block-stream", {}),
    "backup": ("blockdev-backup", {"target": "t", "sync": "full"}),
}


@pytest.fixture(params=[QsdProcess, DaemonProcess], ids=["theirs", "ours"])
def qmp(request, tmp_path):
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "4M")
    for name, below in (("mid", "base"), ("top", "mid")):
        image = tmp_path / f"{name}.qcow2"
        run("qemu-img", "create", "-qf", "qcow2", "-b", f"{below}.qcow2", "-F", "qcow2", image)
        offset = "0" if name == "mid" else "2M"
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {offset} 2M", image)
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "t.qcow2", "4M")
    options = []
    for name, more in (
        ("base", ",read-only=on"),
        ("mid", ",read-only=on,backing=base"),
        ("top", ",backing=mid"),
        ("t", ""),
    ):
        file = f"file.driver=file,file.filename={name}.qcow2"
        options += ["--blockdev", f"qcow2,node-name={name},{file}{more}"]
    listen = ("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    export = ("--export", "nbd,id=e,node-name=top,name=top,writable=on")
    with request.param(tmp_path, *options, *listen, *export) as daemon:
        yield daemon.qmp()


def state(qmp):
    (job,) = qmp("query-block-jobs")
    return job["status"], job["busy"]


def comes_to(qmp, expected):
    """It may be on its way there."""
    deadline = time.monotonic() + TIMEOUT
    while (found := state(qmp)) != expected:
        assert time.monotonic() < deadline, f"{found}, not {expected}"
        time.sleep(0.002)


def stays(qmp, *expected):
    comes_to(qmp, expected)
    assert [state(qmp) for _ in range(5)] == [expected] * 5


def calms_down(qmp, *expected):
    """It looks for what guests have written ten times a second."""
    deadline = time.monotonic() + TIMEOUT
    looks = 0
    while looks < 8:
        looks = looks + 1 if state(qmp) == expected else 0
        assert time.monotonic() < deadline, f"never {expected} for long"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_rests_is_not_busy(kind, qmp):
    command, arguments = KINDS[kind]
    ready_at_once = arguments.get("sync") == "none"
    qmp(command, job_id="j", device="top", speed=1, auto_finalize=False, auto_dismiss=False,
        **arguments)  # fmt: skip
    if not ready_at_once:
        stays(qmp, "running", False)  # until it may copy again
        qmp("job-pause", id="j")
        stays(qmp, "paused", False)
        qmp("job-resume", id="j")
    qmp("block-job-set-speed", device="j", speed=0)
    if command == "blockdev-mirror" or kind == "active commit":
        qmp.wait("BLOCK_JOB_READY", device="j")
        stays(qmp, "ready", False)
        qmp("job-pause", id="j")
        stays(qmp, "standby", False)
        qmp("job-resume", id="j")
        stays(qmp, "ready", False)
        qmp("block-job-cancel", device="j")
    stays(qmp, "pending", False)
    qmp("job-finalize", id="j")
    stays(qmp, "concluded", False)
    qmp("job-dismiss", id="j")


@pytest.mark.parametrize("kind", ["mirror", "mirror, write-blocking", "active commit"])
def test_a_ready_job_whose_guest_writes_is_idle_again_after_it(kind, qmp, tmp_path):
    command, arguments = KINDS[kind]
    qmp(command, job_id="j", device="top", **arguments)
    qmp.wait("BLOCK_JOB_READY", device="j")
    disk = f"nbd+unix:///top?socket={tmp_path}/nbd.sock"
    for number in range(3):
        run("qemu-io", "-f", "raw", "-c", f"write -P {number + 8} 1M 2M", disk)
        calms_down(qmp, "ready", False)
    qmp("job-complete", id="j")
    qmp.wait("JOB_STATUS_CHANGE", id="j", status="null")


def test_a_job_that_waits_for_a_slow_target_is_busy(qmp):
    qmp("object-add", qom_type="throttle-group", id="g", limits={"bps-write": 1 << 22})
    qmp("blockdev-add", driver="throttle", node_name="slow", throttle_group="g", file="t")
    qmp("blockdev-mirror", job_id="j", device="top", target="slow", sync="full")
    stays(qmp, "running", True)
    qmp("block-job-cancel", device="j", force=True)
    qmp.wait("JOB_STATUS_CHANGE", id="j", status="null")
