"""PID file, systemd, descriptors."""

import os
import socket
import subprocess
import sys

import pytest

from liveblockd.daemon.process import Notifier, PidFile, inherited_fd
from liveblockd.errors import ConfigError


def test_pidfile_is_written_and_removed(tmp_path):
    path = tmp_path / "p"
    pidfile = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    pidfile.remove()
    assert not path.exists()
    pidfile.remove()


def test_a_stale_pidfile_is_taken_over(tmp_path):
    path = tmp_path / "p"
    path.write_text("1234567890123456789\n")
    pidfile = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    pidfile.remove()
    assert not path.exists()


@pytest.mark.parametrize("data", [b"QFI\xfb" + bytes(4096), bytes(512), b"pid = 3\n"])
def test_a_disk_image_is_not_taken_for_a_pidfile(tmp_path, data):
    path = tmp_path / "disk"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="disk' is a file of something else"):
        PidFile(str(path))
    assert path.read_bytes() == data


def test_the_pidfile_of_a_living_process_is_left_alone(tmp_path):
    path = tmp_path / "p"
    code = ("import sys; from liveblockd.daemon.process import PidFile; "
            "p = PidFile(sys.argv[1]); print('up', flush=True); sys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, str(path)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout.readline() == "up\n"
        before = path.read_text()
        with pytest.raises(ConfigError, match="belongs to a running process"):
            PidFile(str(path))
        assert path.read_text() == before == f"{other.pid}\n"
        other.stdin.close()
    PidFile(str(path)).remove()


def test_a_pidfile_of_somebody_else_is_not_removed(tmp_path):
    path = tmp_path / "p"
    pidfile = PidFile(str(path))
    path.unlink()
    path.write_text("other\n")
    pidfile.remove()
    assert path.read_text() == "other\n"


def test_no_directory(tmp_path):
    with pytest.raises(ConfigError, match="cannot create PID file: Could not create"):
        PidFile(str(tmp_path / "no" / "p"))


def test_notifications(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "n"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "4000000"}
        notifier = Notifier(environment)
        notifier.send("READY=1", "STATUS=x")
        assert receiver.recv(100) == b"READY=1\nSTATUS=x"
        assert notifier.watchdog_interval == 2.0
        assert Notifier(environment | {"WATCHDOG_PID": "1"}).watchdog_interval == 0.0
    notifier.send("STOPPING=1")  # nobody there: no reason to fail
    assert Notifier({}).watchdog_interval == 0.0
    Notifier({}).send("READY=1")


def test_sockets_passed_by_systemd():
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "qmp:nbd"}
    assert inherited_fd("7", {}) == "7"
    assert inherited_fd("systemd:nbd", environment) == "4"
    assert inherited_fd("systemd", environment | {"LISTEN_FDS": "1"}) == "3"
    for text, given in (
        ("systemd", environment),
        ("systemd:x", environment),
        ("systemd:qmp", {}),
        ("systemd:qmp", environment | {"LISTEN_PID": "1"}),
    ):
        with pytest.raises(ConfigError, match="passed by systemd"):
            inherited_fd(text, given)
