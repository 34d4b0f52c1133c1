"""What an export needs of the graph: a user of a node that follows snapshots.

``graph.backend.Backend`` offers ``ExportBackend``; whoever makes the ``ExportRegistry`` hands it a
``BackendSource`` that attaches one to a node and lets go of it. Both are protocols, so that the
exports can be tested on a disk in memory.

Runs on the loop. Errors: ``OSError`` from I/O (its errno goes to the client), ``BlockError`` from
``attach``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

#: length in bytes, reads as zeros, takes no space, layer that has it (0: none, 1: the exported
#: node, 2: its backing node, and so on)
BlockStatus: TypeAlias = tuple[int, bool, bool, int]


class NamedNode(Protocol):
    """A node of the graph, as far as an export looks at it."""

    @property
    def name(self) -> str:
        """The node name."""


class ExportBackend(Protocol):
    """An exported node; requests lie inside ``[0, length)``, which the export has checked.

    ``write_nowait`` has stored the bytes before it returns True: the buffer is used again.
    """

    @property
    def node(self) -> NamedNode:
        """The node it is on now; a snapshot puts it on the overlay."""

    @property
    def length(self) -> int:
        """Size in bytes, as it is now."""

    @property
    def read_only(self) -> bool:
        """Whether the node takes no writes."""

    @property
    def active(self) -> bool:
        """Whether the node is; else another process may be changing what is read."""

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes, or None where ``read`` would wait."""

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Whether the bytes are stored; False where ``write`` would wait."""

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> Sequence[Buffer]:
        """``read_nowait`` of ranges of one length: those at hand, from the first one on."""

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """``write_nowait`` of parts of one length: how many, from the first one on, are stored."""

    def begin_write(
        self, offset: int, data: Buffer, done: Callable[[OSError | None], None]
    ) -> bool:
        """True: ``done`` is called once when the write has ended; False: ``write`` has to do it."""

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes."""

    async def write(self, offset: int, data: Buffer) -> None:
        """Store; durable after ``flush``."""

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Make it read as zeros; with ``fast_only`` ENOTSUP where only writing zeros would do."""

    async def discard(self, offset: int, length: int) -> None:
        """Give space back where that is possible."""

    async def flush(self) -> None:
        """Make durable what was written by whomever before the call."""

    async def block_status(self, offset: int, length: int) -> Sequence[BlockStatus]:
        """Runs over the whole chain for a non-empty prefix of the range."""


class DirtySource(Protocol):
    """Where a dirty bitmap that is exported says what is dirty."""

    def __call__(self, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Extents (length in bytes, 1 where dirty) for a non-empty prefix of the range."""


class BackendSource(Protocol):
    """Makes and ends the backends of exports."""

    async def attach(
        self, node_name: str, *, writable: bool, allow_inactive: bool
    ) -> ExportBackend:
        """A backend on that node, holding the permissions it needs; raises BlockError.

        The node is made active first, unless ``allow_inactive``.
        """

    def unhindered(self, backend: ExportBackend) -> AbstractContextManager[None]:
        """Limits let go meanwhile who waits for them: the export is being removed."""

    async def release(self, backend: ExportBackend) -> None:
        """No request is in flight any more and none will come."""

    def dirty_bitmap(self, backend: ExportBackend, node: str | None, name: str) -> DirtySource:
        """The bitmap ``name`` of ``node`` (default: of the chain exported); raises BlockError."""
