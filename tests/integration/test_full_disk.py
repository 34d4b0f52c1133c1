"""A file system that is really full: jobs and guests are told, and nothing is lost."""

import os
import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


def run(*command, cwd, ok=(0,)):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode in ok, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def small(tmp_path):
    """A tmpfs of 24 MiB, with an overlay over a base of 32 MiB that lies elsewhere."""
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root, and mount")
    try:
        run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "32M", cwd=tmp_path)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 32M", "base.qcow2", cwd=tmp_path)
        backing = ("-b", str(tmp_path / "base.qcow2"), "-F", "qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, "top.qcow2", cwd=mount)
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def daemon_on(mount):
    return DaemonProcess(
        mount,
        *("--drive", "file=top.qcow2,if=virtio,format=qcow2,node-name=disk,discard=unmap"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"),
    )


def guest(mount, *commands, ok=(0,)):
    words = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", "-f", "raw", *words, "nbd+unix:///disk?socket=nbd.sock", cwd=mount, ok=ok)


def verdict(mount):
    """qemu-img check with leaks allowed: never an error."""
    run("qemu-img", "check", "-q", "-f", "qcow2", "top.qcow2", cwd=mount, ok=(0, 3))


def test_the_job_reports(small):
    with daemon_on(small) as daemon:
        qmp = daemon.qmp()
        guest(small, "write -P 5 1M 1M", "flush")
        qmp("block-stream", device="virtio0", job_id="s")
        end = qmp.wait("BLOCK_JOB_COMPLETED", device="s")["data"]
        assert end["error"] == "No space left on device"
        qmp.wait("JOB_STATUS_CHANGE", id="s", status="null")
        guest(small, "read -P 9 0 1M", "read -P 5 1M 1M", "read -P 9 2M 30M")
        qmp("quit")
    verdict(small)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 5 1M 1M", "top.qcow2", cwd=small)
    assert "base.qcow2" in run("qemu-img", "info", "top.qcow2", cwd=small)


@pytest.mark.parametrize("policy", ["stop", "enospc"])
def test_the_job_waits_for_space(small, policy):
    with daemon_on(small) as daemon:
        qmp = daemon.qmp()
        qmp("block-stream", device="virtio0", job_id="s", on_error=policy)
        error = qmp.wait("BLOCK_JOB_ERROR", device="s")["data"]
        assert (error["operation"], error["action"]) == ("write", "stop")
        qmp.wait("JOB_STATUS_CHANGE", id="s", status="paused")
        assert qmp("query-block-jobs")[0]["io-status"] == "nospace"
        guest(small, "read -P 9 0 32M")
        run("mount", "-o", "remount,size=64m", str(small), cwd="/")
        qmp("block-job-resume", device="s")
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED", device="s")["data"]
        qmp("quit")
    (small.parent / "base.qcow2").unlink()
    run("qemu-img", "check", "-f", "qcow2", "top.qcow2", cwd=small)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 9 0 32M", "top.qcow2", cwd=small)


SIDES = {"on_source_error": "stop", "on_target_error": "stop"}
TO_TARGET = {"device": "src", "target": "target", "sync": "full", **SIDES}


@pytest.mark.parametrize("then", ["resume", "cancel"])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("blockdev-mirror", TO_TARGET),
        ("blockdev-mirror", {**TO_TARGET, "copy_mode": "write-blocking"}),
        ("blockdev-backup", TO_TARGET),
        ("blockdev-backup", {**TO_TARGET, "compress": True}),
        ("block-commit", {"device": "over", "base_node": "disk", "on_error": "stop"}),
        ("block-commit", {"device": "over2", "top_node": "over", "base_node": "disk",
                          "on_error": "stop"}),
    ],
    ids=["mirror", "blocking", "backup", "compress", "active", "commit"],
)  # fmt: skip
def test_one_resume_is_enough(command, arguments, then, small):
    """Whatever had begun when the disk was full: it does not stop the job again."""
    folder = small.parent
    (folder / "data").write_bytes(os.urandom(32 * MIB))
    for name in ("src", "over"):
        run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", "32M", cwd=folder)
        write = ("-c", "write -s data 0 32M")
        run("qemu-io", "-f", "qcow2", *write, f"{name}.qcow2", cwd=folder)
    for name in ("target", "over2"):
        place = small if name == "target" else folder
        run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", "32M", cwd=place)
    image = "driver=qcow2,node-name={0},file.driver=file,file.filename={1}{0}.qcow2"
    more = ("--blockdev", image.format("over2", "../") + ",backing=over")
    if arguments["device"] != "over2":
        more = ()
    with DaemonProcess(
        small,
        *("--blockdev", image.format("disk", "").replace("disk.q", "top.q")),
        *("--blockdev", image.format("src", "../"), "--blockdev", image.format("target", "")),
        *("--blockdev", image.format("over", "../") + ",backing=disk"),
        *more,
    ) as daemon:
        qmp = daemon.qmp()
        qmp(command, job_id="j", **arguments)
        qmp.wait("JOB_STATUS_CHANGE", id="j", status="paused")
        assert qmp("query-block-jobs")[0]["io-status"] == "nospace"
        run("mount", "-o", "remount,size=96m", str(small), cwd="/")
        qmp.events.clear()
        if then == "cancel":
            qmp("block-job-cancel", device="j", force=True)
            qmp.wait("BLOCK_JOB_CANCELLED", device="j")
        else:
            qmp("block-job-resume", device="j")
            if command == "blockdev-mirror" or arguments["device"] == "over":
                qmp.wait("BLOCK_JOB_READY", device="j")
                qmp("job-complete", id="j")
            assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED", device="j")["data"]
        assert not [e for e in qmp.events if e["event"] == "BLOCK_JOB_ERROR"]
        qmp.wait("JOB_STATUS_CHANGE", id="j", status="null")
        qmp("quit")
    for name in ("target", "top"):
        run("qemu-img", "check", "-q", "-f", "qcow2", f"{name}.qcow2", cwd=small)
    if then == "resume":
        copied = "target" if "target" in arguments else "top"
        compare = ("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2")
        run(*compare, "../data", f"{copied}.qcow2", cwd=small)


