"""Copies between host files, made by a worker with two descriptors and numbers.

Specification: ioctl_ficlonerange(2), copy_file_range(2).

Runs on: workers. No state but what the host was found not to support between two devices, and a
buffer a thread. Source and destination ranges are whole blocks where a file has O_DIRECT.

Invariants: on return all of the range was stored (not made durable: that is a flush); on an error
some of it may have been. The source past its end counts as zeros.

Errors: ``OSError``.
"""

from __future__ import annotations

import enum
import fcntl
import os
import struct
import threading
from errno import EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP, EXDEV

import numpy as np
import numpy.typing as npt

from liveblockd.storage import hostcalls
from liveblockd.storage.driver import Buffer

FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("qQQQ")  # source fd, source offset, length, destination offset
#: no file system clones in smaller pieces
CLONE_ALIGNMENT = 4096
#: bytes read at a time: fits into the cache of a core, and a system call costs nothing against it
PIECE = 2 << 20

_NEVER = (EXDEV, EOPNOTSUPP, ENOSYS, ENOTTY)


class CopyMethod(enum.Enum):
    """How the last byte was copied."""

    CLONE = "clone"
    COPY_FILE_RANGE = "copy_file_range"
    READ_WRITE = "read_write"


#: pairs of devices between which a method fails for good; set operations are atomic
_unsupported: set[tuple[int, int, CopyMethod]] = set()


class _Local(threading.local):
    buffer: memoryview | None = None


_local = _Local()


def _piece_buffer(length: int) -> memoryview:
    buffer = _local.buffer
    if buffer is None or len(buffer) < length:
        buffer = _local.buffer = hostcalls.aligned_buffer(max(length, PIECE))
    return buffer[:length]


def copy_extent(
    src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int
) -> CopyMethod:
    """Copy a range by the cheapest means that the host has; offsets and length in bytes.

    Both ranges may be in one file when they do not overlap.
    """
    if length <= 0:
        return CopyMethod.READ_WRITE
    source, target = os.fstat(src_fd).st_dev, os.fstat(dst_fd).st_dev
    aligned = (src_offset | dst_offset | length) % CLONE_ALIGNMENT == 0
    if aligned and (source, target, CopyMethod.CLONE) not in _unsupported:
        try:
            request = _CLONE_RANGE.pack(src_fd, src_offset, length, dst_offset)
            fcntl.ioctl(dst_fd, FICLONERANGE, request)
        except OSError as error:
            # Whatever the reason, a plain copy finds out whether it matters.
            if error.errno in _NEVER:
                _unsupported.add((source, target, CopyMethod.CLONE))
        else:
            return CopyMethod.CLONE
    done = 0
    if (source, target, CopyMethod.COPY_FILE_RANGE) not in _unsupported:
        done = _copy_file_range(src_fd, src_offset, dst_fd, dst_offset, length)
        if done == length:
            return CopyMethod.COPY_FILE_RANGE
        if done < 0:
            _unsupported.add((source, target, CopyMethod.COPY_FILE_RANGE))
            done = 0
    _read_write(src_fd, src_offset + done, dst_fd, dst_offset + done, length - done)
    return CopyMethod.READ_WRITE


def _copy_file_range(
    src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int
) -> int:
    """Bytes copied until it went no further, for the plain copy to go on; -1: never again."""
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(
                src_fd, dst_fd, length - done, src_offset + done, dst_offset + done
            )
        except OSError as error:
            # EINVAL is about these ranges or the open mode, the rest of _NEVER about the hosts.
            return -1 if not done and error.errno in _NEVER else done - done % CLONE_ALIGNMENT
        if count == 0:  # the end of the source, or a file system that only says so
            return done - done % CLONE_ALIGNMENT
        done += count
    return done


def _read_write(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int) -> None:
    done = 0
    while done < length:
        buffer = _piece_buffer(min(PIECE, length - done))
        hostcalls.read_into(src_fd, buffer, src_offset + done)
        hostcalls.write(dst_fd, dst_offset + done, buffer)
        done += len(buffer)


def copy_nonzero(
    src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int, cluster_size: int
) -> npt.NDArray[np.bool_]:
    """Copy the clusters that are not all zeros; for each cluster of the range: was it zeros?

    Clusters are counted from the start of the range; the last one may be short. Nothing is written
    where the answer is True: what the destination has there is the caller's business.
    """
    if cluster_size % 8:
        raise OSError(EINVAL, os.strerror(EINVAL))
    piece = max(PIECE - PIECE % cluster_size, cluster_size)
    answers = []
    for start in range(0, length, piece):
        part = min(piece, length - start)
        clusters = -(-part // cluster_size)
        buffer = _piece_buffer(clusters * cluster_size)
        hostcalls.read_into(src_fd, buffer[:part], src_offset + start)
        if part % cluster_size:
            hostcalls.fill_zeroes(buffer, part)
        zero = zero_clusters(buffer, cluster_size)
        for first, last in _runs(~zero):
            begin, end = first * cluster_size, min(last * cluster_size, part)
            hostcalls.write(dst_fd, dst_offset + start + begin, buffer[begin:end])
        answers.append(zero)
    return np.concatenate(answers) if answers else np.zeros(0, np.bool_)


def zero_clusters(buffer: Buffer, cluster_size: int) -> npt.NDArray[np.bool_]:
    """For each cluster of a buffer of whole clusters: is it all zeros?"""
    words = np.frombuffer(buffer, np.uint64).reshape(-1, cluster_size // 8)
    zero: npt.NDArray[np.bool_] = words[:, 0] == 0
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


def _runs(selected: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Ranges ``first <= i < last`` of True."""
    edges = np.flatnonzero(np.diff(selected, prepend=False, append=False))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]
