"""The journal of jobs: a file of lines that says, after a crash, which jobs were under way.

Specification: docs/job-journal.md. Runs on the event loop, the file's system calls on a worker (at
the start, before anything is served, on the loop).

Invariants: lines reach the disk in order, each with what came before it, and ``synced`` returns
after that. The file is replaced by a shorter one that says the same, never cut. One daemon at a
time has it. A journal that cannot be written is logged and tried again each second, and stops no
job; while what it says of drives is not so, it is under another name, and no daemon starts by it.

Errors: ``BlockError`` from ``open``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from errno import EAGAIN
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.events import Event, JobStatusChange
from liveblockd.graph.node import Node
from liveblockd.jobs.history import (
    DriveRecord,
    History,
    Image,
    JobRecord,
    began_line,
    drive_line,
    ended_line,
    speed_line,
)
from liveblockd.jobs.job import Job
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.transitions import JobStatus
from liveblockd.runtime.workers import WorkerPool

log = logging.getLogger(__name__)

#: how every journal begins
_START: Final = b'{"journal"'
#: bytes after which the file is written anew
MOST: Final = 1 << 20
#: seconds until a journal that could not be written is tried again
RETRY: Final = 1.0
#: parameters that mean something to the next daemon; node names may not
_LASTING: Final = (
    "backing_file", "backing_mask_protocol", "on_error", "filter_node_name", "auto_finalize",
    "auto_dismiss",
)  # fmt: skip


class Journal:
    """Made by ``open``; told of jobs by the events of their scheduler."""

    def __init__(self, path: str, workers: WorkerPool) -> None:
        self.path = path
        #: what the file is called while drives are elsewhere than it says
        self._outdated = f"{path}.outdated"
        self.history = History()
        #: the daemon ends by a signal: jobs that it cancels are to go on when it is back
        self.ending = False
        #: whether a layer is the active one of a drive whose place is written down here
        self.on_drive: Callable[[Node], bool] = lambda _: False
        self._workers = workers
        self._size = 0
        self._lock_fd = -1
        self._fd = -1
        #: jobs that have a line, and have not ended
        self._known: set[Job] = set()
        self._lines: list[dict[str, Any]] = []
        #: lines were lost on the way to the file: it is to be written anew
        self._behind = False
        self._writer: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None

    @classmethod
    def open(cls, path: str, workers: WorkerPool) -> Journal:
        """Read what the last daemon wrote, and write it anew."""
        journal = cls(os.path.abspath(path), workers)
        try:
            journal._open()
        except OSError as error:
            journal._close_files()
            if error.errno == EAGAIN:
                raise BlockError(f"'{path}' belongs to a running daemon") from error
            raise BlockError.from_os_error(f"Could not open '{path}'", error) from error
        except ValueError as error:
            journal._close_files()
            raise BlockError(f"'{path}': {error}") from error
        return journal

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._lock_fd = os.open(f"{self.path}.lock", flags, 0o640)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(self._outdated):
            raise ValueError(
                f"where drives were last could not be written down; see that each names the image "
                f"that its guest wrote last, then remove '{self._outdated}'"
            )
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            # it is about to be replaced: somebody may have given the name of a disk image
            if (start := file.read(len(_START))) not in (b"", _START):
                raise ValueError("something else than a journal of jobs is there")
            if bad := self.history.load(start + file.read()):
                log.warning("%s: %d lines make no sense and are left out", self.path, bad)
        self._replace(_encode(self.history.lines()))

    def _replace(self, data: bytes) -> None:
        """The file is ``data`` afterwards, or as it was."""
        new = f"{self.path}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(new, flags, 0o640)
        try:
            _write(fd, data)
            os.fsync(fd)
            os.rename(new, self.path)
            _sync_directory(self.path)
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = fd, len(data)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._outdated)

    # -- what is written

    def attend(self, scheduler: Scheduler) -> None:
        """Write down the jobs of ``scheduler`` from now on."""

        def note(event: Event) -> None:
            if not isinstance(event, JobStatusChange):
                return
            job = scheduler.find(event.id)
            if job is None or job.immediate:
                return
            try:
                if event.status == JobStatus.RUNNING:
                    self._began(job)
                elif event.status == JobStatus.CONCLUDED and job in self._known:
                    self._ended(job)
            except Exception:  # no job shall fail for it
                log.exception("the journal of jobs: job %s", job.id)

        scheduler.publisher.subscribe(note)
        scheduler.write_down = self._write_down
        scheduler.on_speed = self._speed_set

    async def _write_down(self, job: Job) -> None:
        if job.immediate:
            return
        try:
            self._began(job)
        except Exception:  # it shall start all the same
            log.exception("the journal of jobs: job %s", job.id)
        await self.synced()

    def _began(self, job: Job) -> None:
        if job in self._known:
            return
        layers, base = job.images()
        parameters = getattr(job, "parameters", None)
        given = dataclasses.asdict(parameters) if dataclasses.is_dataclass(parameters) else {}  # type: ignore[arg-type]
        lasting = {name: given[name] for name in _LASTING if given.get(name) is not None}
        record = JobRecord(
            job.id,
            str(job.type),
            time.time(),
            tuple(image_of(layer) for layer in layers),
            None if base is None else image_of(base),
            lasting | {"speed": job.speed},
        )
        self._known.add(job)
        self._add(began_line(record))

    def _speed_set(self, job: Job) -> None:
        if job in self._known:
            self._add(speed_line(job.id, job.speed))

    def _ended(self, job: Job) -> None:
        self._known.discard(job)
        if job.cancelled and self.ending:
            return
        result = "cancelled" if job.cancelled else "failed" if job.error else "completed"
        self.give_up(job.id, result, None if job.error is None else job.error.message)

    def give_up(self, job_id: str, result: str, error: str | None = None) -> None:
        """The job is not to go on."""
        if job_id in self.history.jobs:
            self._add(ended_line(job_id, time.time(), result, error))

    def drive_moved(self, name: str, opened: Image, node: Node) -> None:
        """A drive that was opened on ``opened`` is on ``node`` now."""
        self._add(drive_line(name, opened, image_of(node)))

    def drive(self, name: str) -> DriveRecord | None:
        """Where the drive was last, if that is not where it was opened."""
        return self.history.drives.get(name)

    def _add(self, line: dict[str, Any]) -> None:
        self.history.apply(line)
        self._lines.append(line)
        self._start_writer()

    def _start_writer(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(), name="journal")

    async def _write(self) -> None:
        try:
            while self._lines or self._behind:
                lines, self._lines = self._lines, []
                data = _encode(lines)
                try:
                    if self._behind or self._size + len(data) > MOST:
                        self._behind = True
                        await self._workers.run(self._replace, _encode(self.history.lines()))
                        self._behind = False
                    else:
                        await self._workers.run(_append, self._fd, data)
                        self._size += len(data)
                except OSError as error:
                    log.error("the journal of jobs %s: %s", self.path, error.strerror)
                    self._behind = True  # a line may be cut off
                    if any("drive" in line for line in lines):
                        await self._workers.run(self._set_aside)
                    if not self._lines:
                        again = asyncio.get_running_loop().call_later
                        self._again = again(RETRY, self._start_writer)
                        return
        finally:
            self._writer = None

    def _set_aside(self) -> None:
        """Guests write elsewhere than the file says: no daemon may go by it. Runs on a worker."""
        try:
            with contextlib.suppress(FileNotFoundError):  # it is aside already
                os.rename(self.path, self._outdated)
            _sync_directory(self.path)
        except OSError as error:
            log.error("'%s' says wrong places of drives: %s", self.path, error.strerror)

    async def synced(self) -> None:
        """Return when all that was told is durable, or could not be written."""
        while self._writer is not None:
            await asyncio.wait((self._writer,))

    async def close(self) -> None:
        """The end; twice is harmless."""
        if self._again is not None:
            self._start_writer()  # the last time
        await self.synced()
        if self._again is not None:
            self._again.cancel()
        self._close_files()

    def _close_files(self) -> None:
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1


def image_of(layer: Node) -> Image:
    """How the next daemon knows an image again."""
    node, below = layer, layer.file
    while below is not None:
        node, below = below, below.file
    name = node.filename  # plain, or else json:
    inode = 0
    if node.driver_class.driver_name in ("file", "host_device"):
        name = os.path.realpath(name)
        if (host := node.driver.host_file()) is not None:
            inode = os.fstat(host.fd).st_ino
    return Image(name, layer.driver_class.driver_name, inode)


def _sync_directory(path: str) -> None:
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _encode(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _append(fd: int, data: bytes) -> None:
    """Runs on a worker."""
    _write(fd, data)
    os.fdatasync(fd)


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
