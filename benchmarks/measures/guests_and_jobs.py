"""What a guest and a monitor feel while streams run, with one drive and with sixteen."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np

from benchmarks import bare, fio, images, lab
from benchmarks.daemons import Daemon, Kind, nbd, qcow2
from benchmarks.images import GIB, MIB
from benchmarks.lab import Lab
from benchmarks.registry import CannotRun, Measure, Metric, WrongResult, register


def count_writes(path: Path, directory: Path, told: int) -> None:
    """Every write that the guest was told of is there; it repeats no place before all are done."""
    blocks = images.guest_writes(path, directory)
    if not told <= blocks <= told + 1:
        raise WrongResult(f"{path.name}: {blocks} blocks were written, the guest was told {told}")


class Latency(Measure):
    """4 KiB random writes at 1000 a second into the overlay that a full-speed stream fills."""

    name, order = "guest-latency", 50
    metrics = (
        Metric("p50", "guest write during a stream, p50", "µs", less=True, target=1.2),
        Metric("p99", "... p99", "µs", less=True, target=1.2),
        Metric("max", "... slowest", "µs", less=True, target=1),
        Metric("rate", "... and the stream's rate meanwhile", "MiB/s", target=1, strict=True),
    )
    rate = 1000

    def prepare(self, lab: Lab) -> None:
        fio.available()
        self.length = lab.size(4 * GIB)
        self.directory = lab.memory(3 * self.length)
        self.base = self.directory / "base.qcow2"
        images.dense(self.base, self.length)

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        top = images.overlay(self.directory / "top.qcow2", self.base)
        lab.settle(self.directory)
        socket = self.directory / "nbd.sock"
        socket.unlink(missing_ok=True)
        with Daemon(kind, self.directory, *qcow2("top", top), *nbd(socket, "top")) as daemon:
            with fio.Guests(socket, ["top"], self.directory, rate=self.rate) as guests:
                start = time.time()
                seconds = daemon.qmp.stream("top")
                end = time.time()
            self.note(daemon)
        figures = self.figures(guests, start, end, seconds)
        count_writes(top, self.directory, guests.writes["top"])
        return figures

    def figures(
        self, guests: fio.Guests, start: float, end: float, seconds: float
    ) -> dict[str, float]:
        """Of the guest while a copy of ``seconds`` was under way, and of that copy."""
        during = guests.latencies()["top"].between(start, end) * 1e6
        if not len(during):
            if (end - start) * self.rate < 50:
                raise CannotRun("the stream was over before the guest had written")
            raise WrongResult("the guest was not served at all during the stream")
        return {
            "p50": float(np.percentile(during, 50)),
            "p99": float(np.percentile(during, 99)),
            "max": float(during.max()),
            "rate": self.length / MIB / seconds,
        }

    floor_how = "the guest on an nbdkit that does nothing, while two threads copy the bytes"

    def floor(self, lab: Lab) -> dict[str, float]:
        work = bare.Work(bare.pieces_of(self.base))
        copier = bare.Copier("tmpfs", durable=False)
        with (
            fio.bare_server(self.directory, "null", str(self.length)) as socket,
            fio.Guests(socket, ["top"], self.directory, rate=self.rate) as guests,
        ):
            start = time.time()
            seconds = copier.seconds(work, self.directory / "bare", bare.BESIDE)
            end = time.time()
        return self.figures(guests, start, end, seconds)


register(Latency())


class Sixteen(Measure):
    """Sixteen drives stream at once, each with a guest of 100 writes a second."""

    name, order = "sixteen-drives", 51
    metrics = (
        Metric("rate", "16 drives streaming at once, total", "MiB/s", target=2),
        Metric("served", "... least of what a guest got of its 100 writes/s", "%", limit=90),
        Metric("max", "... longest that any guest waited", "ms", less=True),
    )
    rate = 100
    names = tuple(f"drive{number}" for number in range(16))

    def prepare(self, lab: Lab) -> None:
        fio.available()
        self.length = lab.size(256 * MIB)
        self.directory = lab.memory(40 * self.length)
        for name in self.names:
            base = self.directory / f"{name}.base"
            if name == self.names[0]:
                images.dense(base, self.length)
            else:
                images.run("cp", self.directory / f"{self.names[0]}.base", base)

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        tops = {
            name: images.overlay(self.directory / name, self.directory / f"{name}.base")
            for name in self.names
        }
        lab.settle(self.directory)
        socket = self.directory / "nbd.sock"
        socket.unlink(missing_ok=True)
        options = [word for name, top in tops.items() for word in qcow2(name, top)]
        with Daemon(kind, self.directory, *options, *nbd(socket, *self.names)) as daemon:
            with fio.Guests(socket, list(self.names), self.directory, rate=self.rate) as guests:
                start = time.time()
                first = time.perf_counter()
                for name in self.names:
                    daemon.qmp("block-stream", device=name, job_id=name)
                seconds = max(daemon.qmp.completed(name) for name in self.names) - first
                end = time.time()
            self.note(daemon)
        during = {k: v.between(start, end) for k, v in guests.latencies().items()}
        for name, top in tops.items():
            count_writes(top, self.directory, guests.writes[name])
        least = min(len(found) for found in during.values())
        longest = max((found.max() for found in during.values() if len(found)), default=0.0)
        return {
            "rate": 16 * self.length / MIB / seconds,
            "served": 100 * least / max(1, int(self.rate * seconds)),
            "max": float(longest * 1e3),
        }

    floor_how = "the guests on an nbdkit that does nothing, while two threads copy eight disks each"

    def floor(self, lab: Lab) -> dict[str, float]:
        works = {
            name: bare.Work(bare.pieces_of(self.directory / f"{name}.base")) for name in self.names
        }

        def copy(names: tuple[str, ...]) -> None:
            for name in names:
                copier = bare.Copier("tmpfs", durable=False)
                copier.seconds(works[name], self.directory / f"{name}.bare", bare.ALONE)

        threads = [threading.Thread(target=copy, args=(self.names[n::2],)) for n in range(2)]
        with (
            fio.bare_server(self.directory, "null", str(self.length)) as socket,
            fio.Guests(socket, list(self.names), self.directory, rate=self.rate),
        ):
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - start
        return {"rate": 16 * self.length / MIB / seconds}


register(Sixteen())


class Queries(Measure):
    """query-block-jobs, one after the other, for as long as a stream runs."""

    name, order = "query-block-jobs", 52
    metrics = (
        Metric("rate", "query-block-jobs while streaming", "1/s", target=1),
        Metric("slowest", "... slowest answer", "ms", less=True),
    )

    def prepare(self, lab: Lab) -> None:
        self.length = lab.size(4 * GIB)
        self.directory = lab.memory(3 * self.length)
        self.base = self.directory / "base.qcow2"
        images.dense(self.base, self.length)

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        top = images.overlay(self.directory / "top.qcow2", self.base)
        lab.settle(self.directory)
        times = []
        with Daemon(kind, self.directory, *qcow2("top", top)) as daemon:
            daemon.qmp("block-stream", device="top", job_id="job0")
            while True:
                start = time.perf_counter()
                found = daemon.qmp("query-block-jobs")
                times.append(time.perf_counter() - start)
                if not found:
                    break
            daemon.qmp.completed("job0")
            self.note(daemon)
        images.same(top, self.base)
        return {"rate": len(times) / sum(times), "slowest": max(times) * 1e3}


register(Queries())


class Idle(Measure):
    """A daemon with one drive and an export that nobody uses."""

    name, order = "memory-idle", 60
    metrics = (Metric("memory", "resident memory, idle", "MiB", less=True, limit=60),)

    def prepare(self, lab: Lab) -> None:
        self.directory = lab.memory(16 * MIB)

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        disk = self.directory / "disk.qcow2"
        images.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "1T")
        socket = self.directory / "nbd.sock"
        socket.unlink(missing_ok=True)
        with Daemon(kind, self.directory, *qcow2("disk", disk), *nbd(socket, "disk")) as daemon:
            daemon.qmp("query-named-block-nodes")
            return {"memory": daemon.resident() / MIB}


register(Idle())
