"""Opening a file of the host for the driver ``file``, and what can be found out about it then.

Specification: docs of open(2), preadv2(2). Runs on: a worker. Errors: OSError.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from errno import EACCES, EINVAL, EPERM, EROFS

from liveblockd.storage import hostcalls

_READ_ONLY_REASONS = (EACCES, EPERM, EROFS)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """What opening found out; ``HostFile`` for jobs."""

    fd: int
    direct: bool
    read_only: bool
    alignment: int
    read_flags: int | None  # of preadv in read_nowait; None: it always declines
    write_flags: int | None  # None: write_nowait asks ``calm``, or declines with O_DIRECT
    in_memory: bool = False


def open_as_allowed(
    filename: str, *, read_only: bool, direct: bool, auto: bool
) -> tuple[int, bool]:
    """The descriptor, and whether the file can only be read.

    ``auto``: it is opened for reading whatever is asked, once it is known what may be.
    """
    try:
        fd = open_fd(filename, read_only, direct)
    except OSError as error:
        if not (auto and error.errno in _READ_ONLY_REASONS) or read_only:
            raise
        return open_fd(filename, True, direct), True
    if read_only or not auto:
        return fd, read_only
    try:
        return open_fd(f"/proc/self/fd/{fd}", True, direct), False
    finally:
        os.close(fd)


def open_fd(filename: str, read_only: bool, direct: bool) -> int:
    """For reading, or for both; past the page cache if ``direct``."""
    flags = os.O_RDONLY if read_only else os.O_RDWR
    try:
        return os.open(filename, flags | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    except OSError as error:
        if direct and error.errno == EINVAL:
            raise OSError(EINVAL, "the file system does not support O_DIRECT") from error
        raise


def probe(fd: int, read_only: bool, direct: bool) -> OpenFile:
    """What reads and writes can be asked of ``fd``."""
    if hostcalls.filesystem_type(fd) in (hostcalls.TMPFS_MAGIC, hostcalls.RAMFS_MAGIC):
        if direct:
            # The page cache is the file there: a file system that takes the flag (since Linux 6.6)
            # ignores it, but splicing and alignment would pay for it.
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return OpenFile(fd, False, read_only, 1, 0, 0, in_memory=True)
    if direct:
        return OpenFile(fd, direct, read_only, hostcalls.probe_alignment(fd), None, None)
    nowait = os.RWF_NOWAIT if hostcalls.probe_nowait(fd) else None
    # Writes cannot be tried before there is something to write: the first one tells.
    return OpenFile(fd, direct, read_only, 1, nowait, nowait)
