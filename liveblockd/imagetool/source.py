"""What ``convert`` and others read: images one after the other, as one disk.

Runs on the event loop. Invariants: runs follow each other without a gap and cover the whole disk;
what an image does not hold in its last sector reads as zeros.
Errors: OSError; ``ToolError`` of ``load_snapshot``.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph import chain
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.imagetool.images import ToolError, reason
from liveblockd.keyval import split_commas
from liveblockd.storage.driver import Buffer, ExtentKind, HostFile


class Holds(enum.Enum):
    """What is known of a run."""

    DATA = enum.auto()
    ZEROES = enum.auto()
    #: nothing: the backing file has it
    BELOW = enum.auto()


class Run(NamedTuple):
    """Bytes of the disk that are treated alike."""

    offset: int
    length: int
    holds: Holds
    #: where a worker finds the bytes of DATA
    file: HostFile | None = None
    host_offset: int = -1


class Source:
    """The disk; ``above_backing``: what the backing files of the images have is left out.

    With ``base`` what this one, in the chain of the only image, and all below it have.
    """

    def __init__(
        self, backends: Sequence[Backend], *, above_backing: bool = False, base: Node | None = None
    ) -> None:
        self._parts: list[tuple[int, int, Backend]] = []  # offset, size and image
        self._above_backing = above_backing
        self._base = base
        self.length = 0  # bytes
        for backend in backends:
            size = backend.node.driver.virtual_size
            self._parts.append((self.length, size, backend))
            self.length += size

    async def runs(self) -> AsyncIterator[Run]:
        """All of it."""
        for start, size, backend in self._parts:
            position = 0
            node = backend.node
            base = chain.layer_below(node) if self._above_backing else self._base
            async for run in chain.resolve(node, base, 0, backend.length):
                yield self._run(run, start + position, base)
                position += run.length
            if position < size:
                yield Run(start + position, size - position, Holds.ZEROES)

    @staticmethod
    def _run(run: chain.Run, offset: int, base: Node | None) -> Run:
        if run.kind is ExtentKind.UNALLOCATED and base is not None:
            return Run(offset, run.length, Holds.BELOW)
        if run.zero:
            return Run(offset, run.length, Holds.ZEROES)
        file = None
        if run.kind is ExtentKind.DATA and isinstance(run.layer, Node):
            file = chain.host_file(run.layer)
        return Run(offset, run.length, Holds.DATA, file, run.host_offset)

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes of the disk."""
        found: list[Buffer] = []
        for start, size, backend in self._parts:
            first, last = max(offset, start), min(offset + length, start + size)
            if first >= last:
                continue
            inside = max(first, min(last, start + backend.length))
            if first < inside:
                found.append(await backend.read(first - start, inside - first))
            if inside < last:
                found.append(bytes(last - inside))
        return found[0] if len(found) == 1 else b"".join(found)


async def load_snapshot(node: Node, text: str) -> None:
    """Let ``node`` show an internal snapshot; ToolError.

    ``text``: ``snapshot.id=ID,snapshot.name=NAME`` or one of the two, or an id or a name.
    """
    wanted: dict[str, str] = {}
    if text.startswith("snapshot."):
        for part in split_commas(text):
            name, _, value = part.partition("=")
            wanted[name.removeprefix("snapshot.")] = value
        if not wanted.keys() <= {"id", "name"}:
            name = next(n for n in wanted if n not in ("id", "name"))
            raise ToolError(
                f"Invalid parameter 'snapshot.{name}'\nFailed in parsing snapshot param '{text}'"
            )
    try:
        known = node.driver.list_snapshots()
        if wanted:
            found = [
                s for s in known
                if wanted.get("id", s.id) == s.id and wanted.get("name", s.name) == s.name
            ]  # fmt: skip
        else:
            found = [s for s in known if s.id == text] or [s for s in known if s.name == text]
        if not found or not isinstance(node.driver, Qcow2):
            raise BlockError("Can't find snapshot")
        await node.driver.load_snapshot(found[0].id)
    except (BlockError, OSError) as error:
        raise ToolError(f"Failed to load snapshot: {reason(error)}") from error
