"""Jobs move small pieces for a while, so that small disks give them many to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from liveblockd.graph import before_write
from liveblockd.jobs import (
    backup,
    chunk_size,
    commit,
    copying,
    host_copy,
    mirror,
    planning,
    stream,
)

KIB = 1024


@contextmanager
def small_chunks(
    chunk: int, *, least_copy: int = 64 * KIB, look_ahead: int = 512
) -> Iterator[None]:
    """Pieces of about ``chunk`` bytes; workers copy what has ``least_copy`` bytes at least.

    ``look_ahead``: so many runs are planned at a time.
    """
    sizes = {
        copying: ("LIMITED_CHUNK", "SLOW_CHUNK", "READ_CHUNK", "FIRST_CHUNK", "LEAST_CHUNK"),
        stream: ("READ_CHUNK",),
        commit: ("READ_CHUNK",),
        backup: ("READ_CHUNK", "FIRST_CHUNK"),
        mirror: ("MOST_CHUNK", "READ_CHUNK"),
        chunk_size: ("LEAST", "FIRST"),
        before_write: ("MAX_COPY", "MAX_READ"),
    }
    with ExitStack() as stack:
        for module, names in sizes.items():
            stack.enter_context(mock.patch.multiple(module, **dict.fromkeys(names, chunk)))
        for module in (copying, backup):
            stack.enter_context(mock.patch.object(module, "MOST_CHUNK", 4 * chunk))
        stack.enter_context(mock.patch.object(chunk_size, "MOST", 4 * chunk))
        stack.enter_context(mock.patch.object(host_copy, "LEAST_COPY", least_copy))
        for module in (planning, backup):
            stack.enter_context(
                mock.patch.multiple(module, LEAST_COPY=least_copy, LOOK_AHEAD=look_ahead)
            )
        yield
