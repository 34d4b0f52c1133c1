"""block-stream of a whole base into an empty overlay, in the places where images lie."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import bare, images, lab
from benchmarks.daemons import Daemon, Kind, qcow2
from benchmarks.images import GIB, MIB
from benchmarks.lab import Lab
from benchmarks.registry import Measure, Metric, register


class Stream(Measure):
    """Subclasses make ``base``; a sample streams it into ``top`` and compares the two."""

    place = "tmpfs"
    direct = False
    full = 4 * GIB
    base: Path
    length: int

    def prepare(self, lab: Lab) -> None:
        self.length = lab.size(self.full)
        self.directory = lab.place(self.place, 3 * self.length)
        self.base = self.directory / "base.qcow2"
        self.make(lab)

    def make(self, lab: Lab) -> None:
        images.dense(self.base, self.length)

    def merge(self, kind: Kind, **arguments: str) -> float:
        """Seconds of the stream; the daemon has ended and the image is right."""
        self.top = images.overlay(self.directory / "top.qcow2", self.base)
        lab.settle(self.directory)
        with Daemon(kind, self.directory, *qcow2("top", self.top, direct=self.direct)) as daemon:
            seconds = daemon.qmp.stream("top", **arguments)
            start = time.perf_counter()
            lab.to_disk(self.top)
            self.durable = seconds + time.perf_counter() - start
            self.note(daemon)
        images.same(self.top, self.base)
        return seconds

    def sample(self, lab: Lab, kind: Kind) -> dict[str, float]:
        return {"rate": self.length / MIB / self.merge(kind)}

    def work(self) -> bare.Work:
        """What any program has to copy."""
        return bare.Work(bare.pieces_of(self.base))

    def bare_seconds(self) -> float:
        """Of that copy without a daemon; on a file system until it is on the disk."""
        if self.copier is None:
            self.to_copy = self.work()
            on_disk = self.place != "tmpfs"
            # tmpfs has nothing but its page cache
            way = "direct" if self.direct and on_disk else self.place
            self.copier = bare.Copier(way, durable=on_disk)
        lab.settle(self.directory)
        seconds = self.copier.seconds(self.to_copy, self.directory / "bare")
        self.floor_how = self.copier.way
        return seconds

    copier: bare.Copier | None = None
    to_copy: bare.Work


class Dense(Stream):
    """Every cluster of the base has data."""

    def __init__(self, place: str, *, direct: bool, order: int) -> None:
        super().__init__()
        self.place, self.direct, self.order = place, direct, order
        cache = "direct" if direct else "buffered"
        self.name = f"stream-dense-{place}" + ("-direct" if direct else "")
        title = f"dense block-stream, {'file system' if place == 'disk' else place}, {cache}"
        self.metrics = (Metric("rate", title, "MiB/s", target=4),)
        if place == "disk":
            self.metrics += (Metric("durable", "... until all of it is on the disk", "MiB/s"),)

    def prepare(self, lab: Lab) -> None:
        super().prepare(lab)
        if self.direct:
            direct_or_not(self.base)

    def sample(self, lab: Lab, kind: Kind) -> dict[str, float]:
        figures = super().sample(lab, kind)
        if self.place == "disk":
            figures["durable"] = self.length / MIB / self.durable
        return figures

    def floor(self, lab: Lab) -> dict[str, float]:
        return {"rate": self.length / MIB / self.bare_seconds()}


def direct_or_not(path: Path) -> None:
    """``CannotRun`` where the file system has no O_DIRECT."""
    import os

    from benchmarks.registry import CannotRun

    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        raise CannotRun("this file system has no O_DIRECT") from None


register(Dense("tmpfs", direct=False, order=10))
register(Dense("tmpfs", direct=True, order=11))
register(Dense("disk", direct=False, order=12))
register(Dense("disk", direct=True, order=13))


class Reflink(Stream):
    """Base and overlay on one file system that can share extents."""

    full = 2 * GIB

    def __init__(self, place: str, order: int) -> None:
        super().__init__()
        self.place, self.order, self.name = place, order, f"stream-reflink-{place}"
        self.metrics = (
            Metric("rate", f"block-stream within one {place}", "MiB/s", target=50),
            Metric("space", f"... extra disk space, {place}", "MiB", less=True, limit=64),
        )

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        images.overlay(self.directory / "top.qcow2", self.base)
        before = lab.used(self.directory)
        seconds = self.merge(kind)
        space = lab.used(self.directory) - before
        return {"rate": self.length / MIB / seconds, "space": space / MIB}


register(Reflink("xfs", 14))
register(Reflink("btrfs", 15))


class Compressed(Stream):
    """A base of compressed clusters, about two to one."""

    full = GIB

    def __init__(self, compression: str, order: int) -> None:
        super().__init__()
        self.compression, self.order = compression, order
        self.name = f"stream-compressed-{compression}"
        title = f"block-stream of a {compression} base"
        self.metrics = (Metric("rate", title, "MiB/s", target=2),)

    def make(self, lab: Lab) -> None:
        images.dense(self.base, self.length, compression=self.compression)


register(Compressed("zlib", 17))
register(Compressed("zstd", 18))


class Deep(Stream):
    """A dense base under 63 snapshots of 64 MiB each, a few clusters here and there."""

    name, order = "stream-deep", 19
    metrics = (Metric("rate", "block-stream of a chain of 64", "MiB/s", target=4),)

    def make(self, lab: Lab) -> None:
        extent = 256 * images.KIB
        self.base = images.chain(self.directory, self.length, 64, self.length // 64, extent)

    def floor(self, lab: Lab) -> dict[str, float]:
        return {"rate": self.length / MIB / self.bare_seconds()}


register(Deep())


class Zeros(Stream):
    """Half of the base is zeros that were written as data."""

    name, order, full = "stream-zeros-space", 20, GIB
    metrics = (
        Metric("space", "disk space of a merged image, half zeros", "MiB", less=True, target=1),
        Metric("rate", "... and its rate", "MiB/s"),
    )

    def make(self, lab: Lab) -> None:
        images.dense(self.base, self.length, zeros=2)

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        seconds = self.merge(kind)
        return {
            "space": lab.space_of(self.top) / MIB,
            "rate": self.length / MIB / seconds,
        }


register(Zeros())
