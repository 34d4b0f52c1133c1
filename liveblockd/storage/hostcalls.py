"""System calls on host files that a worker makes: whole transfers, zeros, holes, probes.

Specification: preadv2(2), fallocate(2), lseek(2) SEEK_DATA, open(2) O_DIRECT.

Runs on: workers; ``copy_with`` on the loop, between files in memory, and ``duplicate``. All state
is in the arguments.
``probe_*`` run when a file is opened.

Invariants: a read gives every byte asked for (zeros past the end), a write stores all or raises;
short transfers are continued. Buffers for O_DIRECT are aligned here, offsets by the caller.

Errors: ``OSError``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from errno import EINVAL, EIO, ENODEV, ENOSPC, ENOSYS, ENOTSUP, ENOTTY, ENXIO, EOPNOTSUPP

import numpy as np

from liveblockd.storage.driver import Buffer, Extent, ExtentKind

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16

TMPFS_MAGIC = 0x01021994
RAMFS_MAGIC = 0x858458F6

#: what the host cannot do here, as opposed to could not do now
UNSUPPORTED = frozenset((EOPNOTSUPP, ENOTSUP, ENOSYS, ENODEV, EINVAL, ENOTTY))

#: memory that O_DIRECT takes everywhere
MEMORY_ALIGNMENT = 4096
#: bytes of one system call where a request is cut into pieces
PIECE = 2 << 20
#: buffers of one system call (IOV_MAX is 1024)
MAX_VECTOR = 512
#: what the page cache reads and writes
PAGE = 4096
#: below this, clearing a new buffer costs less than getting one that is not clear
_CLEARED_LIMIT = 16 << 10

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(_libc, "sync_file_range", None)  # Linux and glibc, musl since 1.1.20
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    _sync_file_range.restype = ctypes.c_int
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.fstatfs.restype = ctypes.c_int


#: keeps the GIL: ``os.dup`` gives it away, and waits for it longer than it works
_fcntl = ctypes.PyDLL(None, use_errno=True).fcntl
_fcntl.argtypes = (ctypes.c_int, ctypes.c_int)


def duplicate(fd: int) -> int:
    """A duplicate that no child process inherits; on the loop, too. Raises OSError."""
    found = int(_fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ctypes.c_int(0)))
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with a mode, which ``os.posix_fallocate`` does not take."""
    if _fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def aligned_buffer(length: int) -> memoryview:
    """``length`` bytes of undefined content at an address that O_DIRECT takes."""
    space = np.empty(length + MEMORY_ALIGNMENT, np.uint8)
    start = -address_of(space) % MEMORY_ALIGNMENT
    return space.data[start : start + length]


