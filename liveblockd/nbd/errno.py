"""The errors that NBD can carry, and how an errno of this host becomes one of them.

Specification: NBD doc/proto.md, "Error values". The numbers are those of Linux, but they are
numbers of the protocol: they do not change with the platform.

Pure. ``nbd_error`` never fails. An errno the protocol does not know becomes EIO: the request was
not wrong (which EINVAL would say), something below failed.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from typing import Final


class NbdError(enum.IntEnum):
    """Value of the error field of a reply."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


_BY_ERRNO: Final[Mapping[int, NbdError]] = {
    errno.EPERM: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EIO: NbdError.EIO,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOVERFLOW: NbdError.EOVERFLOW,
    errno.EOPNOTSUPP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}

_TO_ERRNO: Final[Mapping[int, int]] = {
    NbdError.EPERM: errno.EPERM,
    NbdError.EIO: errno.EIO,
    NbdError.ENOMEM: errno.ENOMEM,
    NbdError.EINVAL: errno.EINVAL,
    NbdError.ENOSPC: errno.ENOSPC,
    NbdError.EOVERFLOW: errno.EOVERFLOW,
    NbdError.ENOTSUP: errno.EOPNOTSUPP,
    NbdError.ESHUTDOWN: errno.ESHUTDOWN,
}


def nbd_error(error: int | None) -> NbdError:
    """The error of the protocol for an errno of this host (None: an OSError without one)."""
    return _BY_ERRNO.get(error or errno.EIO, NbdError.EIO)


def host_errno(error: int) -> int:
    """The errno of this host for an error received; one that nobody knows is EINVAL."""
    return _TO_ERRNO.get(error, errno.EINVAL)
