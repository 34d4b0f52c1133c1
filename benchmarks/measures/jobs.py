"""The other jobs that copy a whole disk: commits, mirror and backup of a dense one."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import bare, images, lab
from benchmarks.daemons import Daemon, Kind, Qmp, qcow2
from benchmarks.images import GIB, MIB
from benchmarks.lab import Lab
from benchmarks.registry import Measure, Metric, register


class Job(Measure):
    """``source`` is dense and stays as it is; each sample copies it into a new ``target``."""

    title: str
    command: str
    #: whether it becomes ready and is then completed
    ready = False

    def __init__(self, name: str, order: int, title: str) -> None:
        super().__init__()
        self.name, self.order = f"job-{name}", order
        self.metrics = (Metric("rate", f"{title} of a dense disk, tmpfs", "MiB/s", target=1),)

    def prepare(self, lab: Lab) -> None:
        self.length = lab.size(2 * GIB)
        self.directory = lab.memory(3 * self.length)
        self.source = self.directory / "source.qcow2"
        self.target = self.directory / "target.qcow2"
        images.dense(self.source, self.length)

    def new_target(self) -> None:
        self.target.unlink(missing_ok=True)
        images.run("qemu-img", "create", "-q", "-f", "qcow2", self.target, str(self.length))

    def nodes(self) -> tuple[str, ...]:
        """Options that open the images."""
        return (*qcow2("source", self.source), *qcow2("target", self.target))

    def arguments(self) -> dict[str, str]:
        """Of the command."""
        return {"device": "source", "target": "target", "sync": "full"}

    def sample(self, lab_: Lab, kind: Kind) -> dict[str, float]:
        self.new_target()
        lab.settle(self.directory)
        with Daemon(kind, self.directory, *self.nodes()) as daemon:
            seconds = self.run(daemon.qmp)
            self.note(daemon)
        images.check(self.target)
        images.run("qemu-img", "compare", "-q", self.target, self.source)
        self.target.unlink()
        return {"rate": self.length / MIB / seconds}

    def run(self, qmp: Qmp) -> float:
        """Seconds from the command to the end of the job."""
        start = time.perf_counter()
        qmp(self.command, job_id="job0", **self.arguments())
        if self.ready:
            qmp.wait("BLOCK_JOB_READY", "job0")
            qmp("block-job-complete", device="job0")
        return qmp.completed("job0") - start

    copier: bare.Copier | None = None
    to_copy: bare.Work

    def floor(self, lab: Lab) -> dict[str, float]:
        if self.copier is None:
            self.copier = bare.Copier("tmpfs", durable=False)
            self.new_target()  # of which the source may be an overlay
            self.to_copy = bare.Work(bare.pieces_of(self.source))
            self.target.unlink()
        seconds = self.copier.seconds(self.to_copy, self.directory / "bare")
        self.floor_how = self.copier.way
        return {"rate": self.length / MIB / seconds}


class Mirror(Job):
    command, ready = "blockdev-mirror", True


class Backup(Job):
    command = "blockdev-backup"


class ActiveCommit(Job):
    """``source`` is an overlay of ``target``, whose guest has written all of it."""

    command, ready = "block-commit", True

    def prepare(self, lab: Lab) -> None:
        super().prepare(lab)
        self.new_target()
        images.run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", self.target, self.source)

    def nodes(self) -> tuple[str, ...]:
        return qcow2("source", self.source)

    def arguments(self) -> dict[str, str]:
        return {"device": "source"}


class Commit(ActiveCommit):
    """The same, with an empty image above."""

    ready = False
    top: Path

    def nodes(self) -> tuple[str, ...]:
        self.top = images.overlay(self.directory / "top.qcow2", self.source)
        return qcow2("top", self.top)

    def arguments(self) -> dict[str, str]:
        return {"device": "top", "top": str(self.source)}


register(Commit("commit", 21, "block-commit"))
register(ActiveCommit("commit-active", 22, "block-commit of the active image"))
register(Mirror("mirror", 23, "blockdev-mirror"))
register(Backup("backup", 24, "blockdev-backup"))
