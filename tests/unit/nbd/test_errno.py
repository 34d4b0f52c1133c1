"""errno of this host <-> error of the protocol."""

import errno

import pytest

from liveblockd.nbd.errno import NbdError, host_errno, nbd_error


@pytest.mark.parametrize("error", list(NbdError))
def test_both_ways(error):
    assert nbd_error(host_errno(error)) is error


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (errno.EROFS, NbdError.EPERM),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.ESTALE, NbdError.EIO),
        (errno.ENXIO, NbdError.EIO),
        (None, NbdError.EIO),
        (0, NbdError.EIO),
    ],
)
def test_to_the_protocol(host, expected):
    assert nbd_error(host) is expected


def test_an_error_nobody_knows():
    assert host_errno(4711) == errno.EINVAL
