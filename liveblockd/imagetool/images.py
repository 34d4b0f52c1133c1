"""Opens images for one command, with the graph and the engine of the daemon, and the locks of QEMU.

Runs on an event loop of its own. Invariants: whatever was opened is flushed, closed and unlocked
when ``Images`` ends, also after an error. Errors: ``BlockError`` and ``OSError``, worded as
qemu-img does; ``ToolError`` carries an exit status of its own.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.graph import filenames
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.graph.opening import Opener
from liveblockd.qapi import parse, parse_size
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, find_driver


class ToolError(Exception):
    """One line for stderr and the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


def reason(error: BlockError | OSError) -> str:
    """The words of an error."""
    if isinstance(error, BlockError):
        notes = getattr(error, "__notes__", [])
        return "\n".join([error.message, *notes])
    return error.strerror or str(error)


def size_of(text: str, what: str = "image size") -> int:
    """Bytes of ``64k``, ``1.5G``; ToolError."""
    size = parse_size(text)
    if size is None or size >= 1 << 63:
        raise ToolError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n"
            "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        )
    return size


class Images:
    """The images of one command; an async context manager."""

    def __init__(self, *, no_io: bool = False) -> None:
        """``no_io``: only to be described, so that encrypted ones need no key."""
        load_all_drivers()
        self.workers = WorkerPool()
        self.graph = Graph(Environment(self.workers, publisher=Publisher(), no_io=no_io))
        self._count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.graph.close()
        finally:
            self.workers.close()

    async def format_of(self, filename: str, *, force_share: bool = False) -> str:
        """The format that an image seems to have; ToolError when it cannot be read."""
        members = {"read-only": True, "force-share": force_share}
        try:
            found = filenames.protocol_options(filename)
            if find_driver(str(found["driver"])).is_format:
                return str(found["driver"])
            return await Opener(self.graph).probe(found | members)
        except (BlockError, OSError) as error:
            raise ToolError(f"Could not open '{filename}': {reason(error)}") from error

    async def open(
        self,
        filename: str,
        image_format: str | None = None,
        *,
        writable: bool = False,
        backing: bool = True,
        force_share: bool = False,
        no_flush: bool = False,
    ) -> Node:
        """The node of an image, with its chain if ``backing``; ToolError."""
        probed = False
        if image_format is None:
            image_format = await self.format_of(filename, force_share=force_share)
            probed = image_format == "raw"
        try:
            members = self._members(
                filename, image_format, writable, backing=backing, force_share=force_share
            )
            members["cache"] = {"no-flush": no_flush}
            options = parse(BlockdevOptions, members)
            return await self.graph.open(options, probed=probed)
        except (BlockError, OSError) as error:
            raise ToolError(f"Could not open '{filename}': {reason(error)}") from error

    def _members(
        self, filename: str, image_format: str, writable: bool, *, backing: bool, force_share: bool
    ) -> dict[str, Any]:
        try:
            driver = find_driver(image_format)
        except BlockError:
            raise BlockError(f"Unknown driver '{image_format}'") from None
        self._count += 1
        members: dict[str, Any] = {
            "node-name": f"image{self._count}",
            "read-only": not writable,
            "force-share": force_share,
        }
        file = filenames.protocol_options(filename)
        if find_driver(str(file["driver"])).is_format or not driver.is_format:
            return file | members
        members |= {"driver": image_format, "file": file, "discard": "unmap"}
        if not backing and "backing" in driver.child_roles:
            members["backing"] = None
        return members

    async def open_file(
        self, filename: str, *, writable: bool = False, force_share: bool = False
    ) -> Node:
        """The protocol node alone, locked as a format above it would; ToolError."""
        self._count += 1
        members: dict[str, Any] = {
            "node-name": f"image{self._count}",
            "read-only": not writable,
            "force-share": force_share,
        }
        try:
            members |= filenames.protocol_options(filename)
            node = await self.graph.open(parse(BlockdevOptions, members))
            await self.use(node, writable=writable, exclusive=not force_share)
        except (BlockError, OSError) as error:
            raise ToolError(f"Could not open '{filename}': {reason(error)}") from error
        return node

    async def use(self, node: Node, *, writable: bool = False, exclusive: bool = False) -> Backend:
        """A user of ``node``; ``exclusive``: nobody else changes it. Raises BlockError."""
        used = Permission.CONSISTENT_READ
        if writable:
            used |= Permission.WRITE | Permission.RESIZE
        shared = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
        if not exclusive:
            shared = Permission.ALL
        return await self.graph.attach(node, used, shared, user=f"image '{node.filename}'")
