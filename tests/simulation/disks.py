"""Disks of a simulated machine: the driver ``simdisk``, and the log of all that happens to them.

A ``Medium`` is a file on a disk: its content is what the page cache has. Every write is logged when
it begins (from then on any of its sectors may reach the disk) and when it ends, every flush when it
begins and ends: ``crash.Replay`` makes from one log the disks that a power cut at any moment
could leave. All media of a machine share one log, so that a cut hits them at the same instant.

The content lives in a memfd, so that workers copy from disk to disk by descriptors, as in the real
daemon; ``SimulatedWorkers`` logs what they did.

One seed decides all delays and faults; delays are of simulated time (``virtual.VirtualLoop``).
A failed flush is final, as in ``storage.file``: which pages the kernel dropped nobody knows.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable, Sequence
from errno import EIO, ENOSPC, EPERM
from typing import Any, NamedTuple, Self, TypeVar

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2 import gather, new_tables, populate
from liveblockd.runtime.halting import Work
from liveblockd.runtime.workers import JobFuture, JobGroup, Lane, WorkerPool
from liveblockd.storage import copy_engine
from liveblockd.storage.driver import (
    BlockDriver,
    BlockIO,
    Buffer,
    Done,
    Extent,
    ExtentKind,
    Source,
)
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver
from liveblockd.storage.segments import Segment
from liveblockd.storage.unpacking import Unpacking

T = TypeVar("T")

#: seeds below this are those of tests
CHOSEN = 20000


class Entry(NamedTuple):
    """One line of the log; ``medium`` is -1 for what is no disk's, -2 of the second drive, ..."""

    kind: str  # write, end, fail, flush, flushed, unflushed, and those of ``history``
    medium: int
    number: int  # of the request that began or ended
    offset: int = 0
    data: Any = b""


class Machine:
    """The disks of one drive, their log and their weather.

    ``beside``: the machine of another drive of the same daemon. All of them have one log, one order
    of all that happens and one set of names; each has faults of its own.
    """

    def __init__(self, seed: int, beside: Machine | None = None) -> None:
        self.random = beside.random if beside else random.Random(f"disks {seed}")
        self.log: list[Entry] = beside.log if beside else []
        self.media: list[Medium] = beside.media if beside else []
        self.names: dict[str, Medium] = beside.names if beside else {}
        self._numbers = beside._numbers if beside else itertools.count(1)
        #: which of the drives
        self.drive = beside.drive + 1 if beside else 0
        #: no delays, no log: while a chain is prepared
        self.quiet = True
        #: probability of a fault by operation: read, write, flush
        self.faults: dict[str, float] = {}
        self.injected = 0
        #: L2 tables that workers wrote
        self.tables_made = 0
        #: the disks are taken as memory; not those of seeds that tests have chosen for their course
        self.in_memory = beside.in_memory if beside else seed >= CHOSEN and seed % 3 == 0
        #: above 0: no faults
        self.calm = 0

    def add(self, *names: str) -> Medium:
        """A new empty file with its names."""
        medium = Medium(self, len(self.media), names[0])
        self.media.append(medium)
        for name in names:
            self.names[name] = medium
        return medium

    def number(self) -> int:
        """Of the next request."""
        return next(self._numbers)

    def note(self, kind: str, number: int = 0, offset: int = 0, data: Any = b"") -> None:
        """Log what is no disk's, but the drive's."""
        if not self.quiet:
            self.log.append(Entry(kind, ~self.drive, number, offset, data))

    async def delay(self) -> None:
        """As long as a disk takes for a step."""
        if self.quiet:
            return
        kind = self.random.randrange(8)
        if kind < 2:
            await asyncio.sleep(0)
        elif kind < 7:
            await asyncio.sleep(self.random.random() * 0.004)
        else:
            await asyncio.sleep(self.random.random() * 0.06)

    def fault(self, operation: str, medium: Medium) -> bool:
        """Whether this one is to fail."""
        probability = medium.faults.get(operation, self.faults.get(operation, 0.0))
        if not probability or self.quiet or self.calm or self.random.random() >= probability:
            return False
        self.injected += 1
        return True

    def close(self) -> None:
        """Let go of the memory of all drives."""
        for medium in self.media:
            os.close(medium.fd)


