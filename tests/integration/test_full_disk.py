"""A file system that is really full: jobs and guests are told, and nothing is lost."""

import os
import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess, QmpError
from tests.support.room import KINDS, Room

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


def run(*command, cwd, ok=(0,)):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode in ok, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=KINDS)
def room(tmp_path, request):
    """24 MiB, with an overlay over a base of 32 MiB that lies elsewhere (``room.elsewhere``)."""
    with Room(tmp_path / "small", request.param) as room:
        room.elsewhere = tmp_path
        run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "32M", cwd=tmp_path)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 32M", "base.qcow2", cwd=tmp_path)
        backing = ("-b", str(tmp_path / "base.qcow2"), "-F", "qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, "top.qcow2", cwd=room.path)
        yield room


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


def test_the_job_reports(room):
    with daemon_on(room.path) as daemon:
        qmp = daemon.qmp()
        guest(room.path, "write -P 5 1M 1M", "flush")
        qmp("block-stream", device="virtio0", job_id="s")
        end = qmp.wait("BLOCK_JOB_COMPLETED", device="s")["data"]
        assert end["error"] == room.message
        qmp.wait("JOB_STATUS_CHANGE", id="s", status="null")
        guest(room.path, "read -P 9 0 1M", "read -P 5 1M 1M", "read -P 9 2M 30M")
        qmp("quit")
    verdict(room.path)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 5 1M 1M", "top.qcow2", cwd=room.path)
    assert "base.qcow2" in run("qemu-img", "info", "top.qcow2", cwd=room.path)


@pytest.mark.parametrize("policy", ["stop", "enospc"])
def test_the_job_waits_for_space(room, policy):
    with daemon_on(room.path) as daemon:
        qmp = daemon.qmp()
        qmp("block-stream", device="virtio0", job_id="s", on_error=policy)
        error = qmp.wait("BLOCK_JOB_ERROR", device="s")["data"]
        assert (error["operation"], error["action"]) == ("write", "stop")
        qmp.wait("JOB_STATUS_CHANGE", id="s", status="paused")
        assert qmp("query-block-jobs")[0]["io-status"] == "nospace"
        guest(room.path, "read -P 9 0 32M")
        room.more(64)
        qmp("block-job-resume", device="s")
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED", device="s")["data"]
        qmp("quit")
    (room.elsewhere / "base.qcow2").unlink()
    run("qemu-img", "check", "-f", "qcow2", "top.qcow2", cwd=room.path)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 9 0 32M", "top.qcow2", cwd=room.path)


SIDES = {"on_source_error": "stop", "on_target_error": "stop"}
TO_TARGET = {"device": "src", "target": "target", "sync": "full", **SIDES}


# Each takes half a second of a processor; a quota is told by another error, to the same code.
SOONER_OR_LATER = [
    pytest.param(kind, then, marks=[pytest.mark.slow] * (kind == "quota" and then != "resume"))
    for kind in KINDS
    for then in ("resume", "cancel", "ignore")
]


@pytest.mark.parametrize(("room", "then"), SOONER_OR_LATER, indirect=["room"])
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
def test_one_resume_is_enough(command, arguments, then, room):
    """Whatever had begun when the disk was full: it does not stop the job again.

    ``ignore``: what failed is tried again, until there is room.
    """
    folder = room.elsewhere
    (folder / "data").write_bytes(os.urandom(32 * MIB))
    for name in ("src", "over"):
        run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", "32M", cwd=folder)
        write = ("-c", "write -s data 0 32M")
        run("qemu-io", "-f", "qcow2", *write, f"{name}.qcow2", cwd=folder)
    for name in ("target", "over2"):
        place = room.path if name == "target" else folder
        run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", "32M", cwd=place)
    image = "driver=qcow2,node-name={0},file.driver=file,file.filename={1}{0}.qcow2"
    more = ("--blockdev", image.format("over2", f"{folder}/") + ",backing=over")
    if arguments["device"] != "over2":
        more = ()
    with DaemonProcess(
        room.path,
        *("--blockdev", image.format("disk", "").replace("disk.q", "top.q")),
        *("--blockdev", image.format("src", f"{folder}/")),
        *("--blockdev", image.format("target", "")),
        *("--blockdev", image.format("over", f"{folder}/") + ",backing=disk"),
        *more,
    ) as daemon:
        qmp = daemon.qmp()
        if then == "ignore":
            arguments = {k: "ignore" if v == "stop" else v for k, v in arguments.items()}
            qmp(command, job_id="j", **arguments)
            qmp.wait("BLOCK_JOB_ERROR", device="j", operation="write", action="ignore")
        else:
            qmp(command, job_id="j", **arguments)
            qmp.wait("JOB_STATUS_CHANGE", id="j", status="paused")
            assert qmp("query-block-jobs")[0]["io-status"] == "nospace"
        room.more(96)
        qmp.events.clear()
        if then == "cancel":
            qmp("block-job-cancel", device="j", force=True)
            qmp.wait("BLOCK_JOB_CANCELLED", device="j")
        else:
            if then == "resume":
                qmp("block-job-resume", device="j")
            if command == "blockdev-mirror" or arguments["device"] == "over":
                qmp.wait("BLOCK_JOB_READY", device="j")
                qmp("job-complete", id="j")
            assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED", device="j")["data"]
        if then != "ignore":  # of which some may still have been on their way
            assert not [e for e in qmp.events if e["event"] == "BLOCK_JOB_ERROR"]
        qmp.wait("JOB_STATUS_CHANGE", id="j", status="null")
        qmp("quit")
    for name in ("target", "top"):
        run("qemu-img", "check", "-q", "-f", "qcow2", f"{name}.qcow2", cwd=room.path)
    if then != "cancel":
        copied = "target" if "target" in arguments else "top"
        compare = ("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2")
        run(*compare, f"{folder}/data", f"{copied}.qcow2", cwd=room.path)


def test_the_guest_is_told_and_goes_on(room):
    with daemon_on(room.path) as daemon:
        qmp = daemon.qmp()
        guest(room.path, "write -P 5 0 8M", "flush")
        said = guest(room.path, "write -P 6 8M 20M", ok=(1,))
        assert "write failed: No space left on device" in said  # NBD has one word for both
        guest(room.path, "read -P 5 0 8M", "read -P 9 28M 4M")
        if not room.shrinks:  # what is overwritten takes room as well
            room.more(48)
        guest(room.path, "write -P 7 0 8M", "flush", "discard 0 4M", "flush", "read -P 7 4M 4M")
        qmp("quit")
    verdict(room.path)
    commands = ("-c", "read -P 0 0 4M", "-c", "read -P 7 4M 4M", "-c", "read -P 9 28M 4M")
    run("qemu-io", "-r", "-f", "qcow2", *commands, "top.qcow2", cwd=room.path)


SNAPSHOT = {"device": "virtio0", "snapshot_file": "new.qcow2", "format": "qcow2"}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("blockdev-snapshot-sync", SNAPSHOT),
        ("transaction", {"actions": [
            {"type": "blockdev-snapshot-sync",
             "data": {key.replace("_", "-"): value for key, value in SNAPSHOT.items()}}]}),
        ("blockdev-snapshot-internal-sync", {"device": "virtio0", "name": "s"}),
        ("block_resize", {"device": "virtio0", "size": 8 << 40}),
        ("drive-backup", {"device": "virtio0", "target": "new.qcow2", "sync": "none",
                          "job_id": "j"}),
        ("drive-mirror", {"device": "virtio0", "target": "new.qcow2", "sync": "none",
                          "job_id": "j"}),
        ("human-monitor-command", {"command_line": "snapshot_blkdev virtio0 new.qcow2"}),
    ],
)  # fmt: skip
def test_what_finds_no_room_changes_nothing(command, arguments, room):
    """It is refused, leaves no file, and can be done when there is room."""
    with daemon_on(room.path) as daemon:
        qmp = daemon.qmp()
        guest(room.path, "write -P 5 0 2M", "flush")
        room.fill()
        before = qmp("query-named-block-nodes", flat=True), sorted(os.listdir(room.path))
        if command == "human-monitor-command":
            said = qmp(command, **arguments)
        else:
            with pytest.raises(QmpError) as caught:
                qmp(command, **arguments)
            said = str(caught.value)
        assert room.message in said
        after = qmp("query-named-block-nodes", flat=True), sorted(os.listdir(room.path))
        assert after == before
        guest(room.path, "read -P 5 0 2M", "read -P 9 2M 30M")
        room.more(96)
        said = qmp(command, **arguments)
        assert said in ({}, "")
        guest(room.path, "write -P 6 1M 2M", "flush")
        qmp("quit")
    verdict(room.path)
    for name in {"new.qcow2"} & set(os.listdir(room.path)):
        run("qemu-img", "check", "-q", "-f", "qcow2", name, cwd=room.path)
    top = "new.qcow2" if "snapshot" in str(arguments) and "internal" not in command else "top.qcow2"
    reads = ("-c", "read -P 5 0 1M", "-c", "read -P 6 1M 2M", "-c", "read -P 9 3M 29M")
    run("qemu-io", "-r", "-f", "qcow2", *reads, top, cwd=room.path)


