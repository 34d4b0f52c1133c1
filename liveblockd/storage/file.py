"""The drivers ``file`` and ``host_device``: a regular file or a block device of the host.

Specification: qapi/block-core.json, BlockdevOptionsFile; docs of the calls in ``hostcalls``.

Runs on: the event loop; everything that may wait for a disk is a job for a worker. ``read_nowait``
is answered by the page cache (RWF_NOWAIT, or plain preadv where memory is all there is).

Invariants:

* The descriptor's number never changes while the node is open: a change between read-only and
  read-write replaces what it refers to (dup2), so jobs that hold the number go on.
* With auto-read-only the descriptor is for writing only while somebody has permission to write.
* The size is asked of the host each time, never kept: jobs grow the file past this driver.
* No coroutine here returns, cancelled or not, while its system call is under way.
* After a failed flush all later ones fail: which pages the kernel dropped nobody knows.

Errors: ``OSError`` (I/O), ``BlockError`` (open, locks, changing to read-write).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import stat
from errno import EBADF, EIO, EISDIR, ENOTSUP, EPERM
from functools import partial
from typing import Self

from liveblockd.errors import BlockError
from liveblockd.qapi import UInt64
from liveblockd.runtime.workers import JobFuture
from liveblockd.storage import hostcalls
from liveblockd.storage.batches import WriteBatches
from liveblockd.storage.calm import Calm
from liveblockd.storage.driver import (
    BlockDriver,
    BlockIO,
    Buffer,
    Done,
    Extent,
    ExtentKind,
    Permission,
)
from liveblockd.storage.file_at_once import AtOnce
from liveblockd.storage.file_opening import OpenFile, open_as_allowed, open_fd, probe
from liveblockd.storage.gate import gate_of
from liveblockd.storage.locks import ImageLocks
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver
from liveblockd.storage.serialise import Section, Serialiser

#: extents that one ``map`` finds out: two system calls each
MAP_LIMIT = 1024

_WRITES = Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE

log = logging.getLogger(__name__)


class OnOffAuto(enum.StrEnum):
    """qapi/common.json."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class BlockdevAioOptions(enum.StrEnum):
    """How QEMU does its I/O; accepted, since here workers do it all."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class FileOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    qapi_features = ("dynamic-auto-read-only",)

    filename: str
    locking: OnOffAuto | None = None
    aio: BlockdevAioOptions | None = None
    aio_max_batch: UInt64 | None = None
    drop_cache: bool | None = None


@register_driver
class FileDriver(AtOnce, BlockDriver):
    """A regular file; block devices are welcome too."""

    driver_name = "file"
    Options = FileOptions

    def __init__(self, options: FileOptions, environment: Environment, opened: OpenFile) -> None:
        self.children: dict[str, BlockIO] = {}
        self.filename = options.filename
        self.read_only = opened.read_only
        self.request_alignment = opened.alignment
        self._jobs = environment.workers.group()
        self._opened = opened
        #: auto-read-only: the descriptor is for writing only while somebody writes
        self._follows = bool(options.auto_read_only)
        self._writable = not (opened.read_only or self._follows)
        #: somebody may have written, perhaps a job with the descriptor alone
        self._written = self._writable
        self._going_back: asyncio.Task[None] | None = None
        self._fd = opened.fd
        self._direct = opened.direct
        self._read_flags = opened.read_flags
        self._write_flags = opened.write_flags
        self._calm = Calm()
        self._gate = gate_of(opened.fd)
        self._batches = WriteBatches(self._jobs, opened.fd)
        self._unmaps = options.unmaps
        self._no_flush = options.cache_no_flush
        self._drops_cache = options.drop_cache is not False
        self._can_map = True
        self._discards = {"discard-nb-ok": 0, "discard-nb-failed": 0, "discard-bytes-ok": 0}
        self._locks = ImageLocks(
            opened.fd,
            options.filename,
            enabled=options.locking is not OnOffAuto.OFF and not options.force_share,
            required=options.locking is OnOffAuto.ON,
        )
        self._serialiser = Serialiser()
        self._flush_job: JobFuture[None] | None = None
        self._flush_next: JobFuture[None] | None = None
        self._flush_error: OSError | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, options: FileOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Open the file; no lock is taken before ``set_permissions``. Raises BlockError."""
        assert not children
        if not options.filename:
            raise BlockError(f"The '{options.driver}' block driver requires a file name")
        read_only = bool(options.read_only)
        if options.force_share and not read_only:
            raise BlockError("force-share=on can only be used with read-only images")
        if options.aio is BlockdevAioOptions.NATIVE and not options.cache_direct:
            raise BlockError(
                "aio=native was specified, but it requires cache.direct=on, "
                "which was not specified."
            )
        job = environment.workers.submit(cls._open_file, options)
        try:
            opened = await job
        except OSError as error:
            raise BlockError.from_os_error(f"Could not open '{options.filename}'", error) from error
        except asyncio.CancelledError:
            if job.exception() is None:
                os.close(job.result().fd)
            raise
        return cls(options, environment, opened)

    @classmethod
    def _open_file(cls, options: FileOptions) -> OpenFile:
        """On a worker."""
        filename, direct = options.filename, options.cache_direct
        mode = os.stat(filename).st_mode
        cls._check_type(filename, mode)  # before open: that of a FIFO would not return
        read_only = bool(options.read_only)
        auto = bool(options.auto_read_only)
        fd, read_only = open_as_allowed(filename, read_only=read_only, direct=direct, auto=auto)
        try:
            cls._check_type(filename, os.fstat(fd).st_mode)
            hostcalls.file_size(fd)
            return probe(fd, read_only, direct)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _check_type(cls, filename: str, mode: int) -> None:
        if stat.S_ISDIR(mode):
            raise OSError(EISDIR, os.strerror(EISDIR))
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise BlockError(
                f"'{cls.driver_name}' driver requires '{filename}' to be a regular file"
            )

    @property
    def length(self) -> int:
        """Bytes, as the host says now."""
        return hostcalls.file_size(self._fd)

    # -- guest I/O

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """With the other writes of this round, by a worker."""
        if self._direct or self.read_only or self._closing is not None:
            return False
        self._batches.add(offset, bytes(data) if type(data) is memoryview else data, done)
        return True

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes; zeros past the end."""
        if self._direct:
            return await self._jobs.run(
                hostcalls.read_direct, self._fd, offset, length, self.request_alignment
            )
        data = self.read_nowait(offset, length)  # not all callers ask first, and it is cheap
        if data is None:
            data = await self._jobs.run(hostcalls.read, self._fd, offset, length)
        return data

    async def write(self, offset: int, data: Buffer) -> None:
        """Store all of it; past the end the file grows."""
        self._check_writable()
        if self._direct:
            await self._write_direct(offset, data)
        elif not self.write_nowait(offset, data):
            await self._jobs.run(self._gate.first, hostcalls.write, self._fd, offset, data)

    async def _write_direct(self, offset: int, data: Buffer) -> None:
        alignment = self.request_alignment
        length = memoryview(data).nbytes
        if not length:
            return
        start, end = offset - offset % alignment, -(-(offset + length) // alignment) * alignment
        whole = start == offset and end == offset + length
        section = await self._serialiser.enter(start, end, exclusive=not whole)
        try:
            call = hostcalls.write_direct if whole else hostcalls.write_unaligned
            await self._jobs.run(call, self._fd, offset, data, alignment)
        finally:
            self._serialiser.leave(section)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """By fallocate; by writing zeros where there is no such call."""
        self._check_writable()
        if not length:
            return
        section = await self._enter_blocks(offset, length)
        try:
            unmap = may_unmap and self._unmaps
            if await self._jobs.run(hostcalls.zero_range, self._fd, offset, length, unmap):
                return
            if fast_only:
                raise OSError(ENOTSUP, os.strerror(ENOTSUP))
            if not self._direct:
                await self._jobs.run(hostcalls.write_zeroes, self._fd, offset, length)
                return
        finally:
            self._serialiser.leave(section)
        position, end = offset, offset + length
        while position < end:
            # Up to a boundary of pieces, so that all but the edges are whole blocks.
            part = min(hostcalls.PIECE - position % hostcalls.PIECE, end - position)
            await self._write_direct(position, hostcalls.zeroes(part))
            position += part

    async def discard(self, offset: int, length: int) -> None:
        """A hole with discard=unmap, nothing without."""
        self._check_writable()
        if not length or not self._unmaps:
            return
        section = await self._enter_blocks(offset, length)
        try:
            await self._jobs.run(hostcalls.punch_hole, self._fd, offset, length)
            self._discards["discard-nb-ok"] += 1
            self._discards["discard-bytes-ok"] += length
        except OSError as error:
            self._discards["discard-nb-failed"] += 1
            if error.errno not in hostcalls.UNSUPPORTED:
                raise
            # A discard that cannot be done has been done: the old bytes may stay.
        finally:
            self._serialiser.leave(section)

    async def _enter_blocks(self, offset: int, length: int) -> Section:
        """Keep read-modify-writes out of the blocks that the range touches."""
        alignment = self.request_alignment
        start, end = offset - offset % alignment, -(-(offset + length) // alignment) * alignment
        return await self._serialiser.enter(start, end, exclusive=self._direct)

    async def flush(self) -> None:
        """fdatasync; calls that come while one is under way share the next one."""
        if self._no_flush or self.read_only:
            return
        if self._fd < 0:
            raise OSError(EBADF, os.strerror(EBADF))
        if self._flush_error is not None:
            raise self._again(self._flush_error)
        if self._flush_job is None:
            await self._start_flush()
            return
        # The one under way began before writes that this call is to make durable.
        if self._flush_next is None:
            self._flush_next = JobFuture(loop=asyncio.get_running_loop())
        await self._flush_next

    def _start_flush(self) -> JobFuture[None]:
        job = self._jobs.submit_sync(os.fdatasync, self._fd)
        self._flush_job = job
        job.add_done_callback(self._flush_ended)
        return job

    def _flush_ended(self, job: asyncio.Future[None]) -> None:
        self._flush_job = None
        error = job.exception()
        if isinstance(error, OSError) and not self._direct:
            self._flush_error = error
        waiting, self._flush_next = self._flush_next, None
        if waiting is None:
            return
        if self._flush_error is not None:
            waiting.set_exception(self._again(self._flush_error))
            return
        try:
            self._start_flush().add_done_callback(partial(_hand_on, waiting))
        except RuntimeError as closed:  # the pool is gone
            waiting.set_exception(OSError(EIO, str(closed)))

    @staticmethod
    def _again(error: OSError) -> OSError:
        return OSError(error.errno, error.strerror)

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Holes by SEEK_DATA and SEEK_HOLE; at most ``MAP_LIMIT`` extents."""
        if self._can_map:
            found = await self._jobs.run(hostcalls.map_extents, self._fd, offset, length, MAP_LIMIT)
            if found is not None:
                return found
            self._can_map = False
        return [Extent(length, ExtentKind.DATA, offset)]

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))

    # -- management

    async def truncate(self, length: int) -> None:
        """Set the size of a regular file, durable on return."""
        self._check_writable()
        if stat.S_ISBLK(os.fstat(self._fd).st_mode):
            if length > self.length:
                raise BlockError("Cannot grow device files")
            return
        section = await self._serialiser.enter(0, 1 << 63, exclusive=True)
        try:
            await self._jobs.run(os.ftruncate, self._fd, length)
            if not self._no_flush:
                await self._sync_size()
        finally:
            self._serialiser.leave(section)

    async def _sync_size(self) -> None:
        try:
            await self._jobs.submit_sync(os.fsync, self._fd)
        except OSError as error:
            # The kernel tells of lost pages once: those of a guest's writes may be among them.
            if not self._direct:
                self._flush_error = error
            raise

    async def close(self) -> None:
        """Wait for what is under way, flush, then let go of locks and descriptor.

        Twice is harmless. Raises the OSError of the flush, when all is let go of.
        """
        if self._closing is None:
            self._read_flags = self._write_flags = None
            self._closing = asyncio.get_running_loop().create_task(self._close())
        # A caller that is cancelled does not leave a descriptor behind.
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._going_back is not None:
            await self._going_back
        while self._jobs.count or self._batches:
            await asyncio.sleep(0)  # what was begun in this round goes to the workers
            await self._jobs.idle()
        try:
            if self._written:
                await self.flush()
        finally:
            # Whoever comes late must not reach the file that gets this number next.
            fd, self._fd = self._fd, -1
            await self._jobs.run(self._release, fd)

    def _release(self, fd: int) -> None:
        self._locks.release()
        os.close(fd)

    async def set_permissions(self, used: Permission, shared: Permission) -> None:
        """Take and look for the image locks; BlockError when somebody else has the image.

        More locks are a worker's job, fewer are given up here at once: that cannot fail, nor be
        cancelled half-way. A call that is refused or cancelled has changed nothing.
        """
        if self._going_back is not None:
            await asyncio.shield(self._going_back)
        old_used, old_shared = self._locks.used, self._locks.shared
        more = (used | old_used, shared & old_shared)
        if more != (old_used, old_shared):
            job = self._jobs.submit(self._locks.acquire, *more)
            try:
                await job
            except asyncio.CancelledError:
                self._locks.acquire(old_used, old_shared)
                raise
        if self._follows and used & _WRITES and not (self.read_only or self._writable):
            try:
                await self._change_mode(writable=True)
            except BaseException as error:
                self._locks.acquire(old_used, old_shared)
                if isinstance(error, OSError):
                    raise self._no_reopen(error) from error
                raise
        self._locks.acquire(used, shared)
        if self._follows and self._writable and not used & _WRITES:
            self._going_back = asyncio.get_running_loop().create_task(self._go_back())

    async def _go_back(self) -> None:
        """The last writer is gone; the kernel keeps errors of its writes for our next flush."""
        try:
            await self._change_mode(writable=False)
        except OSError as error:  # open for longer than needed; harms no data
            log.warning("%s: stays open for writing: %s", self.filename, error.strerror)
        finally:
            self._going_back = None

    async def activate(self) -> None:
        """Forget what the page cache has, which on a network file system may be old."""
        if self._drops_cache and not self._direct:
            await self._jobs.run(hostcalls.drop_cache, self._fd)

    def _no_reopen(self, error: OSError) -> BlockError:
        return BlockError.from_os_error(f"Could not reopen '{self.filename}'", error)

    async def set_read_only(self, read_only: bool) -> None:
        """Reopen the same file; flushed before it becomes read-only. BlockError on failure."""
        if read_only == self.read_only:
            return
        await self._reopen_as(read_only, flush=read_only)

    async def seal(self) -> None:
        """As ``set_read_only``, with no flush but one that fails again."""
        if not self.read_only:
            await self._reopen_as(True, flush=self._flush_error is not None)

    async def _reopen_as(self, read_only: bool, *, flush: bool) -> None:
        try:
            if flush:
                await self.flush()
            writes = not self._follows or bool(self._locks.used & _WRITES)
            if self._going_back is not None:
                await asyncio.shield(self._going_back)
            await self._change_mode(writable=writes and not read_only)
        except OSError as error:
            raise self._no_reopen(error) from error
        self.read_only = read_only

    async def _change_mode(self, *, writable: bool) -> None:
        """OSError, and then nothing has changed; so it is when the caller is cancelled."""
        if writable == self._writable:
            return
        self._written |= writable
        job = self._jobs.submit(self._reopen, not writable)
        try:
            await job
        except asyncio.CancelledError:
            # The descriptor changed all the same, or not at all; back to what the caller knows.
            if job.exception() is None:
                self._writable = writable
                await self._jobs.run(self._reopen, writable)
                self._writable = not writable
            raise
        self._writable = writable

    def _reopen(self, read_only: bool) -> None:
        """On a worker. Through /proc, since the name may mean another file by now."""
        fd = open_fd(f"/proc/self/fd/{self._fd}", read_only, self._direct)
        try:
            self._locks.replace(fd)
        finally:
            os.close(fd)

    def host_file(self) -> OpenFile:
        """This file, for jobs that a worker does with the descriptor alone."""
        return self._opened

    def statistics(self) -> dict[str, int]:
        """BlockStatsSpecificFile."""
        return dict(self._discards)

    def actual_size(self) -> int:
        """Bytes on the host's disk."""
        return os.fstat(self._fd).st_blocks * 512

    def limits(self) -> dict[str, int]:
        """As the base, with the memory alignment of O_DIRECT."""
        memory = hostcalls.MEMORY_ALIGNMENT if self._direct else 1
        return super().limits() | {"min-mem-alignment": memory}


@register_driver
class HostDevice(FileDriver):
    """A block device."""

    driver_name = "host_device"

    @classmethod
    def _check_type(cls, filename: str, mode: int) -> None:
        if not stat.S_ISBLK(mode):
            raise BlockError(
                f"'{cls.driver_name}' driver requires '{filename}' "
                "to be either a character or block device"
            )


def _hand_on(waiting: JobFuture[None], job: asyncio.Future[None]) -> None:
    error = job.exception()
    if error is None:
        waiting.set_result(None)
    else:
        waiting.set_exception(error)
