"""Duplicates that batches of copies share."""

import os
from types import SimpleNamespace

import pytest

from liveblockd.formats.qcow2.descriptors import Descriptors


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_duplicate_serves_all_that_overlap_and_is_closed_after_the_last():
    own = os.memfd_create("one")
    file = SimpleNamespace(fd=own)
    descriptors = Descriptors()
    with descriptors.borrow() as first:
        fd = first(file)
        assert fd != own and first(file) == fd
        with descriptors.borrow() as second:
            assert second(file) == fd
        assert is_open(fd)
        os.close(own)  # the node is closed, and its number is somebody else's
        other = os.memfd_create("two")
        assert os.fstat(first(file)).st_ino != os.fstat(other).st_ino
        assert os.fstat(first(SimpleNamespace(fd=other))).st_ino == os.fstat(other).st_ino
    assert not is_open(fd)
    os.close(other)


def test_errors_close_them_too():
    before = len(os.listdir("/proc/self/fd"))
    own = os.memfd_create("one")
    descriptors = Descriptors()
    with pytest.raises(OSError, match="Bad file"), descriptors.borrow() as duplicate:
        duplicate(SimpleNamespace(fd=own))
        duplicate(SimpleNamespace(fd=-1))
    os.close(own)
    assert len(os.listdir("/proc/self/fd")) == before
