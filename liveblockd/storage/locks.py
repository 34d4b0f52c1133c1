"""The image locks that QEMU and its tools take and look for, on one open file description.

Specification: QEMU docs/system/images (image locking) and what its tools show in /proc/locks: a
permission ``n`` that is in use is a shared OFD lock on byte 100+n, a permission that others may not
have is a shared OFD lock on byte 200+n. Whoever wants ``n`` asks whether somebody *else* holds
200+n; whoever does not share ``n`` asks whether somebody else holds 100+n. All first lock, then
ask: of two that come at once at least one sees the other.

Runs on: a worker (the calls are quick on a local disk and may hang on a network one).

Invariants: between calls exactly the bytes for ``used`` and ``shared`` are locked, also after a
failed ``acquire``. Locks belong to the open file description: they are gone when its last
descriptor is closed, SIGKILL included.

Errors: ``BlockError`` in QEMU's words.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from errno import EACCES, EAGAIN, EINVAL, ENOLCK, ENOSYS, EOPNOTSUPP

from liveblockd.errors import BlockError
from liveblockd.storage.driver import Permission

log = logging.getLogger(__name__)

USED_BASE = 100
UNSHARED_BASE = 200

#: the permissions and how QEMU calls them, in the order in which it asks
_PERMISSIONS = (
    (0, Permission.CONSISTENT_READ, "consistent read"),
    (1, Permission.WRITE, "write"),
    (2, Permission.WRITE_UNCHANGED, "write unchanged"),
    (3, Permission.RESIZE, "resize"),
)
_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, pid (0 for OFD locks)
_UNSUPPORTED = (ENOLCK, EINVAL, ENOSYS, EOPNOTSUPP)


class ImageLocks:
    """The locks of one descriptor; with ``enabled`` false all calls succeed and do nothing.

    ``required`` (locking=on): a file system without OFD locks is an error, not a warning.
    """

    def __init__(
        self, fd: int, filename: str, *, enabled: bool = True, required: bool = False
    ) -> None:
        self._fd = fd
        self._filename = filename
        self._enabled = enabled
        self._required = required
        self._held: set[int] = set()
        self.used = Permission.NONE
        self.shared = Permission.ALL

    @property
    def held(self) -> frozenset[int]:
        """The bytes that are locked."""
        return frozenset(self._held)

    def acquire(self, used: Permission, shared: Permission) -> None:
        """Hold exactly the locks for these permissions; on BlockError those of before are kept."""
        if self._enabled:
            wanted = _bytes_of(used, shared)
            added = wanted - self._held
            try:
                self._lock(self._fd, added)
                if self._enabled and added:
                    self._ask(used, shared)
            except BlockError:
                self._unlock(added & self._held)
                raise
            self._unlock(self._held - wanted)
        self.used, self.shared = used, shared

    def release(self) -> None:
        """Give up all locks."""
        self._unlock(set(self._held))
        self.used, self.shared = Permission.NONE, Permission.ALL

    def replace(self, fd: int) -> None:
        """Our descriptor means the description of ``fd`` from now on, and the locks are there.

        Nobody is asked: what we hold keeps all others away. The old description is unlocked by
        name: a child that another thread has forked and that has not called exec yet has it too,
        and would be the "other process" of our next question. OSError, and nothing has changed.
        """
        for byte in sorted(self._held):
            _set_lock(fd, fcntl.F_RDLCK, byte)
        for byte in sorted(self._held):
            with suppress(OSError):  # they go with the description, if nobody else has it
                _set_lock(self._fd, fcntl.F_UNLCK, byte)
        os.dup2(fd, self._fd, inheritable=False)

    def _lock(self, fd: int, wanted: Iterable[int]) -> None:
        for byte in sorted(wanted):
            try:
                _set_lock(fd, fcntl.F_RDLCK, byte)
            except OSError as error:
                if error.errno in _UNSUPPORTED and not self._held and not self._required:
                    log.warning("%s: no image locks: %s", self._filename, error.strerror)
                    self._enabled = False
                    return
                raise BlockError(f"Failed to lock byte {byte}", errno=error.errno or EAGAIN) from (
                    error
                )
            self._held.add(byte)

    def _unlock(self, surplus: Iterable[int]) -> None:
        for byte in sorted(surplus):
            try:
                _set_lock(self._fd, fcntl.F_UNLCK, byte)
            except OSError as error:  # keeps others out for longer than needed; harms no data
                log.warning("%s: byte %d stays locked: %s", self._filename, byte, error.strerror)
            self._held.discard(byte)

    def _ask(self, used: Permission, shared: Permission) -> None:
        for number, permission, name in _PERMISSIONS:
            if permission & used and _locked_by_other(self._fd, UNSHARED_BASE + number):
                raise self._refused(f'Failed to get "{name}" lock')
        for number, permission, name in _PERMISSIONS:
            if not permission & shared and _locked_by_other(self._fd, USED_BASE + number):
                raise self._refused(f'Failed to get shared "{name}" lock')

    def _refused(self, message: str) -> BlockError:
        error = BlockError(message, errno=EAGAIN)
        # QEMU prints this to people and leaves it out of QMP, as a note is left out of `message`.
        error.add_note(f"Is another process using the image [{self._filename}]?")
        return error


def _bytes_of(used: Permission, shared: Permission) -> set[int]:
    held = {USED_BASE + number for number, bit, _ in _PERMISSIONS if bit & used}
    held.update(UNSHARED_BASE + number for number, bit, _ in _PERMISSIONS if not bit & shared)
    return held


def _set_lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _locked_by_other(fd: int, byte: int) -> bool:
    """Whether somebody else has any lock there: an exclusive one could not be had now."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    except OSError as error:
        if error.errno in (EAGAIN, EACCES):
            return True
        raise BlockError(f"Failed to lock byte {byte}", errno=error.errno or EAGAIN) from error
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
