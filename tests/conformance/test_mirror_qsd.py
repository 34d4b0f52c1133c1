"""The same mirrors asked of qemu-storage-daemon and of us: the same answers, events and images.

Left out: ``len`` of a full mirror, which QEMU 7.2 makes the whole disk where the target cannot
unmap; ``actively-synced``, which it has not; pauses of its own; where it stands in the alphabet.
"""

import json

import pytest

from tests.support.daemon import DaemonProcess, QmpError
from tests.support.qcow2_images import needs, run
from tests.support.qsd import QsdProcess

pytestmark = needs("qemu-img", "qemu-io", "qemu-storage-daemon")

LEFT_OUT = ("len", "offset", "actively-synced", "busy", "timestamp")


def make_images(directory):
    def create(*arguments):
        run("qemu-img", "create", "-q", *arguments)

    base, source = directory / "base.qcow2", directory / "src.qcow2"
    create("-f", "qcow2", base, "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", base)
    create("-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", source)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", "-c", "write -P 3 3M 100k", source)
    for name in ("a", "b", "e", "ro"):
        create("-f", "qcow2", directory / f"{name}.qcow2", "4M")
    create("-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", directory / "t.qcow2")
    create("-f", "raw", directory / "big.raw", "8M")
    create("-f", "raw", directory / "r.raw", "4M")


class Transcript:
    """What one daemon answered."""

    def __init__(self, qmp, directory):
        self.qmp, self.directory = qmp, str(directory)
        self.lines = []
        self.number = 0

    def note(self, *what):
        text = json.dumps(what, sort_keys=True).replace(self.directory, "DIR")
        self.lines.append(text)

    def do(self, name, **arguments):
        try:
            answer = self.qmp(name, **arguments)
        except QmpError as error:
            answer = f"error: {error}"
        if isinstance(answer, list):
            answer = [{k: v for k, v in job.items() if k not in LEFT_OUT} for job in answer]
        self.note(name, arguments, answer)
        return answer

    def job(self, name="blockdev-mirror", ready=True, end="job-complete", **arguments):
        """A mirror of its own id, to its end; its events."""
        self.number += 1
        job = f"j{self.number}"
        if self.do(name, job_id=job, **arguments) != {}:
            return
        if ready:
            self.qmp.wait("BLOCK_JOB_READY", device=job)
            self.do("query-block-jobs")
            if end == "force":
                self.do("block-job-cancel", device=job, force=True)
            elif end == "gently":
                self.do("block-job-cancel", device=job)
            else:
                self.do(end, id=job)
        self.qmp.wait("JOB_STATUS_CHANGE", id=job, status="null")
        for event in self.qmp.events:
            data = event.get("data", {})
            if job in (data.get("id"), data.get("device")):
                shown = {k: v for k, v in data.items() if k not in LEFT_OUT}
                self.note(event["event"], shown)
        self._drop_pauses()

    def _drop_pauses(self):
        standby = '"status": "standby"'
        ready = self.lines[-1].replace("null", "ready")
        kept = []
        for line in self.lines:
            if standby in line and "JOB_STATUS_CHANGE" in line:
                continue
            if line == ready and line in kept:
                continue
            kept.append(line)
        self.lines = kept


def refusals(peer):
    for arguments in (
        {"target": "ro"},
        {"target": "e"},
        {"target": "src"},
        {"target": "nobody"},
        {"device": "nobody"},
        {"sync": "incremental"},
        {"sync": "bitmap"},
        {"buf_size": -1},
        {"speed": -1},
        {"replaces": "nobody"},
        {"replaces": "b"},
        {"replaces": "a"},
        {"filter_node_name": "b"},
        {"filter_node_name": "9b"},
        {"granularity": 1 << 27},
        {"granularity": 3},
        {"granularity": 1000},
        {"copy_mode": "sometimes"},
        {"on_target_error": "never"},
    ):
        members = {"device": "src", "target": "a", "sync": "full"} | arguments
        if arguments == {"target": "e"}:
            # What QEMU wants of a target that is written is a little more.
            with pytest.raises(QmpError, match="Permission conflict on node 'e'"):
                peer.qmp("blockdev-mirror", job_id="x", **members)
            continue
        peer.do("blockdev-mirror", job_id="x", **members)
    peer.do("blockdev-mirror", device="src", target="a", sync="full")


