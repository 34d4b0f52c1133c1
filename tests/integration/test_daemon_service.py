"""The unit and the configuration that are shipped for systemd."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from liveblockd import config
from liveblockd.daemon.startup import configured
from tests.support import jail
from tests.support.daemon import DaemonProcess

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_is_well_formed(tmp_path):
    unit = tmp_path / "liveblockd.service"
    text = (SYSTEMD / "liveblockd.service").read_text()
    unit.write_text(text.replace("/usr/bin/liveblockd", shutil.which("true")))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def calls_of(name):
    """The system calls of a set of systemd's, those of the sets in it included."""
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", name],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    names = [line.strip() for line in listed.stdout.splitlines()[1:]]
    found = set()
    for each in names:
        found |= calls_of(each) if each.startswith("@") else {each}
    return {call for call in found if call and not call.startswith("#")}


def allowed_calls():
    """What the lines SystemCallFilter= of the unit leave to the daemon."""
    allowed = calls_of("@default")
    for line in re.findall(r"^SystemCallFilter=(.*)$", (SYSTEMD / "liveblockd.service").read_text(),
                           re.MULTILINE):  # fmt: skip
        names = line.removeprefix("~").split()
        calls = set().union(*(calls_of(n) if n.startswith("@") else {n} for n in names))
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_lets_the_daemon_ask_for_time_slices_and_many_requests():
    """The daemon does without what is refused: it is only seen in the figures."""
    asked_for = {"sched_setattr", "io_setup", "io_submit", "io_getevents", "copy_file_range"}
    assert asked_for <= allowed_calls()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-utils is not installed")
def test_the_daemon_works_within_the_filter_of_the_unit(tmp_path):
    if platform.machine() != "x86_64" or not Path(jail.HEADER).exists():
        pytest.skip("the numbers of system calls are not known here")
    (tmp_path / "allowed").write_text(" ".join(allowed_calls()))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "disk", "8M"]
    subprocess.run(create, cwd=tmp_path, check=True, timeout=20)
    prefix = (sys.executable, jail.__file__, "allowed")
    drive = ("--drive", "file=disk,format=qcow2,id=d,node-name=n,discard=unmap")
    with DaemonProcess(tmp_path, *drive, prefix=prefix, cold=True) as daemon:
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        client = daemon.qmp()
        for line in ("write -P 1 0 4M", "discard 0 64k", "flush"):
            client("human-monitor-command", command_line=f'qemu-io d "{line}"')
        client("blockdev-snapshot-sync", device="d", snapshot_file=str(tmp_path / "over"))
        client("block-stream", device="d")
        assert "error" not in client.wait("BLOCK_JOB_COMPLETED")["data"]
        client("drive-backup", job_id="b", device="d", target="copy", sync="full", compress=True)
        assert "error" not in client.wait("BLOCK_JOB_COMPLETED", device="b")["data"]
        client("quit")
    for image in ("over", "copy"):
        compare = ["qemu-img", "compare", "-q", "disk", image]
        subprocess.run(compare, cwd=tmp_path, check=True, timeout=20)


def test_the_configuration_can_be_read():
    loaded = config.load(str(SYSTEMD / "liveblockd.toml"))
    assert [a.option for a in configured(loaded, "c")] == ["nbd-server", "qmp", "hmp"]


def test_the_configuration_starts_also_with_what_is_commented_out(tmp_path):
    text = (SYSTEMD / "liveblockd.toml").read_text()
    text = re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE)
    text = text.replace("/run/liveblockd/", "").replace("/var/lib/liveblockd/", "")
    (tmp_path / "c.toml").write_text(text)
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-utils is not installed")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "virtio0.qcow2", "1M"],
        cwd=tmp_path,
        check=True,
        timeout=20,
    )
    with DaemonProcess(tmp_path, "--config", "c.toml", monitor=False) as daemon:
        client = daemon.qmp()
        assert client("query-block")[0]["device"] == "virtio0"
        assert client("query-block-exports")[0]["id"] == "virtio0"