class Medium:
    """A file of the machine."""

    def __init__(self, machine: Machine, index: int, name: str) -> None:
        self.machine = machine
        self.index = index
        self.name = name
        self.fd = os.memfd_create(f"simdisk {name}", os.MFD_CLOEXEC)
        self.length = 0
        #: a flush has failed: so does every later one
        self.flush_failed = False
        #: probability of a fault, in place of the machine's
        self.faults: dict[str, float] = {}
        #: so many flushes to come do nothing (a defect that tests put in)
        self.skip_flushes = 0

    @property
    def read_flags(self) -> int | None:
        """Not known."""
        return None

    @property
    def in_memory(self) -> bool:
        """Whether clusters are copied at once here, whatever a power cut makes of it."""
        return self.machine.in_memory

    @property
    def direct(self) -> bool:
        """As ``storage.driver.HostFile``."""
        return False

    def content(self) -> bytes:
        """What the page cache has."""
        return os.pread(self.fd, self.length, 0)

    def load(self, offset: int, length: int) -> bytes:
        """Bytes; zeros past the end."""
        return os.pread(self.fd, length, offset).ljust(length, b"\0")

    def store(self, offset: int, data: bytes) -> None:
        """Into the page cache."""
        os.pwrite(self.fd, data, offset)
        self.length = max(self.length, offset + len(data))

    def begin(self, kind: str, offset: int = 0, data: bytes = b"") -> int:
        """Log the beginning of a request; its number."""
        machine = self.machine
        number = machine.number()
        if not machine.quiet:
            machine.log.append(Entry(kind, self.index, number, offset, data))
        return number

    def end(self, kind: str, number: int) -> None:
        """Log its end."""
        if not self.machine.quiet:
            self.machine.log.append(Entry(kind, self.index, number))


