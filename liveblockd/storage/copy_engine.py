"""Copies between host files, made by a worker with two descriptors and numbers.

Specification: ioctl_ficlonerange(2), copy_file_range(2).

Runs on: workers. No state but what the host was found not to support between two devices, and a
buffer a thread. Source and destination ranges are whole blocks where a file has O_DIRECT.

Invariants: on return all of the range was stored (not made durable: that is a flush); on an error
some of it may have been. The source past its end counts as zeros.

Errors: ``OSError``; ``HaltedError`` where nobody wants the copy any more.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Sequence
from errno import EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP, EXDEV
from time import monotonic
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.runtime import halting
from liveblockd.storage import hostcalls
from liveblockd.storage.driver import Buffer
from liveblockd.storage.first_words import first_words
from liveblockd.storage.flags import runs_of
from liveblockd.storage.gate import Gate, gate_of
from liveblockd.storage.pages import Run, places, read_into_pages, takes_pages

FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("qQQQ")  # source fd, source offset, length, destination offset
#: no file system clones in smaller pieces
CLONE_ALIGNMENT = 4096
#: bytes read at a time: a part of the cache of a core, so that what was read is written from there,
#: and so little that a guest's write to the same file does not wait for long
PIECE = 256 << 10
#: of smaller clusters so many first words are to be seen that reading them whole costs less
LEAST_SAMPLED = 32 << 10
#: the same where zeros are to be expected, of which nothing is written
ZEROES_PIECE = 1 << 20
#: the same with O_DIRECT, where nothing is cached and a disk wants large requests
DIRECT_PIECE = 2 << 20
#: bytes after which the disk is told to begin, and first words are looked at again
WRITEBACK_PIECE = 8 << 20

Zeroes = npt.NDArray[np.bool_]

_NEVER = (EXDEV, EOPNOTSUPP, ENOSYS, ENOTTY)
#: of these the target alone is the reason
_NEVER_TO = (EOPNOTSUPP, ENOSYS, ENOTTY)


class CopyMethod(enum.Enum):
    """How the last byte was copied."""

    CLONE = "clone"
    COPY_FILE_RANGE = "copy_file_range"
    READ_WRITE = "read_write"


#: pairs of devices between which a method fails for good; set operations are atomic
unsupported: set[tuple[int, int, CopyMethod]] = set()
#: devices to which nothing can be cloned
no_clones: set[int] = set()


class _Local(threading.local):
    buffer: memoryview | None = None


_local = _Local()


def piece_buffer(length: int) -> memoryview:
    """Bytes for a piece on its way, one buffer a thread; undefined content."""
    buffer = _local.buffer
    if buffer is None or len(buffer) < length:
        buffer = _local.buffer = hostcalls.aligned_buffer(max(length, ZEROES_PIECE))
    return buffer[:length]


class Transfer(NamedTuple):
    """A copy of clusters; offsets and lengths in bytes.

    Where a file has O_DIRECT (``source_direct``, ``direct``) offsets and cluster size are multiples
    of ``CLONE_ALIGNMENT``.
    """

    source_fd: int
    source_offset: int
    fd: int
    offset: int
    length: int
    cluster_size: int
    source_direct: bool = False
    direct: bool = False


class Copied(NamedTuple):
    """What became of a ``Transfer``."""

    #: bytes at the start that share the source's extents; the rest was read and written
    cloned: int
    #: for each cluster: all zeros, and not written
    zero: Zeroes


def clone_or_copy(transfer: Transfer) -> Copied:
    """Share the extents where the file system can, else copy what is not zeros.

    What is shared takes no space, so nobody looks whether it is zeros. The last cluster may be
    short.
    """
    halting.check()
    cloned = _clone_clusters(transfer)
    zero = np.zeros(-(-transfer.length // transfer.cluster_size), np.bool_)
    if cloned < transfer.length:
        zero[cloned // transfer.cluster_size :] = copy_nonzero(
            transfer.source_fd,
            transfer.source_offset + cloned,
            transfer.fd,
            transfer.offset + cloned,
            transfer.length - cloned,
            transfer.cluster_size,
            source_direct=transfer.source_direct,
            direct=transfer.direct,
        )
    return Copied(cloned, zero)


def _clone_clusters(transfer: Transfer) -> int:
    """Bytes that were cloned, in whole clusters: the file system refuses what is past the end."""
    size = transfer.cluster_size
    length = min(transfer.length, os.fstat(transfer.source_fd).st_size - transfer.source_offset)
    length -= length % size
    if length <= 0 or size % CLONE_ALIGNMENT:
        return 0
    done = clone(transfer.source_fd, transfer.source_offset, transfer.fd, transfer.offset, length)
    return length if done else 0


def clone(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int) -> bool:
    """Share a range of extents; False, and nothing is known of the range, where that cannot be."""
    if (src_offset | dst_offset | length) % CLONE_ALIGNMENT:
        return False
    pair = (os.fstat(src_fd).st_dev, os.fstat(dst_fd).st_dev, CopyMethod.CLONE)
    if pair in unsupported or pair[1] in no_clones:
        return False
    request = _CLONE_RANGE.pack(src_fd, src_offset, length, dst_offset)
    try:
        fcntl.ioctl(dst_fd, FICLONERANGE, request)
    except OSError as error:
        # Whatever the reason, a plain copy finds out whether it matters.
        if error.errno in _NEVER:
            unsupported.add(pair)
        if error.errno in _NEVER_TO:
            no_clones.add(pair[1])
        return False
    return True


def copy_extent(
    src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int
) -> CopyMethod:
    """Copy a range by the cheapest means that the host has; offsets and length in bytes.

    Both ranges may be in one file when they do not overlap.
    """
    if length <= 0:
        return CopyMethod.READ_WRITE
    source, target = os.fstat(src_fd).st_dev, os.fstat(dst_fd).st_dev
    if clone(src_fd, src_offset, dst_fd, dst_offset, length):
        return CopyMethod.CLONE
    done = 0
    if (source, target, CopyMethod.COPY_FILE_RANGE) not in unsupported:
        done = _copy_file_range(src_fd, src_offset, dst_fd, dst_offset, length)
        if done == length:
            return CopyMethod.COPY_FILE_RANGE
        if done < 0:
            unsupported.add((source, target, CopyMethod.COPY_FILE_RANGE))
            done = 0
    _read_write(src_fd, src_offset + done, dst_fd, dst_offset + done, length - done)
    return CopyMethod.READ_WRITE


def _copy_file_range(
    src_fd: int,
    src_offset: int,
    dst_fd: int,
    dst_offset: int,
    length: int,
    gate: Gate | None = None,
) -> int:
    """Bytes copied until it went no further, for the plain copy to go on; -1: never again."""
    done = 0
    while done < length:
        halting.check()
        part = length - done
        if gate is not None:
            part = min(part, gate.piece())
        begun = monotonic()
        try:
            count = os.copy_file_range(src_fd, dst_fd, part, src_offset + done, dst_offset + done)
        except OSError as error:
            # EINVAL is about these ranges, the open mode or what is no file, the rest of _NEVER
            # about the hosts.
            never = error.errno in _NEVER or not stat.S_ISREG(os.fstat(src_fd).st_mode)
            return -1 if never and not done else done - done % CLONE_ALIGNMENT
        if count == 0:  # the end of the source, or a file system that only says so
            return done - done % CLONE_ALIGNMENT
        if gate is not None:
            gate.took(monotonic() - begun)
        done += count
    return done


def _read_write(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int) -> None:
    done = 0
    while done < length:
        buffer = piece_buffer(min(PIECE, length - done))
        hostcalls.read_into(src_fd, buffer, src_offset + done)
        hostcalls.write(dst_fd, dst_offset + done, buffer)
        done += len(buffer)


def copy_nonzero(
    src_fd: int,
    src_offset: int,
    dst_fd: int,
    dst_offset: int,
    length: int,
    cluster_size: int,
    *,
    source_direct: bool = False,
    direct: bool = False,
) -> Zeroes:
    """Copy the clusters that are not all zeros; for each cluster of the range: was it zeros?

    Clusters are counted from the start of the range; the last one may be short. Nothing is written
    where the answer is True: what the destination has there is the caller's business.
    ``source_direct`` and ``direct`` tell of O_DIRECT, as in ``Transfer``.
    """
    if cluster_size % 8:
        raise OSError(EINVAL, os.strerror(EINVAL))
    zero = np.zeros(-(-length // cluster_size), np.bool_)
    done = 0
    if not (source_direct or direct) and kernel_copies_from({src_fd}, dst_fd, cluster_size):
        done = _copy_in_kernel(src_fd, src_offset, dst_fd, dst_offset, length, cluster_size, zero)
    if done < length:
        zero[done // cluster_size :] = _copy_through_memory(
            src_fd,
            src_offset + done,
            dst_fd,
            dst_offset + done,
            length - done,
            cluster_size,
            source_direct=source_direct,
            direct=direct,
        )
    return zero


def kernel_copies_from(sources: set[int], fd: int, cluster_size: int) -> set[int]:
    """From which of these files copies in the kernel are worth trying."""
    if cluster_size < LEAST_SAMPLED:
        return set()
    target = os.fstat(fd)
    if not stat.S_ISREG(target.st_mode):
        return set()
    never = {pair for pair in tuple(unsupported) if pair[2] is CopyMethod.COPY_FILE_RANGE}
    if not never:  # each look at a file gives the GIL away
        return sources
    device = target.st_dev
    return {
        s for s in sources if (os.fstat(s).st_dev, device, CopyMethod.COPY_FILE_RANGE) not in never
    }


def _copy_in_kernel(
    src_fd: int,
    src_offset: int,
    dst_fd: int,
    dst_offset: int,
    length: int,
    cluster_size: int,
    zero: Zeroes,
) -> int:
    """``copy_nonzero`` with one copy instead of two; bytes done, whole clusters or all of it.

    Only the first words are seen: a cluster that does not begin with zeros is not zeros. Those that
    do are read. Who has to go on with what is left is ``_copy_through_memory``.
    """
    piece = max(WRITEBACK_PIECE - WRITEBACK_PIECE % cluster_size, cluster_size)
    gate = gate_of(dst_fd)
    for start in range(0, length, piece):
        part = min(piece, length - start)
        number, count = start // cluster_size, -(-part // cluster_size)
        words = first_words(src_fd, src_offset + start, count, cluster_size)
        if words is None:
            return start
        begins_zero = words == 0
        runs = []
        for first, last in runs_of(~begins_zero):
            begin = start + first * cluster_size
            size = min(start + last * cluster_size, length) - begin
            runs.append(Run(src_fd, src_offset + begin, dst_offset + begin, size))
        if not _copy_runs(runs, dst_fd, gate):
            return start
        for first, last in runs_of(begins_zero):
            begin = start + first * cluster_size
            size = min(start + last * cluster_size, length) - begin
            zero[number + first : number + last] = _copy_through_memory(
                src_fd,
                src_offset + begin,
                dst_fd,
                dst_offset + begin,
                size,
                cluster_size,
                most=ZEROES_PIECE,
            )
        hostcalls.start_writeback(dst_fd, dst_offset + start, part)
    return length


def _copy_runs(runs: Sequence[Run], fd: int, gate: Gate) -> bool:
    """All of them, by whatever the kernel does without showing the bytes; False if not."""
    if not gate.turn.acquire(blocking=False):
        if into_pages(runs, fd):
            return True
        gate.turn.acquire()
    try:
        return all(copy_run(run, fd, gate) for run in runs)
    finally:
        gate.turn.release()


def into_pages(runs: Sequence[Run], fd: int) -> bool:
    """``pages.read_into_pages`` where the file takes that, and not too many do it now."""
    if not takes_pages(fd) or not places.acquire(blocking=False):
        return False
    try:
        return read_into_pages(runs, fd)
    finally:
        places.release()


def copy_run(run: Run, fd: int, gate: Gate) -> bool:
    """All of it by copy_file_range(2); False if some was not copied, whatever the reason."""
    source, at, offset, length = run
    done = _copy_file_range(source, at, fd, offset, length, gate)
    if done < 0:
        pair = (os.fstat(source).st_dev, os.fstat(fd).st_dev, CopyMethod.COPY_FILE_RANGE)
        unsupported.add(pair)
    return done == length


def _copy_through_memory(
    src_fd: int,
    src_offset: int,
    dst_fd: int,
    dst_offset: int,
    length: int,
    cluster_size: int,
    *,
    source_direct: bool = False,
    direct: bool = False,
    most: int = PIECE,
) -> Zeroes:
    """``copy_nonzero`` by reading and writing, at most ``most`` bytes at a time."""
    if source_direct or direct:
        most = DIRECT_PIECE
    piece = max(most - most % cluster_size, cluster_size)
    answers = []
    begun = 0  # what the disk was told to begin with
    for start in range(0, length, piece):
        halting.check()
        part = min(piece, length - start)
        clusters = -(-part // cluster_size)
        buffer = piece_buffer(clusters * cluster_size)
        if source_direct:
            hostcalls.read_aligned(src_fd, buffer, src_offset + start, CLONE_ALIGNMENT)
        else:
            hostcalls.read_into(src_fd, buffer[:part], src_offset + start)
        if part % cluster_size:
            hostcalls.fill_zeroes(buffer, part)
        zero = zero_clusters(buffer, cluster_size)
        for first, last in runs_of(~zero):
            begin, end = first * cluster_size, last * cluster_size
            if direct:
                write_direct(dst_fd, dst_offset + start + begin, buffer[begin:end])
            else:
                hostcalls.write(dst_fd, dst_offset + start + begin, buffer[begin : min(end, part)])
        answers.append(zero)
        if not direct and (start + part - begun >= WRITEBACK_PIECE or start + part == length):
            hostcalls.start_writeback(dst_fd, dst_offset + begun, start + part - begun)
            begun = start + part
    return np.concatenate(answers) if answers else np.zeros(0, np.bool_)


def write_direct(fd: int, offset: int, data: memoryview) -> None:
    """Past the end of the file the space is allocated first: the writes then need not take turns.

    A file system makes direct writes that move the end of a file wait for each other.
    """
    if offset + len(data) > os.fstat(fd).st_size:
        with contextlib.suppress(OSError):  # the write finds out what is wrong
            hostcalls.fallocate(fd, 0, offset, len(data))
    hostcalls.write_aligned(fd, offset, data, CLONE_ALIGNMENT)


def zero_clusters(buffer: Buffer, cluster_size: int) -> Zeroes:
    """For each cluster of a buffer of whole clusters: is it all zeros?"""
    words = np.frombuffer(buffer, np.uint64).reshape(-1, cluster_size // 8)
    zero: Zeroes = words[:, 0] == 0
    # Data seldom begins with zeros: the first word settles most clusters without the rest.
    candidates = np.flatnonzero(zero)
    if len(candidates) == len(zero):
        zero = words.max(axis=1) == 0
    elif len(candidates):
        zero[candidates] = words[candidates].max(axis=1) == 0
    return zero


def is_zero(buffer: Buffer) -> bool:
    """Whether all bytes are zero; of any length. Releases the GIL for all but small buffers."""
    length = memoryview(buffer).nbytes
    whole = length - length % 8
    array = np.frombuffer(buffer, np.uint8)
    words = array[:whole].view(np.uint64)
    if whole and (words[0] or words[-1] or words.max()):
        return False
    return whole == length or not array[whole:].any()
