"""Duplicates of host files' descriptors, for the copies of workers that are under way.

Runs on: the event loop.

A node that is closed, or opened again, while a worker copies must do no harm, so workers get
duplicates. A batch of a chain of many snapshots comes from dozens of files, and the next batch from
the same ones: what one batch has duplicated serves those that overlap with it.

Invariants: a duplicate is open as long as any borrower is inside; it is closed when the last one
leaves. One that was opened again is another ``HostFile``.

Errors: ``OSError`` of dup(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from liveblockd.storage.driver import HostFile
from liveblockd.storage.hostcalls import duplicate


class Descriptors:
    """See the module."""

    def __init__(self) -> None:
        #: by identity of the file, which is kept alive with it
        self._duplicates: dict[int, tuple[HostFile, int]] = {}
        self._borrowers = 0

    @contextmanager
    def borrow(self) -> Iterator[Callable[[HostFile], int]]:
        """Gives a function from a file to its duplicate, which is good inside."""
        self._borrowers += 1
        try:
            yield self._duplicate
        finally:
            self._borrowers -= 1
            if not self._borrowers:
                duplicates, self._duplicates = self._duplicates, {}
                for _, fd in duplicates.values():
                    os.close(fd)

    def _duplicate(self, file: HostFile) -> int:
        found = self._duplicates.get(id(file))
        if found is None:
            found = self._duplicates[id(file)] = (file, duplicate(file.fd))
        return found[1]