def in_use(peer):
    peer.do("blockdev-mirror", job_id="m", device="src", target="a", sync="full")
    peer.qmp.wait("BLOCK_JOB_READY", device="m")
    peer.do("blockdev-mirror", job_id="y", device="src", target="b", sync="full")
    peer.do("blockdev-mirror", job_id="y", device="b", target="a", sync="full")
    peer.do("blockdev-mirror", job_id="y", device="b", target="src", sync="full")
    peer.do("blockdev-mirror", job_id="m", device="b", target="t", sync="full")
    overlay = f"{peer.directory}/sn.qcow2"
    peer.do("blockdev-snapshot-sync", node_name="src", snapshot_file=overlay,
            snapshot_node_name="sn")  # fmt: skip
    peer.do("blockdev-snapshot", node="src", overlay="b")
    for node in ("src", "a"):
        peer.do("blockdev-del", node_name=node)
        peer.do("block-stream", job_id="z", device=node)
    peer.do("block-commit", job_id="z", device="src")
    peer.do("block-job-pause", device="m")
    peer.do("block-job-cancel", device="m")
    peer.do("block-job-resume", device="m")
    peer.qmp("job-cancel", id="m")
    peer.qmp.wait("JOB_STATUS_CHANGE", id="m", status="null")
    peer.qmp.events.clear()


def whole_lives(peer):
    peer.job(device="src", target="big", sync="full", ready=False)
    peer.job(device="src", target="r", sync="full", end="force")
    peer.job(device="src", target="r", sync="full", end="gently", copy_mode="write-blocking")
    peer.job(device="src", target="t", sync="top", granularity=4096)
    peer.job(device="t", target="b", sync="none", end="gently")


def by_name(peer):
    def drive_mirror(**arguments):
        peer.job("drive-mirror", device="src", **arguments)

    directory = peer.directory
    for arguments in (
        {"target": f"{directory}/x", "sync": "full", "format": "bogus"},
        {"target": f"{directory}/no/x", "sync": "full"},
        {"target": "base.qcow2", "sync": "top"},
        {"target": f"{directory}/x", "sync": "full", "mode": "existing"},
        {"target": f"{directory}/x", "sync": "top", "format": "raw"},
        {"target": f"{directory}/x", "sync": "full", "replaces": "src"},
        {"target": f"{directory}/x", "sync": "full", "node_name": "src"},
        {"target": f"{directory}/x", "sync": "full", "node_name": "9x"},
        {"target": f"{directory}/x", "sync": "incremental"},
    ):
        drive_mirror(**arguments)
    drive_mirror(target=f"{directory}/t1.qcow2", sync="full", end="gently")
    drive_mirror(target=f"{directory}/t2.qcow2", sync="top", end="gently")
    drive_mirror(target=f"{directory}/t3.raw", sync="full", format="raw", end="gently")
    drive_mirror(target=f"{directory}/t4.qcow2", sync="none", node_name="t4")


def transcript(cls, directory, session):
    directory.mkdir()
    make_images(directory)
    blockdevs = []
    for name in ("src", "a", "b", "e", "t"):
        blockdevs += ["--blockdev", f"qcow2,node-name={name},file.driver=file,"
                      f"file.filename={name}.qcow2"]  # fmt: skip
    for name in ("big", "r"):
        blockdevs += ["--blockdev", f"raw,node-name={name},file.driver=file,"
                      f"file.filename={name}.raw"]  # fmt: skip
    with cls(
        directory, *blockdevs,
        "--blockdev", "qcow2,node-name=ro,read-only=on,file.driver=file,file.filename=ro.qcow2",
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "nbd,id=ex,node-name=src,writable=on,name=src",
        "--export", "nbd,id=ee,node-name=e,writable=on,name=e",
    ) as daemon:  # fmt: skip
        peer = Transcript(daemon.qmp(), directory)
        session(peer)
        peer.qmp("quit")
        daemon.wait()
    for path in sorted(directory.glob("*.qcow2")):
        run("qemu-img", "check", path)
    return peer.lines


@pytest.mark.parametrize("session", [refusals, in_use, whole_lives, by_name])
def test_the_same(session, tmp_path):
    theirs = transcript(QsdProcess, tmp_path / "q", session)
    ours = transcript(DaemonProcess, tmp_path / "l", session)
    assert len(theirs) > 5
    if session is by_name:
        # QEMU leaves the files of jobs that it refused.
        theirs = [line for line in theirs if '"x"' not in line]
        ours = [line for line in ours if '"x"' not in line]
    assert ours == theirs


@pytest.mark.parametrize("sync", ["full", "top"])
def test_the_same_bytes(sync, tmp_path):
    for cls, name in ((QsdProcess, "q"), (DaemonProcess, "l")):
        target = "t" if sync == "top" else "a"

        def session(peer, target=target):
            peer.job(device="src", target=target, sync=sync)

        transcript(cls, tmp_path / name, session)
        run(
            "qemu-img",
            "compare",
            tmp_path / name / "src.qcow2",
            tmp_path / name / f"{target}.qcow2",
        )