def test_the_guest_is_told_and_goes_on(small):
    with daemon_on(small) as daemon:
        qmp = daemon.qmp()
        guest(small, "write -P 5 0 8M", "flush")
        said = guest(small, "write -P 6 8M 20M", ok=(0, 1))
        assert "No space left on device" in said or "failed" in said
        guest(small, "read -P 5 0 8M", "read -P 9 28M 4M")
        guest(small, "write -P 7 0 8M", "flush", "discard 0 4M", "flush", "read -P 7 4M 4M")
        qmp("quit")
    verdict(small)
    commands = ("-c", "read -P 0 0 4M", "-c", "read -P 7 4M 4M", "-c", "read -P 9 28M 4M")
    run("qemu-io", "-r", "-f", "qcow2", *commands, "top.qcow2", cwd=small)


@pytest.mark.parametrize("mode", ["full", "falloc"])
def test_a_disk_that_cannot_be_preallocated_keeps_its_size(small, mode):
    with daemon_on(small) as daemon:
        qmp = daemon.qmp()
        guest(small, "write -P 5 0 1M", "flush")
        for line in (f"truncate -m {mode} 96M", "length", f"truncate -m {mode} 40M", "length"):
            assert qmp("human-monitor-command", command_line=f'qemu-io disk "{line}"') == ""
        guest(small, "write -P 6 39M 1M", "read -P 0 32M 7M", "read -P 5 0 1M", "read -P 9 1M 31M")
        qmp("quit")
        daemon.wait()
        said = daemon.output.decode()
    assert "qemu-io: No space left on device" in said
    assert [line for line in said.splitlines() if line.endswith("MiB")] == ["32 MiB", "40 MiB"]
    verdict(small)


@pytest.mark.parametrize("mode", ["full", "falloc"])
@pytest.mark.parametrize("driver", ["file", "qcow2", "luks"])
def test_an_image_that_cannot_be_made_takes_no_room(driver, mode, small):
    """Its job says why; the node can be used for one that fits."""
    (small / "node").touch()
    with DaemonProcess(
        small,
        *("--object", "secret,id=s,data=secret"),
        *("--blockdev", "driver=file,node-name=node,filename=node"),
    ) as daemon:
        qmp = daemon.qmp()

        def create(size, **more):
            place = {"filename": "new"} if driver == "file" else {"file": "node"}
            options = {"driver": driver, **place, "size": size, **more}
            if driver == "luks":
                options |= {"key-secret": "s", "iter-time": 10}
            qmp("blockdev-create", job_id="j", options=options)
            qmp.wait("JOB_STATUS_CHANGE", id="j", status="concluded")
            (job,) = qmp("query-jobs")
            qmp("job-dismiss", id="j")
            qmp.events.clear()
            return job.get("error")

        free = os.statvfs(small).f_bavail
        assert "No space left on device" in create(64 * MIB, preallocation=mode)
        assert (free - os.statvfs(small).f_bavail) * os.statvfs(small).f_frsize < MIB
        assert create(4 * MIB, preallocation=mode) is None
        if driver == "qcow2":
            qmp("blockdev-add", driver="qcow2", node_name="image", file="node")
        qmp("quit")
    if driver == "qcow2":
        run("qemu-img", "check", "-q", "-f", "qcow2", "node", cwd=small)
