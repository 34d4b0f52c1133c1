"""What tests of copies between files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def memory() -> Iterator[Callable[..., int]]:
    """Makes files in memory with some bytes; their descriptors are closed behind the test."""
    fds: list[int] = []

    def one(content: bytes = b"") -> int:
        fds.append(os.memfd_create("file"))
        os.pwrite(fds[-1], content, 0)
        return fds[-1]

    yield one
    for fd in fds:
        os.close(fd)