def address_of(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> int:
    """Where the first byte lies in memory."""
    address: int = array.__array_interface__["data"][0]
    return address


def new_buffer(length: int) -> bytearray | memoryview:
    """A buffer to read into; its content is undefined."""
    if length <= _CLEARED_LIMIT:
        return bytearray(length)
    return np.empty(length, np.uint8).data


def fill_zeroes(buffer: bytearray | memoryview, start: int) -> None:
    """Clear ``buffer[start:]``."""
    np.frombuffer(buffer, np.uint8)[start:] = 0


# -- transfers


def read_into(fd: int, buffer: bytearray | memoryview, offset: int) -> None:
    """Fill ``buffer`` from ``offset``; zeros past the end of the file."""
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            fill_zeroes(view, done)
            return
        done += count


def read(fd: int, offset: int, length: int) -> bytearray | memoryview:
    """``length`` bytes at ``offset``; zeros past the end of the file."""
    buffer = new_buffer(length)
    read_into(fd, buffer, offset)
    return buffer


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the disk begin with what the page cache has, so that a later flush has less to wait for.

    Promises nothing, and keeps write-back errors for fdatasync to tell. Waits only where the queue
    of the disk is full.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def write(fd: int, offset: int, data: Buffer) -> None:
    """All of ``data`` at ``offset``."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        count = os.pwrite(fd, view[done:], offset + done)
        if count == 0:  # pwrite(2) of something returns no 0 for files; never loop on one that does
            raise OSError(EIO, "write of nothing")
        done += count


#: whether this system has copy_file_range(2)
can_copy = hasattr(os, "copy_file_range")


def copy_with(
    source_fd: int,
    source_offset: int,
    fd: int,
    offset: int,
    length: int,
    inside: int,
    data: Buffer,
) -> bool:
    """Copy ``length`` bytes to ``offset`` of ``fd``, then ``data`` to ``inside`` of them.

    False where one of the calls did not do all. Raises OSError.
    """
    done = os.copy_file_range(source_fd, fd, length, source_offset, offset)
    return done == length and os.pwrite(fd, data, offset + inside) == len(data)


def write_batch(fd: int, writes: Sequence[tuple[int, Buffer]]) -> list[OSError | None] | None:
    """Write each of (offset, data), in this order; None, or the error of each where one failed.

    What continues the write before it goes into the same system call.
    """
    errors: list[OSError | None] = []
    first, count = 0, len(writes)
    while first < count:
        start, data = writes[first]
        position, buffers = start + len(data), [data]
        last = first + 1
        while last < count and writes[last][0] == position and len(buffers) < MAX_VECTOR:
            data = writes[last][1]
            position += len(data)
            buffers.append(data)
            last += 1
        try:
            whole = os.pwritev(fd, buffers, start) == position - start
        except OSError:
            whole = False
        if whole:
            errors.extend([None] * len(buffers))
        else:  # one by one: each gets its own error
            errors.extend(_error_of(fd, *write_) for write_ in writes[first:last])
        first = last
    return errors if any(errors) else None


def _error_of(fd: int, offset: int, data: Buffer) -> OSError | None:
    try:
        write(fd, offset, data)
    except OSError as error:
        return error
    return None


# -- transfers with O_DIRECT


def read_direct(fd: int, offset: int, length: int, alignment: int) -> memoryview:
    """As ``read``, for any offset and length, of a file opened with O_DIRECT."""
    start = offset - offset % alignment
    end = -(-(offset + length) // alignment) * alignment
    buffer = aligned_buffer(end - start)
    read_aligned(fd, buffer, start, alignment)
    return buffer[offset - start : offset - start + length]


def read_aligned(fd: int, buffer: memoryview, offset: int, alignment: int) -> None:
    """As ``read_into`` with O_DIRECT: an aligned buffer, offset and length."""
    done, stalled = 0, False
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        torn = count % alignment
        done += count
        if count and not (torn and done < len(buffer)):
            stalled = False
            continue
        if os.fstat(fd).st_size <= offset + done or not torn:
            fill_zeroes(buffer, done)  # the end of the file
            return
        # Part of a block although there is more: the file has grown meanwhile. From the block on.
        if stalled:
            raise OSError(EIO, os.strerror(EIO))
        stalled = True
        done -= torn


def write_direct(fd: int, offset: int, data: Buffer, alignment: int) -> None:
    """As ``write``, for an offset and a length that are multiples of ``alignment``."""
    view = memoryview(data).cast("B")
    if not len(view):
        return
    if address_of(np.frombuffer(view, np.uint8)) % MEMORY_ALIGNMENT == 0:
        write_aligned(fd, offset, view, alignment)
        return
    bounce = aligned_buffer(min(len(view), PIECE))
    for start in range(0, len(view), PIECE):
        part = view[start : start + PIECE]
        bounce[: len(part)] = part
        write_aligned(fd, offset + start, bounce[: len(part)], alignment)


def write_aligned(fd: int, offset: int, view: memoryview, alignment: int) -> None:
    """As ``write`` with O_DIRECT: an aligned buffer, offset and length."""
    done, stalled = 0, False
    while done < len(view):
        count = os.pwrite(fd, view[done:], offset + done)
        whole = count - count % alignment
        if not whole and stalled:  # the rest of the block fits nowhere, yet no error says so
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        stalled = not whole
        done += whole


def write_unaligned(fd: int, offset: int, data: Buffer, alignment: int) -> None:
    """As ``write`` on O_DIRECT at any offset: reads the blocks at the edges, writes them whole.

    The caller keeps other writes away from these blocks. Where the last block reaches past the end,
    the file grows to the end of that block: to cut it off again could cut off somebody's write.
    """
    view = memoryview(data).cast("B")
    start = offset - offset % alignment
    end = -(-(offset + len(view)) // alignment) * alignment
    buffer = aligned_buffer(end - start)
    if offset != start or end - start == alignment:
        read_aligned(fd, buffer[:alignment], start, alignment)
    if end - start > alignment and offset + len(view) != end:
        read_aligned(fd, buffer[-alignment:], end - alignment, alignment)
    buffer[offset - start : offset - start + len(view)] = view
    write_aligned(fd, start, buffer, alignment)


# -- zeros and holes


def file_size(fd: int) -> int:
    """Bytes of a regular file or a block device."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    return os.lseek(fd, 0, os.SEEK_END)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the space back; the range reads as zeros. Never changes the size."""
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def drop_cache(fd: int) -> None:
    """Let the page cache forget the file, as far as it is written out: the next read asks again."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def zero_range(fd: int, offset: int, length: int, unmap: bool) -> bool:
    """Make the range read as zeros without writing them; False when the host cannot.

    A range past the end makes a regular file larger. ``unmap`` gives the space back; without it the
    range is allocated afterwards where the file system can promise that.
    """
    status = os.fstat(fd)
    regular = stat.S_ISREG(status.st_mode)
    end = offset + length
    inside = min(end, status.st_size) - offset if regular else length
    if inside > 0 and not _zero_inside(fd, offset, inside, unmap, regular):
        return False
    return not regular or end <= status.st_size or grow(fd, end)


def _zero_inside(fd: int, offset: int, length: int, unmap: bool, regular: bool) -> bool:
    if unmap and _supported(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
        return True
    if _supported(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length):
        return True
    if unmap or not regular:
        return False
    if not _supported(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length):
        return False
    with contextlib.suppress(OSError):  # zeros they are; that the space is kept was a courtesy
        fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length)
    return True


def _supported(fd: int, mode: int, offset: int, length: int) -> bool:
    try:
        fallocate(fd, mode, offset, length)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def grow(fd: int, size: int) -> bool:
    """Make a regular file at least ``size`` bytes long; False when the host cannot.

    Not by ftruncate, which would cut off what another worker has written past ``size`` by then.
    The byte at ``size - 1`` is in the range to be zeroed, so a zero may be written there.
    """
    if _supported(fd, 0, size - 1, 1):
        return True
    try:
        return os.pwrite(fd, b"\0", size - 1) == 1
    except OSError as error:
        if error.errno == EINVAL:  # O_DIRECT
            return False
        raise


# private, anonymous and never written: every page is the kernel's own zero page and takes no memory
_ZEROES = memoryview(
    mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
)


def zeroes(length: int) -> memoryview:
    """Up to ``PIECE`` aligned zero bytes, shared: not to be written to."""
    return _ZEROES[:length]


def write_zeroes(fd: int, offset: int, length: int) -> None:
    """Zeros as data, piece by piece; with O_DIRECT offset and length are aligned."""
    end = offset + length
    while offset < end:
        part = min(PIECE, end - offset)
        write(fd, offset, zeroes(part))
        offset += part


def map_extents(fd: int, offset: int, length: int, limit: int) -> list[Extent] | None:
    """DATA and ZERO (hole) runs from ``offset``, at most ``limit``; None when the host can't tell.

    Past the end of the file is ZERO. The position of ``fd`` changes: nobody uses it.
    """
    extents: list[Extent] = []
    position, end = offset, offset + length
    while position < end and len(extents) < limit:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != ENXIO:
                return None
            extents.append(Extent(end - position, ExtentKind.ZERO))
            break
        if data > position:
            extents.append(Extent(min(data, end) - position, ExtentKind.ZERO))
            position = min(data, end)
            continue
        try:
            hole = os.lseek(fd, position, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != ENXIO:
                return None
            hole = end  # cut off between the two calls: to call it data is never wrong
        extents.append(Extent(min(hole, end) - position, ExtentKind.DATA, position))
        position = min(hole, end)
    return extents


# -- probes


def filesystem_type(fd: int) -> int:
    """The magic number of statfs(2), 0 where it is not told."""
    answer = (ctypes.c_long * 64)()
    if _libc.fstatfs(fd, ctypes.byref(answer)) != 0:
        return 0
    return int(answer[0]) & 0xFFFFFFFF


def is_in_memory(fd: int) -> bool:
    """Whether the file is in no disk's page cache, but in memory alone."""
    return filesystem_type(fd) in (TMPFS_MAGIC, RAMFS_MAGIC)


def probe_nowait(fd: int) -> bool:
    """Whether buffered reads take RWF_NOWAIT here."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def probe_alignment(fd: int) -> int:
    """The alignment of offsets and lengths that O_DIRECT on ``fd`` wants, in bytes."""
    if file_size(fd) < MEMORY_ALIGNMENT:
        return MEMORY_ALIGNMENT  # too small to try: a read at the end succeeds without a check
    buffer = aligned_buffer(MEMORY_ALIGNMENT)
    alignment = 512
    while alignment < MEMORY_ALIGNMENT:
        try:
            # At `alignment`, not at 0, so that offset and length are both put to the test.
            os.preadv(fd, [buffer[:alignment]], alignment)
        except OSError as error:
            if error.errno != EINVAL:
                break
        else:
            return alignment
        alignment *= 2
    return MEMORY_ALIGNMENT
