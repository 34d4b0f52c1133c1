"""How long a client waits for a job that it pauses, cancels or ends while many jobs are at work.

A cancel (`job-cancel`) promises nothing of what was copied. The end of a ready job without a switch
(`block-job-cancel`) promises that its target is what the disk was, durable: it waits for the disk,
and has a line of its own, beside what an fdatasync took meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Self

from benchmarks import fio, images, lab
from benchmarks.daemons import Daemon, Kind, Qmp, QmpFailure, nbd
from benchmarks.images import MIB
from benchmarks.lab import Lab
from benchmarks.registry import CannotRun, Measure, Metric, register

#: sixteen jobs of all kinds; those that are ready when it begins have less to copy
MIXED = (
    *("stream",) * 4,
    *("commit",) * 2,
    *("active",) * 2,
    *("mirror",) * 2,
    *("ready",) * 2,
    *("backup",) * 4,
)
READY = ("active", "ready")
END = Metric(
    "end",
    "... end of a ready job without a switch (block-job-cancel), longest",
    "ms",
    less=True,
)


class Stopping(Measure):
    """Every job is paused, resumed, and later cancelled, one after the other.

    All copy from one dense image, each into an image of its own; the first two of each kind, of
    those whose disk a guest could write to, have a guest. Nothing ends by itself: a job that did
    before its turn came does not count.
    """

    def __init__(self, name: str, order: int, kinds: tuple[str, ...], title: str) -> None:
        super().__init__()
        self.name, self.order = name, order
        self.jobs = [f"{kind}{number}" for number, kind in enumerate(kinds)]
        self.metrics = (
            Metric("pause", f"{title}: pause, longest", "ms", less=True, limit=100),
            Metric("pause-median", "... median", "ms", less=True),
            Metric("cancel", "... cancel (job-cancel), longest", "ms", less=True, limit=100),
            Metric("cancel-median", "... median", "ms", less=True),
            *((END,) if any(kind in READY for kind in kinds) else ()),
            Metric("sync", "... fdatasync(2) of another file meanwhile, longest", "ms", less=True),
        )

    rate = 100

    def prepare(self, lab: Lab) -> None:
        fio.available()
        self.length = lab.size(512 * MIB)
        self.short = lab.size(64 * MIB)
        self.directory = lab.disk(17 * self.length)
        self.source = self.directory / "source.qcow2"
        images.dense(self.source, self.length)
        images.dense(self.directory / "short.qcow2", self.short)
        for job in self.jobs:
            if kind_of(job) == "commit":  # nobody else may read what it commits
                images.run("cp", self.source, self.directory / f"{job}.middle")

    def guests(self) -> list[str]:
        """Exports: the disks that have a guest."""
        found: dict[str, list[str]] = {}
        for job in self.jobs:
            found.setdefault(kind_of(job), []).append(job)
        return [
            job
            for kind in ("stream", "active", "ready", "backup")
            for job in found.get(kind, [])[:2]
        ]

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        options = [word for job in self.jobs for word in self.disk(job)]
        lab.settle(self.directory)
        socket = self.directory / "nbd.sock"
        socket.unlink(missing_ok=True)
        guests = self.guests()
        with Daemon(kind, self.directory, *options, *nbd(socket, *guests)) as daemon:
            with fio.Guests(socket, guests, self.directory, rate=self.rate):
                figures = self.measure(daemon.qmp)
            self.note(daemon)
        for job in self.jobs:
            images.check(self.directory / f"{job}.qcow2")
        return figures

    def disk(self, job: str) -> list[str]:
        """Make the images of a job; the options that open them."""
        path, target = self.directory / f"{job}.qcow2", self.directory / f"{job}.target"
        kind = kind_of(job)
        short = kind in READY
        source = self.directory / "short.qcow2" if short else self.source
        create(target, self.short if short else self.length)
        if kind == "active":
            path.unlink(missing_ok=True)
            images.run("cp", source, path)
            return node(job, path, backing=node_of(f"{job}-target", target))
        images.overlay(path, target if kind == "commit" else source)
        if kind == "commit":
            below = node_of(f"{job}-target", target)
            middle = node_of(f"{job}-top", self.directory / f"{job}.middle")
            middle += ["read-only=on", *(f"backing.{word}" for word in below)]
            return node(job, path, backing=middle)
        options = node(job, path)
        return options if kind == "stream" else options + node(f"{job}-target", target)

    def start(self, qmp: Qmp, job: str) -> None:
        target = f"{job}-target"
        match kind_of(job):
            case "stream":
                qmp("block-stream", job_id=job, device=job)
            case "commit":
                qmp("block-commit", job_id=job, device=job, top_node=f"{job}-top", base_node=target)
            case "active":
                qmp("block-commit", job_id=job, device=job, base_node=target)
            case "backup":
                qmp("blockdev-backup", job_id=job, device=job, target=target, sync="full")
            case _:
                qmp("blockdev-mirror", job_id=job, device=job, target=target, sync="full")

    def measure(self, qmp: Qmp) -> dict[str, float]:
        """Milliseconds. The first of each kind that is ready is asked to end, not cancelled."""
        ready = [job for job in self.jobs if kind_of(job) in READY]
        for job in ready:
            self.start(qmp, job)
        for job in ready:
            qmp.wait("BLOCK_JOB_READY", job)
        for job in self.jobs:
            if job not in ready:
                self.start(qmp, job)
        gently = ready[::2]
        pauses: dict[str, float] = {}
        stops: dict[str, float] = {}
        with Syncs(self.directory / "other") as syncs:
            for job in self.jobs:
                if (found := seconds(qmp, job, "pause", gently)) is not None:
                    pauses[job] = found * 1e3
                    qmp("job-resume", id=job)
            for job in self.jobs[::-1]:
                if (found := seconds(qmp, job, "cancel", gently)) is not None:
                    stops[job] = found * 1e3
        ends = {job: stops.pop(job) for job in gently if job in stops}
        self.found = {"pause": pauses, "cancel": stops, "end": ends}
        missing = len(ends) < len(gently)
        if missing or 2 * min(len(pauses), len(stops) + len(ends)) < len(self.jobs):
            raise CannotRun("the jobs were over before they were stopped")
        figures = {"sync": max(syncs.times) * 1e3}
        for name, times in (("pause", pauses), ("cancel", stops)):
            figures[name] = max(times.values())
            figures[f"{name}-median"] = sorted(times.values())[len(times) // 2]
        if ends:
            figures["end"] = max(ends.values())
        return figures


class Syncs:
    """Somebody who writes 4 KiB and waits until they are durable, again and again."""

    def __init__(self, path: Path) -> None:
        self.times: list[float] = []
        self._path = path
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        with self._path.open("wb", buffering=0) as file:
            while not self._enough.wait(0.02) or not self.times:
                file.write(bytes(4096))
                start = time.perf_counter()
                os.fdatasync(file.fileno())
                self.times.append(time.perf_counter() - start)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._enough.set()
        self._thread.join()


def kind_of(job: str) -> str:
    return job.rstrip("0123456789")


def create(path: Path, length: int) -> None:
    path.unlink(missing_ok=True)
    images.run("qemu-img", "create", "-q", "-f", "qcow2", path, str(length))


def node_of(name: str, path: Path) -> list[str]:
    return ["driver=qcow2", f"node-name={name}", "file.driver=file", f"file.filename={path}"]


def node(name: str, path: Path, backing: list[str] | None = None) -> list[str]:
    words = node_of(name, path) + [f"backing.{word}" for word in backing or ()]
    return ["--blockdev", ",".join(words)]


def seconds(qmp: Qmp, job: str, verb: str, gently: list[str]) -> float | None:
    """From the command to the event that says that it is done; None: it had ended by itself."""
    del qmp.events[:]
    start = time.perf_counter()
    try:
        if verb == "cancel" and job in gently:
            qmp("block-job-cancel", device=job)
        else:
            qmp(f"job-{verb}", id=job)
    except QmpFailure:
        return None
    while True:
        for event in qmp.events:
            data = event["data"]
            if verb == "pause" and data.get("id") == job:
                if data["status"] in ("paused", "standby"):
                    return float(event["clock"]) - start
                if data["status"] in ("concluded", "null"):
                    return None
            ended = event["event"] in ("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED")
            if verb == "cancel" and ended and data["device"] == job:
                return float(event["clock"]) - start
        qmp.await_event()


register(Stopping("job-latency", 54, MIXED, "16 jobs of all kinds, file system, 8 guests"))
register(Stopping("job-latency-streams", 55, ("stream",) * 16, "16 streams, file system"))
