"""Start either daemon with the same options, talk QMP to it, and see what it costs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

START_TIMEOUT = 20.0
TIMEOUT = 300.0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Kind:
    """A daemon that is measured: how it is called in the table and started."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


QSD = Kind("qsd", ("qemu-storage-daemon",))
_OURS = (sys.executable, "-m", "liveblockd")
OURS = Kind("uvloop", _OURS, {"LIVEBLOCKD_LOOP": "uvloop"})
OURS_ASYNCIO = Kind("asyncio", _OURS, {"LIVEBLOCKD_LOOP": "asyncio"})
KINDS = {kind.name: kind for kind in (QSD, OURS, OURS_ASYNCIO)}


class QmpFailure(Exception):
    """The daemon answered with an error, or a job ended with one."""


class Qmp:
    """A plain client; ``clock`` of an event is when this side saw it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self._receive()
        self("qmp_capabilities")

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise QmpFailure("the daemon closed the monitor")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            message["clock"] = time.perf_counter()
        return message

    def __call__(self, name: str, /, **arguments: Any) -> Any:
        request = {
            "execute": name,
            "arguments": {k.replace("_", "-"): v for k, v in arguments.items()},
        }
        self._socket.sendall(json.dumps(request).encode())
        while "event" in (answer := self._receive()):
            self.events.append(answer)
        if "error" in answer:
            raise QmpFailure(f"{name}: {answer['error']['desc']}")
        return answer["return"]

    def completed(self, job: str) -> float:
        """Wait until that job has completed; when that was."""
        while True:
            for event in self.events:
                data = event.get("data", {})
                if event["event"] == "BLOCK_JOB_COMPLETED" and data.get("device") == job:
                    if data.get("error") or data["offset"] != data["len"]:
                        raise QmpFailure(f"job {job}: {data}")
                    self.events.remove(event)
                    return float(event["clock"])
            self.events.append(self._receive())

    def wait(self, name: str, job: str) -> None:
        """Until an event of that name tells of the job."""
        while not any(e["event"] == name and e["data"]["device"] == job for e in self.events):
            self.events.append(self._receive())

    def await_event(self) -> dict[str, Any]:
        """The next one that comes; it stays among the ``events``."""
        self.events.append(self._receive())
        return self.events[-1]

    def stream(self, node: str, job: str = "job0", **arguments: Any) -> float:
        """Stream into ``node`` and wait for the end; seconds from the command to the event."""
        start = time.perf_counter()
        self("block-stream", device=node, job_id=job, **arguments)
        return self.completed(job) - start

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Daemon:
    """``with Daemon(kind, directory, *options) as daemon``: up and negotiated in the block."""

    def __init__(self, kind: Kind, directory: Path, *options: str) -> None:
        self.kind = kind
        self.directory = directory
        self._pidfile = directory / f"{kind.name}.pid"
        self._monitor = directory / "qmp.sock"
        self._log = directory / f"{kind.name}.log"
        self._log_file = self._log.open("wb")
        self.process = subprocess.Popen(
            [*kind.command, *options,
             "--chardev", f"socket,id=monitor,path={self._monitor},server=on,wait=off",
             "--monitor", "chardev=monitor", "--pidfile", str(self._pidfile)],
            cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self._log_file,
            env={**os.environ, "PYTHONPATH": str(ROOT), **kind.environment},
        )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self._await_start()
            self.qmp = Qmp(self._monitor)
            self.cpu_start = self.cpu_seconds()
        except BaseException:  # __exit__ is not called then
            self._end(signal.SIGKILL)
            raise
        return self

    def _await_start(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._pidfile.exists() or not self._pidfile.read_text().endswith("\n"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise QmpFailure(f"{self.kind.name} does not start: {self._log.read_text()}")
            time.sleep(0.01)

    def __exit__(self, *exc: object) -> None:
        self.qmp.close()
        self._end(signal.SIGTERM)
        complaint = self._log.read_text().strip()
        if complaint and exc[0] is None:
            print(f"{self.kind.name} said: {complaint[-2000:]}", file=sys.stderr)

    def _end(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._log_file.close()
            self._pidfile.unlink(missing_ok=True)

    def resident(self) -> int:
        """Resident bytes now."""
        return self._status("VmRSS")

    def peak_memory(self) -> int:
        """The most resident bytes that it ever had."""
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        home = Path(f"/proc/{self.process.pid}")
        fields = (home / "stat").read_text().rpartition(")")[2].split()
        ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        # to the microsecond, but without the threads that are gone
        exact = sum(int(path.read_text().split()[0]) for path in home.glob("task/*/schedstat"))
        return max(exact / 1e9, ticks)


def qcow2(node: str, path: Path, *, direct: bool = False) -> tuple[str, ...]:
    """The option that opens an image (and by its header the chain below it)."""
    cache = ",cache.direct=on,file.cache.direct=on" if direct else ""
    return (
        "--blockdev",
        f"driver=qcow2,node-name={node},file.driver=file,file.filename={path}{cache}",
    )


def nbd(socket_path: Path, *nodes: str) -> tuple[str, ...]:
    """Options of an NBD server with a writable export for each node, named like it."""
    options = ["--nbd-server", f"addr.type=unix,addr.path={socket_path}"]
    for node in nodes:
        options += [
            "--export",
            f"type=nbd,id=export-{node},node-name={node},name={node},writable=on",
        ]
    return tuple(options)