@register_driver
class SimulatedDisk(BlockDriver):
    """A ``Medium`` opened; what ``storage.file`` is for a real file."""

    driver_name = "simdisk"
    #: where ``open`` finds files; set for the length of a run
    machine: Machine | None = None

    class Options(BlockdevOptions):
        """Members of ``blockdev-add``."""

        filename: str

    def __init__(self, medium: Medium, *, read_only: bool = False, unmaps: bool = True) -> None:
        self.children: dict[str, BlockIO] = {}
        self.medium = medium
        self.read_only = read_only
        self._unmaps = unmaps
        self._begun: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, options: Options, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """As a driver is opened by the graph."""
        assert cls.machine is not None
        medium = cls.machine.names.get(options.filename)
        if medium is None:
            raise BlockError(f"Could not open '{options.filename}': No such file or directory")
        return cls(medium, read_only=bool(options.read_only), unmaps=options.unmaps)

    @property
    def length(self) -> int:
        """Bytes."""
        return self.medium.length

    def host_file(self) -> Medium | None:
        """For copies by workers."""
        return self.medium

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        machine = self.medium.machine
        if not machine.quiet and machine.random.random() < 0.3:
            return None
        return self.medium.load(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        medium = self.medium
        if self.read_only or (not medium.machine.quiet and medium.machine.random.random() < 0.6):
            return False
        if medium.machine.faults:
            return False
        content = bytes(data)
        number = medium.begin("write", offset, content)
        medium.store(offset, content)
        medium.end("end", number)
        return True

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """One after the other, until one is not made."""
        for number, (offset, data) in enumerate(zip(offsets, parts, strict=True)):
            if not self.write_nowait(offset, data):
                return number
        return len(parts)

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        found = list[Buffer]()
        for offset in offsets:
            data = self.read_nowait(offset, length)
            if data is None:
                break
            found.append(data)
        return found

    def copy_nowait(self, offset: int, source: Source, inside: int, data: Buffer) -> bool:
        """Two writes, of which the second is not always made."""
        medium, machine = self.medium, self.medium.machine
        if (
            self.read_only
            or machine.faults
            or (not machine.quiet and machine.random.random() < 0.5)
        ):
            return False
        assert isinstance(source.file, Medium)
        writes = [(offset, source.file.load(source.source_offset, source.length))]
        whole = machine.quiet or machine.random.random() < 0.9
        if whole:
            writes.append((offset + inside, bytes(data)))
        for place, content in writes:
            number = medium.begin("write", place, content)
            medium.store(place, content)
            medium.end("end", number)
        return whole

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        if self.read_only or self.medium.machine.random.random() < 0.2:
            return False
        content = bytes(data)

        async def write() -> None:
            error = None
            try:
                await self.write(offset, content)
            except OSError as failed:
                error = failed
            done(error)

        task = asyncio.get_running_loop().create_task(write())
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return True

    async def read(self, offset: int, length: int) -> Buffer:
        medium = self.medium
        await medium.machine.delay()
        if medium.machine.fault("read", medium):
            raise OSError(EIO, "injected into read")
        data = medium.load(offset, length)
        await medium.machine.delay()
        return data

    async def write(self, offset: int, data: Buffer) -> None:
        if self.read_only:
            raise OSError(EPERM, "Operation not permitted")
        medium = self.medium
        machine = medium.machine
        content = bytes(data)
        await machine.delay()
        if machine.fault("write", medium):
            content = content[: machine.random.randrange(len(content) // 512 + 1) * 512]
            number = medium.begin("write", offset, content)
            medium.store(offset, content)
            await machine.delay()
            medium.end("fail", number)
            raise OSError(machine.random.choice((EIO, ENOSPC)), "injected into write")
        number = medium.begin("write", offset, content)
        medium.store(offset, content)
        await machine.delay()
        medium.end("end", number)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        await self.write(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        # Nobody may count on what a discard leaves.
        if self._unmaps:
            await self.write(offset, b"\xdd" * length)

    async def truncate(self, length: int) -> None:
        """Durable on return; a file that is shorter again keeps its length here, and has zeros."""
        if length > self.length:
            await self.write(length - 1, b"\0")
        elif length < self.length:
            await self.write(length, bytes(self.length - length))
        await self.flush()

    async def flush(self) -> None:
        if self.read_only:
            return
        medium = self.medium
        if medium.skip_flushes:
            medium.skip_flushes -= 1
            return
        if medium.flush_failed:
            raise OSError(EIO, "injected into an earlier flush")
        await medium.machine.delay()
        number = medium.begin("flush")
        await medium.machine.delay()
        if medium.flush_failed or medium.machine.fault("flush", medium):
            medium.flush_failed = True
            medium.end("unflushed", number)
            raise OSError(EIO, "injected into flush")
        medium.end("flushed", number)
        await medium.machine.delay()

    async def map(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, ExtentKind.DATA, offset)]

    async def seal(self) -> None:
        if self.medium.flush_failed:
            await self.set_read_only(True)
        self.read_only = True

    async def set_read_only(self, read_only: bool) -> None:
        if read_only and not self.read_only:
            try:
                await self.flush()
            except OSError as error:
                raise BlockError.from_os_error("Could not reopen", error) from error
        self.read_only = read_only


class SimulatedWorkers(WorkerPool):
    """Jobs run in simulated time; copies from disk to disk are logged as writes."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def copies(self) -> WorkerPool:
        """The same workers: one order of all jobs."""
        return self

    syncs = copies

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        group: JobGroup | None,
        lane: Lane | None = None,
    ) -> JobFuture[T]:
        del lane  # in simulated time all jobs run side by side
        loop = asyncio.get_running_loop()
        future: JobFuture[T] = JobFuture(loop=loop)
        task = loop.create_task(self._carry_out(future, fn, args, group))
        self._outstanding += 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return future

    async def _carry_out(
        self,
        future: JobFuture[Any],
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        group: JobGroup | None,
    ) -> None:
        await self._machine.delay()
        try:
            if isinstance(fn, Work):
                # Under a halt: withdrawn, or begun; it is over at once then.
                fn, args = (fn.fn, fn.args) if fn.begun() else (int, ())
            if fn is populate.clone_or_copy:
                result = await self._copy(args)
            elif fn is populate.unpack_clusters:
                result = await self._unpack(*args)
            elif fn is gather.copy_segments:
                result = await self._copy_segments(*args)
            elif fn is new_tables.copy_with_tables:
                result = await self._copy_with_tables(*args)
            else:
                result = fn(*args)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        self._outstanding -= 1
        if group is not None:
            group.job_ended()
        if not self._outstanding:
            waiters, self._idle_waiters = self._idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def _copy(self, args: tuple[Any, ...]) -> Any:
        """A worker's copy, cluster by cluster as far as it wrote."""
        transfer: copy_engine.Transfer = args[0]
        _, _, fd, offset, length, cluster_size, *_ = transfer
        medium = self._medium_of(fd)
        if medium.machine.fault("write", medium):
            os.close(transfer.source_fd)
            os.close(fd)
            raise OSError(ENOSPC, "injected into copy")
        copied = populate.clone_or_copy(transfer)
        await self._log_copy(medium, offset, length, cluster_size, copied.zero)
        return copied

    async def _unpack(self, work: Unpacking) -> Any:
        """The same for compressed clusters."""
        medium = self._medium_of(work.fd)
        if medium.machine.fault("write", medium):
            os.close(work.source_fd)
            os.close(work.fd)
            raise OSError(ENOSPC, "injected into copy")
        zero = populate.unpack_clusters(work)
        length = len(work.places) * work.cluster_size
        await self._log_copy(medium, work.offset, length, work.cluster_size, zero)
        return zero

    async def _copy_segments(
        self,
        segments: Sequence[Segment],
        fd: int,
        cluster_size: int,
        direct: bool,
    ) -> copy_engine.Copied:
        """The same for many; an error comes after some of them were written."""
        medium = self._medium_of(fd)
        broken = medium.machine.fault("write", medium)
        if broken:
            segments = segments[: medium.machine.random.randrange(len(segments))]
        copied = gather.copy_segments(segments, fd, cluster_size, direct)
        number = 0
        for segment in segments:
            count = segment.length // cluster_size
            zero = copied.zero[number : number + count]
            await self._log_copy(medium, segment.offset, segment.length, cluster_size, zero)
            number += count
        if broken:
            raise OSError(ENOSPC, "injected into copy")
        return copied

    async def _copy_with_tables(
        self,
        segments: Sequence[Segment],
        fd: int,
        cluster_size: int,
        direct: bool,
        tables: new_tables.NewTables,
    ) -> copy_engine.Copied:
        """The same, and the tables; an error comes when all or some of it was written."""
        medium = self._medium_of(fd)
        broken = medium.machine.fault("write", medium)
        copied = new_tables.copy_with_tables(segments, fd, cluster_size, direct, tables)
        number = 0
        for segment in segments:
            count = segment.length // cluster_size
            zero = copied.zero[number : number + count]
            await self._log_copy(medium, segment.offset, segment.length, cluster_size, zero)
            number += count
        numbers = []
        batches = new_tables.table_writes(tables, copied.zero, cluster_size)
        for offset, data in (write for batch in batches for write in batch.writes()):
            if not broken or self._machine.random.random() < 0.5:
                medium.length = max(medium.length, offset + len(data))
                numbers.append(medium.begin("write", offset, data))
        await self._machine.delay()
        for number in numbers:
            medium.end("end", number)
        if broken:
            raise OSError(ENOSPC, "injected into copy")
        self._machine.tables_made += len(tables.l1_indices)
        return copied

    def _medium_of(self, fd: int) -> Medium:
        inode = os.fstat(fd).st_ino
        return next(m for m in self._machine.media if os.fstat(m.fd).st_ino == inode)

    async def _log_copy(
        self, medium: Medium, offset: int, length: int, cluster_size: int, zero: Any
    ) -> None:
        numbers = []
        for index in range(-(-length // cluster_size)):
            if zero[index]:
                continue
            start = index * cluster_size
            part = medium.load(offset + start, min(cluster_size, length - start))
            medium.length = max(medium.length, offset + start + len(part))
            numbers.append(medium.begin("write", offset + start, part))
        await self._machine.delay()
        for number in numbers:
            medium.end("end", number)
