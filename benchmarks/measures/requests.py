"""4 KiB and 1 MiB requests of a guest over NBD, into what is allocated and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import fio, images, lab
from benchmarks.daemons import Daemon, Kind, nbd, qcow2
from benchmarks.images import CLUSTER, GIB, MIB
from benchmarks.lab import Lab
from benchmarks.registry import Measure, Metric, WrongResult, register


class Guest(Measure):
    """One guest on an export of ``image``, which ``fresh`` makes anew where samples change it."""

    full = GIB
    rw = "randread"
    depth = 16
    block = "4k"

    def prepare(self, lab: Lab) -> None:
        fio.available()
        self.length = lab.size(self.full)
        self.directory = lab.memory(4 * self.length)
        self.base = self.directory / "base.qcow2"
        images.dense(self.base, self.length)
        self.image = self.base

    def fresh(self) -> None:
        if "write" in self.rw:
            self.image = self.directory / "guest.qcow2"
            images.run("cp", self.base, self.image)

    def options(self, lab: Lab) -> dict[str, object]:
        return {"time_based": 1, "runtime": f"{lab.duration * 1000:.0f}ms"}

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        self.fresh()
        lab.settle(self.directory)
        socket = self.directory / "nbd.sock"
        socket.unlink(missing_ok=True)
        with Daemon(
            kind, self.directory, *qcow2("disk", self.image), *nbd(socket, "disk")
        ) as daemon:
            found = self.requests(lab_, socket)
            self.note(daemon, found["total_ios"])
            if "write" not in self.rw:
                uri = f"nbd+unix:///disk?socket={socket}"
                images.same_live(uri, self.base)
        if "write" in self.rw:
            self.verify(int(found["total_ios"]))
        return {"rate": self.rate_of(found)}

    def requests(self, lab: Lab, socket: Path) -> dict[str, Any]:
        """What fio says of its requests to whoever serves there."""
        return fio.measure(
            socket, "disk", self.directory,
            rw=self.rw, bs=self.block, iodepth=self.depth, **self.options(lab),
        )  # fmt: skip

    def rate_of(self, found: dict[str, Any]) -> float:
        """Requests or MiB a second."""
        return float(found["iops"] if self.block == "4k" else found["bw_bytes"] / MIB)

    floor_how = "the same guest on an nbdkit that does nothing"

    def floor(self, lab: Lab) -> dict[str, float]:
        """By as many threads as nbdkit likes, or by one: whichever is faster."""
        rates = []
        for threads in ((), ("-t", "1")):
            words = self.bare()
            with fio.bare_server(self.directory, *threads, *words) as socket:
                rates.append(self.rate_of(self.requests(lab, socket)))
        return {"rate": max(rates)}

    def bare(self) -> tuple[str | Path, ...]:
        """nbdkit's words for the server that does the least."""
        return ("null", str(self.length))

    def raw(self) -> Path:
        """The bytes of the base as a file."""
        raw = self.directory / "base.raw"
        if not raw.exists():
            images.run("qemu-img", "convert", "-O", "raw", self.base, raw)
        return raw

    def verify(self, requests: int) -> None:
        """fio visits every place once before it begins anew, so that blocks can be counted."""
        size = 1 if self.block == "4k" else MIB // images.BLOCK
        expected = min(requests * size, self.length // images.BLOCK)
        written = images.guest_writes(self.image, self.directory)
        if written < expected - self.depth * size or written > expected + self.depth * size:
            raise WrongResult(f"{written} blocks were written, the guest was told {expected}")


class Random4k(Guest):
    def __init__(self, rw: str, depth: int, target: float, order: int) -> None:
        super().__init__()
        self.rw, self.depth, self.order = rw, depth, order
        self.name = f"nbd-{rw}-qd{depth}"
        self.metrics = (Metric("rate", f"NBD 4 KiB {rw}, depth {depth}", "IOPS", target=target),)


for _place, (_rw, _depth, _target) in enumerate(
    [("randread", 1, 1.2), ("randread", 16, 3), ("randread", 64, 3),
     ("randwrite", 1, 1.2), ("randwrite", 16, 2.5), ("randwrite", 64, 2.5)]
):  # fmt: skip
    register(Random4k(_rw, _depth, _target, 30 + _place))


class Sequential(Guest):
    block = "1m"
    depth = 4

    def __init__(self, rw: str, order: int) -> None:
        super().__init__()
        self.rw, self.order, self.name = rw, order, f"nbd-seq-{rw}"
        self.metrics = (Metric("rate", f"NBD 1 MiB sequential {rw}", "MiB/s", target=1.2),)

    floor_how = "the same guest on an nbdkit with a raw file"

    def bare(self) -> tuple[str | Path, ...]:
        return ("file", self.raw())


register(Sequential("read", 38))
register(Sequential("write", 39))


class CopyOnWrite(Guest):
    """4 KiB writes into an empty overlay, few enough that nearly each one copies a cluster."""

    name, order, rw, full = "nbd-cow", 37, "randwrite", 4 * GIB
    metrics = (Metric("rate", "NBD 4 KiB randwrite that copies a cluster", "IOPS", target=1.5),)

    floor_how = "the same guest on an nbdkit that only copies clusters on write (filter cow)"

    def fresh(self) -> None:
        self.image = images.overlay(self.directory / "guest.qcow2", self.base)

    def bare(self) -> tuple[str | Path, ...]:
        return ("--filter=cow", "file", self.raw(), f"cow-block-size={CLUSTER}")

    def options(self, lab: Lab) -> dict[str, object]:
        return {"io_size": self.length // CLUSTER // 4 * images.BLOCK}

    def verify(self, requests: int) -> None:
        written = images.guest_writes(self.image, self.directory)
        if written != requests:
            raise WrongResult(f"{written} blocks were written, the guest was told {requests}")


register(CopyOnWrite())


class Overlays(Guest):
    """Through a dense base and 32 overlays, and the same daemon's figure without them."""

    name, order = "nbd-overlays", 40
    metrics = (
        Metric("rate", "NBD 4 KiB randread through 32 overlays, depth 16", "IOPS", target=6),
        Metric("share", "... share of the rate without overlays", "%", limit=90),
    )

    def prepare(self, lab: Lab) -> None:
        super().prepare(lab)
        self.top = images.chain(self.directory, self.length, 33, self.length // 64, CLUSTER)

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        bottom = self.directory / "layer00.qcow2"
        self.base = self.image = bottom
        alone = super().sample(lab_, kind)["rate"]
        self.base = self.image = self.top
        deep = super().sample(lab_, kind)["rate"]
        return {"rate": deep, "share": 100 * deep / alone}


register(Overlays())
