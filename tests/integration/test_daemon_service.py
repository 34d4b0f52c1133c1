"""The unit and the configuration that are shipped for systemd."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from liveblockd import config
from liveblockd.daemon.startup import configured
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


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_the_unit_lets_the_daemon_make_its_system_calls():
    """Those that are asked for by name or number; a refused one is only seen in the figures."""
    allowed = calls_of("@default")
    for line in re.findall(r"^SystemCallFilter=(.*)$", (SYSTEMD / "liveblockd.service").read_text(),
                           re.MULTILINE):  # fmt: skip
        names = line.removeprefix("~").split()
        calls = set().union(*(calls_of(n) if n.startswith("@") else {n} for n in names))
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    needed = {
        "sched_setattr", "sched_getattr", "sched_yield", "io_setup", "io_submit", "io_getevents",
        "preadv2", "pwritev2", "copy_file_range", "fallocate", "fdatasync", "sync_file_range",
        "ioctl", "fcntl", "madvise", "clone3", "accept4", "epoll_pwait",
    }  # fmt: skip
    assert needed <= allowed


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
