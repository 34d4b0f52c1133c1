"""A liveblockd of its own for a test: started, asked over QMP, always ended.

It begins with everything imported (``tests/support/warm.py``), unless a test wants it ``cold``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from tests.support.warm import LIVEBLOCKD, begin

TIMEOUT = 60.0  # seconds; only a test that fails waits for so long


class QmpError(Exception):
    """The daemon answered with an error."""


class QmpSocket:
    """A plain QMP client; events are kept in ``events``."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(path)
        self.events: list[dict[str, Any]] = []
        self._file = self.socket.makefile("rb")
        self.greeting = self.receive()
        self("qmp_capabilities")

    def receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise EOFError("the daemon closed the connection")
        return json.loads(line)

    def __call__(self, name: str, /, **arguments: Any) -> Any:
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.socket.sendall(json.dumps(request).encode())
        while "return" not in (answer := self.receive()) and "error" not in answer:
            # qemu-storage-daemon greets twice who comes while it starts (7.2).
            assert "event" in answer or answer == self.greeting, answer
            if "event" in answer:
                self.events.append(answer)
        if "error" in answer:
            raise QmpError(answer["error"]["desc"])
        return answer["return"]

    def wait(self, name: str, **data: Any) -> dict[str, Any]:
        """The first event of that name and data, kept or to come."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                seen += 1
                found = event.get("data", {})
                if event["event"] == name and all(found.get(k) == v for k, v in data.items()):
                    return event
            self.events.append(self.receive())

    def rest(self) -> list[dict[str, Any]]:
        """Everything until the daemon closes the connection."""
        return [json.loads(line) for line in self._file]

    def close(self) -> None:
        self._file.close()
        self.socket.close()


def nbd_write(path: str, export: str, offset: int, data: bytes) -> None:
    """Write over NBD and hang up without a flush, which no polite client can be made to do."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT)
        client.connect(path)
        stream = client.makefile("rwb")
        assert stream.read(18)[:16] == b"NBDMAGICIHAVEOPT"
        name = export.encode()
        stream.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
        stream.flush()
        stream.read(10)  # size and flags; flag 2 of ours leaves out the zeros
        stream.write(struct.pack(">IHHQQI", 0x25609513, 0, 1, 0, offset, len(data)) + data)
        stream.flush()
        assert struct.unpack(">II", stream.read(16)[:8]) == (0x67446698, 0)


class DaemonProcess:
    """``with DaemonProcess(directory, *options) as daemon``: it is up in the block."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        prefix: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        monitor: bool = True,
        cold: bool = False,
    ) -> None:
        self.directory = directory
        self._clients: list[QmpSocket] = []
        self.pidfile = directory / "daemon.pid"
        own = not monitor or "--monitor" in options
        qmp = () if own else ("--qmp", "qmp.sock")
        root = Path(__file__).resolve().parents[2]
        popen = subprocess.Popen if cold or prefix else begin
        self.process = popen(
            [*prefix, *LIVEBLOCKD, *options, *qmp, "--pidfile", self.pidfile.name],
            cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root), **(environment or {})},
        )  # fmt: skip

    def __enter__(self) -> Self:
        deadline = time.monotonic() + TIMEOUT
        while not self.pidfile.exists() or not self.pidfile.read_text().endswith("\n"):
            if self.process.poll() is not None:
                raise AssertionError(f"no start: {self.process.stderr.read().decode()}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError("the daemon does not come up")
            time.sleep(0.01)
        return self

    def __exit__(self, *exc: object) -> None:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise

    def qmp(self, name: str = "qmp.sock") -> QmpSocket:
        client = QmpSocket(str(self.directory / name))
        self._clients.append(client)
        return client

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        self.output, self.errors = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
