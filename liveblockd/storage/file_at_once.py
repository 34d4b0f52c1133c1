"""Requests of the driver ``file`` that are done at once, on the loop.

Specification: preadv2(2) RWF_NOWAIT, copy_file_range(2).

Runs on: the event loop, on the request path. Reads are answered by the page cache, writes go into
it where the file system or ``calm`` says that this needs no wait; where memory is all there is
nothing waits.

Invariants: what cannot be done at once is refused, and may be begun again by the coroutine.
Errors: none escape; the coroutine tells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import EINVAL, EOPNOTSUPP, EXDEV
from time import perf_counter_ns

from liveblockd.runtime.workers import JobGroup
from liveblockd.storage import hostcalls
from liveblockd.storage.batches import WriteBatches
from liveblockd.storage.calm import Calm
from liveblockd.storage.driver import Buffer, Source
from liveblockd.storage.file_opening import OpenFile
from liveblockd.storage.gate import Gate

#: bytes that a nowait call copies at most: some hundred microseconds of the loop's time
NOWAIT_LIMIT = 1 << 20
#: bytes that are read into a new object, where memory is all there is: a third cheaper than to fill
#: one that was made and cleared before
SMALL_READ = 16 << 10
#: bytes that a write copies at most on the loop where the file system cannot tell whether it waits
INLINE_WRITE = 64 << 10


class AtOnce:
    """A part of the driver."""

    read_only: bool
    _fd: int
    _direct: bool
    _opened: OpenFile
    _read_flags: int | None
    _write_flags: int | None
    _calm: Calm
    _gate: Gate
    _jobs: JobGroup
    _batches: WriteBatches
    _closing: object
    #: whether the kernel copies from file to file here
    _copies = hostcalls.can_copy
    #: writes that were made on the loop without RWF_NOWAIT
    inline_writes = 0
    #: writes that were made with others by one call
    many_writes = 0
    #: copies that the kernel made on the loop
    inline_copies = 0

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """What the page cache has."""
        flags = self._read_flags
        if flags == 0 and length <= SMALL_READ:
            try:
                data = os.pread(self._fd, length, offset)
            except OSError:
                return None
            if len(data) == length:
                return data
        if flags is None or length > NOWAIT_LIMIT:
            return None
        buffer = hostcalls.new_buffer(length)
        try:
            count = os.preadv(self._fd, (buffer,), offset, flags)
        except BlockingIOError:
            return None
        if count != length:
            # Either the end of the file, or the rest is not in the cache.
            if offset + count < hostcalls.file_size(self._fd):
                return None
            hostcalls.fill_zeroes(buffer, count)
        return buffer

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Into the page cache, where the file system or ``calm`` says that this needs no wait."""
        flags = self._write_flags
        if flags is None:
            return self._write_calmly(offset, data)
        if self.read_only or len(data) > NOWAIT_LIMIT:
            return False
        gate = self._gate
        gate.writes += 1
        entered = gate.enter()
        try:
            if not flags:
                return os.pwrite(self._fd, data, offset) == len(data)
            return os.pwritev(self._fd, (data,), offset, flags) == len(data)
        except OSError as error:
            if error.errno in (EOPNOTSUPP, EINVAL):
                self._write_flags = None
            return False  # of any other error the coroutine tells, which everybody counts
        finally:
            if entered:
                gate.leave()

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """The same of several, in a loop that has nothing else to do."""
        flags, found = self._read_flags, list[Buffer]()
        if flags is None or length > NOWAIT_LIMIT:
            return found
        fd = self._fd
        try:
            if not flags:
                read = os.pread
                for offset in offsets:
                    data = read(fd, length, offset)
                    if len(data) != length:
                        break
                    found.append(data)
            else:
                into = os.preadv
                for offset in offsets:
                    buffer = bytearray(length)
                    if into(fd, (buffer,), offset, flags) != length:
                        break
                    found.append(buffer)
        except OSError:  # not in the cache; of any other error tells who asks for this one alone
            pass
        return found

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """The same of several, in a loop that has nothing else to do."""
        flags, done = self._write_flags, 0
        if flags is None or self.read_only:
            return 0
        fd, gate, length = self._fd, self._gate, len(parts[0])
        if length > NOWAIT_LIMIT:
            return 0
        gate.writes += len(parts)
        entered = gate.enter()
        try:
            if not flags:
                write = os.pwrite
                for offset, data in zip(offsets, parts, strict=True):
                    if write(fd, data, offset) != length:
                        break
                    done += 1
            else:
                vector = os.pwritev
                for offset, data in zip(offsets, parts, strict=True):
                    if vector(fd, (data,), offset, flags) != length:
                        break
                    done += 1
        except OSError:  # who writes this one alone tells
            pass
        finally:
            if entered:
                gate.leave()
        self.many_writes += done
        return done

    def copy_nowait(self, offset: int, source: Source, inside: int, data: Buffer) -> bool:
        """From memory to memory: by the kernel, which has a third less to do than by a buffer."""
        if not (self._opened.in_memory and source.file.in_memory) or self._write_flags is None:
            return False
        if self.read_only or not self._copies or source.length > NOWAIT_LIMIT:
            return False
        gate = self._gate
        gate.writes += 1
        entered = gate.enter()
        try:
            done = hostcalls.copy_with(
                source.file.fd, source.source_offset, self._fd, offset, source.length, inside, data
            )
        except OSError as error:
            if error.errno in hostcalls.UNSUPPORTED or error.errno == EXDEV:
                self._copies = False
            return False  # the coroutine tells
        finally:
            if entered:
                gate.leave()
        self.inline_copies += done
        return done

    def _write_calmly(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        # While a worker is at this file it may hold the inode, and a flush the journal.
        if length > INLINE_WRITE or self._direct or self.read_only or self._busy:
            return False
        begun = perf_counter_ns()
        if not self._calm.allows(begun):
            return False
        if (offset | length) % hostcalls.PAGE and not self._edges_cached(offset, length):
            return False
        gate = self._gate
        gate.writes += 1
        entered = gate.enter()
        try:
            whole = os.pwrite(self._fd, data, offset) == length
        except OSError:
            whole = False
        finally:
            if entered:
                gate.leave()
        self._calm.took(begun, perf_counter_ns())
        self.inline_writes += 1
        return whole

    @property
    def _busy(self) -> bool:
        return bool(self._jobs.count or self._batches or self._closing)

    def _edges_cached(self, offset: int, length: int) -> bool:
        """Whether a write of parts of pages needs nothing from the disk."""
        flags = self._read_flags
        if flags is None:
            return False
        page, byte = hostcalls.PAGE, bytearray(1)
        try:
            if offset % page:
                os.preadv(self._fd, (byte,), offset, flags)
            if (offset + length) % page:
                os.preadv(self._fd, (byte,), offset + length, flags)
        except OSError:
            return False
        return True
