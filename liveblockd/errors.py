"""The two families of errors that cross package borders.

*Data path*: a plain ``OSError`` with an errno, whoever raises it (a system call,
the qcow2 engine on a damaged table). The NBD edge maps the errno, a job applies its
on-error policy to it.

*Management*: ``BlockError``, with the class and the words a QMP client is answered with.
``ConfigError`` ends the start of the daemon with one line and exit status 1.

Each edge translates once: ``qmp.session`` turns both families into a QMP error,
``nbd.errno`` turns an errno into NBD's. A broken invariant is an ``assert``, never one of these.

Pure.
"""

from __future__ import annotations

import enum
from errno import EDQUOT, EINVAL, EIO, ENOSPC
from typing import Final

#: of an ``OSError``: there is no room, which somebody may make. NBD has one code for both.
NO_SPACE: Final = (ENOSPC, EDQUOT)


class ErrorClass(enum.StrEnum):
    """The error classes of QMP (qmp-spec, section 2.4.2; qapi/error.json)."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"
    KVM_MISSING_CAP = "KVMMissingCap"


class BlockError(Exception):
    """A request of the management that cannot be done, in QEMU's words.

    ``errno`` is kept where a system call was the reason, so that a job or an exit status
    can tell ENOSPC from EIO.
    """

    def __init__(
        self,
        message: str,
        *,
        errno: int = EINVAL,
        error_class: ErrorClass = ErrorClass.GENERIC,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno
        self.error_class = error_class

    @classmethod
    def from_os_error(cls, prefix: str, error: OSError) -> BlockError:
        """``PREFIX: strerror``, as QEMU words the failure of a system call."""
        reason = error.strerror or str(error)
        return cls(f"{prefix}: {reason}", errno=error.errno or EIO)


class JobNotFoundError(BlockError):
    """Of a request to a job that is not there: waiting for the ends of others does not help."""


class ConfigError(Exception):
    """The command line or the configuration cannot be used; the text is one line."""
