"""Guests: fio with its NBD engine, which is C and the same for both daemons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from benchmarks.images import GUEST
from benchmarks.registry import CannotRun, WrongResult

TIMEOUT = 300


def available() -> None:
    """``CannotRun`` without fio's NBD engine."""
    try:
        engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        raise CannotRun("no fio") from None
    if "nbd" not in engines.stdout.split():
        raise CannotRun("this fio has no NBD engine")


def command(socket: Path, exports: list[str], **options: object) -> list[str]:
    """fio's words for one job an export."""
    common = {
        "ioengine": "nbd", "bs": "4k", "randrepeat": 1, "buffer_pattern": hex(GUEST),
        "output-format": "json", "group_reporting": 0, "thread": 1, **options,
    }  # fmt: skip
    words = ["fio", *(f"--{name}={value}" for name, value in common.items())]
    for export in exports:
        words += [f"--name={export}", f"--uri=nbd+unix:///{export}?socket={socket}"]
    return words


def jobs(output: str) -> list[dict[str, Any]]:
    """The jobs of fio's JSON, which stands behind what the engine prints."""
    try:
        found: list[dict[str, Any]] = json.loads(output[output.index("{\n") :])["jobs"]
    except (ValueError, KeyError):
        raise WrongResult(f"fio: {output[-500:]}") from None
    for job in found:
        if job["error"]:
            raise WrongResult(f"fio: job {job['jobname']} failed with error {job['error']}")
    return found


def measure(socket: Path, export: str, directory: Path, **options: object) -> dict[str, Any]:
    """Run one guest to its end; its ``read`` or ``write`` part."""
    words = command(socket, [export], **options)
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise WrongResult(f"fio: {(done.stdout + done.stderr)[-800:]}")
    part = "write" if "write" in str(options["rw"]) else "read"
    result: dict[str, Any] = jobs(done.stdout)[0][part]
    return result


@contextmanager
def bare_server(directory: Path, *words: str | Path) -> Iterator[Path]:
    """nbdkit with this plugin, whose export is called as one likes; its socket.

    It is C and does nothing but what the words say: what a guest gets from it is what the machine,
    the client and the protocol leave to any server.
    """
    if not shutil.which("nbdkit"):
        raise CannotRun("no nbdkit")
    socket = directory / "bare.sock"
    socket.unlink(missing_ok=True)
    server = subprocess.Popen(
        ["nbdkit", "-f", "-U", str(socket), *map(str, words)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(directory)},
    )
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise CannotRun("nbdkit does not start")
            time.sleep(0.02)
        yield socket
    finally:
        server.terminate()
        server.wait(20)


def ceiling(directory: Path, seconds: float = 1.0) -> str:
    """What the client can do at most: randread IOPS of a server that does nothing, by depth."""
    options = {"rw": "randread", "time_based": 1, "runtime": f"{seconds * 1000:.0f}ms"}
    try:
        with bare_server(directory, "null", "1G") as socket:
            found = [
                measure(socket, "null", directory, iodepth=depth, **options)["iops"]
                for depth in (1, 16, 64)
            ]
    except (CannotRun, WrongResult) as exc:
        return f"unknown ({exc})"[:80]
    return " / ".join(f"{iops:.0f}" for iops in found)


@dataclass
class Latencies:
    """Of one guest's requests: when they ended (seconds since the epoch), how long they took."""

    ends: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]

    def between(self, start: float, end: float) -> npt.NDArray[np.float64]:
        """Those that were under way in that time (the log counts whole milliseconds)."""
        during = (self.ends >= start) & (self.ends - self.seconds <= end)
        return self.seconds[during]


class Guests:
    """``with Guests(...)``: one writing guest an export in the background, each request logged."""

    def __init__(self, socket: Path, exports: list[str], directory: Path, *, rate: int) -> None:
        self.directory = directory
        self.exports = exports
        for old in directory.glob("guest_*.log"):
            old.unlink()
        words = command(
            socket, exports, rw="randwrite", rate_iops=rate, time_based=1, runtime=TIMEOUT,
            write_lat_log="guest", log_unix_epoch=1, per_job_logs=1,
        )  # fmt: skip
        self._process = subprocess.Popen(
            words, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __enter__(self) -> Self:
        # Requests flow before anything is measured: fio has a thread an export then, and has had a
        # moment to connect.
        tasks = Path(f"/proc/{self._process.pid}/task")
        deadline = time.monotonic() + 30
        while self._process.poll() is None and len(list(tasks.iterdir())) <= len(self.exports):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        time.sleep(1.0)
        if self._process.poll() is not None:
            raise WrongResult(f"fio: {self._process.communicate()[0][-800:]}")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self.output, _ = self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.output, _ = self._process.communicate()

    def latencies(self) -> dict[str, Latencies]:
        """After the end, by export."""
        self.writes = {job["jobname"]: int(job["write"]["total_ios"]) for job in jobs(self.output)}
        found = {}
        for number, export in enumerate(self.exports, 1):
            table = np.loadtxt(
                self.directory / f"guest_clat.{number}.log", delimiter=",", usecols=(0, 1), ndmin=2
            )
            found[export] = Latencies(table[:, 0] / 1e3, table[:, 1] / 1e9)
        return found
