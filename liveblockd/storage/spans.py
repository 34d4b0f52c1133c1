"""The spans of all flat maps, and the memory they share.

Runs on: the event loop. Invariant: the spans in ``POOL`` take ``limit`` bytes at most, however
large the disks and however deep the chains; who was not used since the last round goes first.
Errors: none.
"""

from __future__ import annotations

from typing import TypeAlias, cast

from liveblockd.storage.cells import Cells
from liveblockd.storage.driver import Buffer

#: bytes for the spans of all maps together: 512 GiB of disks with clusters of 64 KiB
LIMIT = 64 << 20
#: bytes that a span costs beside its array
OVERHEAD = 400

_EMPTY: dict[int, Cells] = {}


class Span:
    """A range of a chain; ``view`` is on ``cells``."""

    __slots__ = ("cells", "shared", "used", "view")

    def __init__(self, cells: Cells) -> None:
        #: nobody has anything here: one array for all such spans
        self.shared = not cells.any()
        if self.shared:
            cells = _EMPTY.setdefault(len(cells), cells)
            cells.flags.writeable = False
        self.cells = cells
        self.view = memoryview(cast(Buffer, cells))
        self.used = True

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return OVERHEAD + (0 if self.shared else self.cells.nbytes)


Spans: TypeAlias = dict[int, Span]


class SpanPool:
    """See the module. A map is known by its dictionary of spans."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        #: oldest first: (identity of the dictionary, index) -> (dictionary, size)
        self._queue: dict[tuple[int, int], tuple[Spans, int]] = {}

    def add(self, spans: Spans, index: int, span: Span) -> None:
        """A new span; others go where there is no room."""
        self.remove(spans, index)
        spans[index] = span
        self._queue[id(spans), index] = (spans, span.size)
        self.size += span.size
        self._make_room((id(spans), index))

    def remove(self, spans: Spans, index: int) -> None:
        """Drop a span; nothing if there is none."""
        known = self._queue.pop((id(spans), index), None)
        if known is not None:
            self.size -= known[1]
            del spans[index]

    def forget(self, spans: Spans) -> None:
        """Drop all spans of a map."""
        for index in list(spans):
            self.remove(spans, index)

    def _make_room(self, newest: tuple[int, int]) -> None:
        for _ in range(2 * len(self._queue)):
            if self.size <= self.limit:
                return
            key = next(iter(self._queue))
            spans, size = self._queue.pop(key)
            span = spans[key[1]]
            if key == newest or span.used:
                span.used = False
                self._queue[key] = (spans, size)
                continue
            self.size -= size
            del spans[key[1]]


POOL = SpanPool(LIMIT)
