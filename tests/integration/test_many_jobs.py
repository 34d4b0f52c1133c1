"""Many jobs at once: each gets on and stops at once; only so many copy where that is asked for.

What is copied costs processor time (compressed clusters) and no space (the targets keep nothing).
"""

import shutil
import statistics
import struct
import subprocess
import time

import pytest

from tests.support.daemon import DaemonProcess, QmpError

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")

MIB = 1 << 20
CLUSTER = 64 << 10
#: of the disks, in MiB
SIZES = [16, 16, 32, 48, 64, 96, 128, 128]
#: seconds of the daemon that a client may have to wait for a job that it stops
LATENCY = 0.1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An image of compressed clusters, of which every disk is a part.

    qemu-img compresses its first MiB; the L2 table then names these clusters again and again, for
    who only reads does not count references.
    """
    folder = tmp_path_factory.mktemp("base")
    (folder / "base.raw").write_bytes(b"".join(n.to_bytes(4) for n in range(MIB // 4)))
    convert = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"]
    subprocess.run(convert, cwd=folder, check=True, timeout=60)
    with open(folder / "base.qcow2", "r+b") as file:
        image = file.read()
        (l1_table,) = struct.unpack_from(">Q", image, 40)
        (l2_entry,) = struct.unpack_from(">Q", image, l1_table)
        l2_table = l2_entry & 0x00FFFFFFFFFFFE00
        file.seek(24)
        file.write(struct.pack(">Q", max(SIZES) * MIB))  # the one L2 table has entries for 512 MiB
        file.seek(l2_table)
        file.write(image[l2_table : l2_table + MIB // CLUSTER * 8] * max(SIZES))
    return folder / "base.qcow2"


@pytest.fixture
def start(tmp_path, base):
    """Start a daemon with further options; its QMP client has ``backup(number)``."""
    running = []

    def start(*options):
        blockdev = f"qcow2,node-name=base,read-only=on,file.driver=file,file.filename={base}"
        daemon = DaemonProcess(tmp_path, "--blockdev", blockdev, *options)
        running.append(daemon.__enter__())
        qmp = daemon.qmp()
        qmp.clock = ~daemon.process.pid << 3 | 2  # its processor time: clock_getcpuclockid(3)
        for number, size in enumerate(SIZES):
            length = size * MIB
            qmp("blockdev-add", driver="raw", node_name=f"d{number}", size=length, file="base",
                read_only=True)  # fmt: skip
            qmp("blockdev-add", driver="null-co", node_name=f"t{number}", size=length,
                read_zeroes=True)  # fmt: skip

        def backup(number, **more):
            qmp("blockdev-backup", job_id=f"j{number}", device=f"d{number}", target=f"t{number}",
                sync="full", **more)  # fmt: skip

        qmp.backup = backup
        return qmp

    yield start
    for daemon in running:
        daemon.__exit__(None, None, None)


def say(figures):
    print(figures)  # noqa: T201 (with pytest -s)


def jobs(qmp):
    return {job["device"]: job for job in qmp("query-block-jobs")}


def until(reached, seconds=60):
    end = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.001)
    return found


def seconds_until(qmp, command, event, **data):
    """How long it takes from a command to the event that says it is done.

    Of the daemon's own time, while other jobs are at work: others on the machine do not count.
    """
    qmp.events.clear()
    began = time.clock_gettime(qmp.clock)
    qmp(command, id=data.get("id") or data["device"])
    qmp.wait(event, **data)
    return time.clock_gettime(qmp.clock) - began


def test_every_job_gets_its_share(start):
    """They start in one step, the largest first; who has half as much to do ends before."""
    qmp = start()
    numbers = list(reversed(range(len(SIZES))))
    qmp("transaction", actions=[
        {"type": "blockdev-backup",
         "data": {"job-id": f"j{n}", "device": f"d{n}", "target": f"t{n}", "sync": "full"}}
        for n in numbers
    ])  # fmt: skip
    for number in numbers:
        qmp.wait("BLOCK_JOB_COMPLETED", device=f"j{number}")
    ends = [event["data"] for event in qmp.events if event["event"] == "BLOCK_JOB_COMPLETED"]
    sizes = [end["len"] // MIB for end in ends]
    say(sizes)
    assert sorted(sizes) == SIZES
    for place, size in enumerate(sizes):
        assert all(2 * later > size for later in sizes[place + 1 :]), sizes


def test_jobs_stop_at_once_beside_others(start):
    qmp = start()
    for number in range(len(SIZES)):
        qmp.backup(number)
    until(lambda: all(job["offset"] for job in jobs(qmp).values()))
    times = {}
    for name in ("j7", "j6", "j5"):
        times[f"pause {name}"] = seconds_until(
            qmp, "job-pause", "JOB_STATUS_CHANGE", id=name, status="paused"
        )
        times[f"cancel paused {name}"] = seconds_until(
            qmp, "job-cancel", "BLOCK_JOB_CANCELLED", device=name
        )
    times["cancel j4"] = seconds_until(qmp, "job-cancel", "BLOCK_JOB_CANCELLED", device="j4")
    assert jobs(qmp), "others are to be at work"
    say({what: f"{seconds * 1000:.1f} ms" for what, seconds in times.items()})
    assert statistics.median(times.values()) < LATENCY, times


def test_only_so_many_copy_at_once(start):
    qmp = start("--jobs", "max-concurrent=1")
    assert qmp("x-liveblock-query-job-limits") == {"max-concurrent": 1, "waiting": []}
    for number in range(4):
        qmp.backup(number, speed=MIB)
    until(lambda: jobs(qmp)["j0"]["offset"])
    states = {name: (job["status"], job["busy"], job["offset"]) for name, job in jobs(qmp).items()}
    assert [states[f"j{number}"] for number in (1, 2, 3)] == [("running", False, 0)] * 3
    assert qmp("x-liveblock-query-job-limits")["waiting"] == ["j1", "j2", "j3"]
    qmp("job-cancel", id="j2")
    qmp.wait("BLOCK_JOB_CANCELLED", device="j2")
    assert 0 < jobs(qmp)["j0"]["offset"] < SIZES[0] * MIB, "it does not wait for its turn"
    qmp("x-liveblock-set-job-limits", max_concurrent=2)
    until(lambda: jobs(qmp)["j1"]["offset"])
    assert jobs(qmp)["j3"]["offset"] == 0
    for name in ("j0", "j1", "j3"):
        qmp("block-job-set-speed", device=name, speed=0)
        qmp.wait("BLOCK_JOB_COMPLETED", device=name)


def test_those_that_wait_for_their_turn_obey(start):
    qmp = start("--jobs", "max-concurrent=1")
    for number in range(5):
        qmp.backup(number, speed=MIB)
    until(lambda: jobs(qmp)["j0"]["offset"])
    qmp("job-pause", id="j1")
    qmp.wait("JOB_STATUS_CHANGE", id="j1", status="paused")
    qmp("block-job-set-speed", device="j2", speed=0)
    with pytest.raises(QmpError, match="in state 'running' cannot accept command verb"):
        qmp("job-complete", id="j2")
    for name in ("j3", "j1"):
        qmp("job-cancel", id=name)
        qmp.wait("BLOCK_JOB_CANCELLED", device=name)
    qmp("transaction", properties={"completion-mode": "grouped"}, actions=[
        {"type": "blockdev-backup",
         "data": {"job-id": f"j{n}", "device": f"d{n}", "target": f"t{n}", "sync": "full"}}
        for n in (5, 6)
    ])  # fmt: skip
    qmp("job-cancel", id="j5")
    qmp.wait("BLOCK_JOB_CANCELLED", device="j6")
    found = jobs(qmp)
    assert sorted(found) == ["j0", "j2", "j4"]
    assert found["j2"]["offset"] == found["j4"]["offset"] == 0, "it was not their turn"
    began = time.monotonic()
    qmp("quit")
    qmp.wait("JOB_STATUS_CHANGE", id="j4", status="null")
    assert time.monotonic() - began < 10, "those that wait do not hold up the end"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-concurrent=-1", "expects a non-negative value"),
        ("max-concurrent=some", "expects"),
        ("most=3", "Parameter 'most' is unexpected"),
    ],
)
def test_wrong_limits(tmp_path, text, said):
    with pytest.raises(AssertionError, match=said), DaemonProcess(tmp_path, "--jobs", text):
        pass