@pytest.mark.parametrize("mode", ["full", "falloc"])
def test_a_disk_that_cannot_be_preallocated_keeps_its_size(room, mode):
    with daemon_on(room.path) as daemon:
        qmp = daemon.qmp()
        guest(room.path, "write -P 5 0 1M", "flush")
        for size in ("96M", "40M"):
            for line in (f"truncate -m {mode} {size}", "length"):
                assert qmp("human-monitor-command", command_line=f'qemu-io disk "{line}"') == ""
            if not room.shrinks:
                room.more(48)
        new = ("write -P 6 39M 1M", "read -P 0 32M 7M")
        guest(room.path, *new, "read -P 5 0 1M", "read -P 9 1M 31M")
        qmp("quit")
        daemon.wait()
        said = daemon.output.decode()
    assert f"qemu-io: {room.message}" in said
    sizes = [line for line in said.splitlines() if line.endswith("MiB")]
    if mode == "falloc" or room.shrinks:
        assert sizes == ["32 MiB", "40 MiB"]
    else:  # the old size could not be written either
        assert sizes == ["96 MiB", "96 MiB"] and b"keeps its new size" in daemon.errors
    verdict(room.path)


@pytest.mark.parametrize("mode", ["full", "falloc"])
@pytest.mark.parametrize("driver", ["file", "qcow2", "luks"])
def test_an_image_that_cannot_be_made_takes_no_room(driver, mode, room):
    """Its job says why; the node can be used for one that fits."""
    (room.path / "node").touch()
    with DaemonProcess(
        room.path,
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

        free = room.free()
        said = create(64 * MIB, preallocation=mode)
        assert said.endswith(room.message)
        if driver == "qcow2":  # as it begins with qemu-storage-daemon
            assert said.startswith("Could not resize image: ")
        if driver == "file" or mode == "falloc" or room.shrinks:
            assert free - room.free() < MIB
        else:
            room.more(96)
        assert create(4 * MIB, preallocation=mode) is None
        if driver == "qcow2":
            qmp("blockdev-add", driver="qcow2", node_name="image", file="node")
        qmp("quit")
    if driver == "qcow2":
        run("qemu-img", "check", "-q", "-f", "qcow2", "node", cwd=room.path)
