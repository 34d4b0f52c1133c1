"""block-stream of an immense disk that holds next to nothing."""

from __future__ import annotations

import random
import subprocess

from benchmarks import bare, images
from benchmarks.daemons import Kind
from benchmarks.images import CLUSTER, MIB, TIB
from benchmarks.lab import Lab
from benchmarks.measures.streams import Stream
from benchmarks.registry import Metric, WrongResult, register


class Sparse(Stream):
    """64 MiB in single clusters all over 1 TiB."""

    name, order = "stream-sparse", 16
    metrics = (
        Metric("seconds", "block-stream of 1 TiB holding 64 MiB", "s", less=True, target=100),
    )

    def prepare(self, lab: Lab) -> None:
        self.virtual = lab.size(TIB)
        self.length = lab.size(64 * MIB, CLUSTER)
        self.directory = lab.memory(4 * self.length + 64 * MIB)
        self.base = self.directory / "base.qcow2"
        images.run("qemu-img", "create", "-q", "-f", "qcow2", self.base, str(self.virtual))
        stride = self.virtual // (self.length // CLUSTER) // CLUSTER
        source = random.Random(5)
        places = [
            (number * stride + source.randrange(stride)) * CLUSTER
            for number in range(self.length // CLUSTER)
        ]
        writes = "".join(f"write -P {1 + n % 255} {place} 64k\n" for n, place in enumerate(places))
        done = subprocess.run(
            ["qemu-io", "-f", "qcow2", "-t", "unsafe", str(self.base)],
            input=writes, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode or "failed" in done.stdout:
            raise WrongResult(f"qemu-io: {done.stderr[-500:]}")

    def sample(self, lab: Lab, kind: Kind) -> dict[str, float]:
        return {"seconds": self.merge(kind)}

    def work(self) -> bare.Work:
        """The tables of the base are read as well, and those of the overlay are a page each."""
        pieces = bare.pieces_of(self.base)
        return bare.Work(pieces, bare.rest_of(self.base, pieces), len(pieces))

    def floor(self, lab: Lab) -> dict[str, float]:
        return {"seconds": self.bare_seconds()}


register(Sparse())
