"""A qemu-storage-daemon for a test, with the interface of ``DaemonProcess``."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.daemon import DaemonProcess


class QsdProcess(DaemonProcess):
    """The peer; ``qmp()`` as there."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self._clients = []
        self.pidfile = directory / "daemon.pid"
        self.process = subprocess.Popen(
            ["qemu-storage-daemon", *options, "--pidfile", self.pidfile.name,
             "--chardev", "socket,id=monitor,path=qmp.sock,server=on,wait=off",
             "--monitor", "chardev=monitor"],
            cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE,
        )  # fmt: skip
