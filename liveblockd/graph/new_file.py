"""A new file of the host for a new image: made or emptied, and nobody else's while it is filled.

Specification: qapi/block-core.json (blockdev-create, blockdev-snapshot-sync). Runs on the event
loop; calls of the file system are jobs for workers.

Invariants: a file that somebody uses, here or in another process, is refused before a byte of it is
touched. What was made here is removed again when it could not be filled; a file that was there
before stays. Its name is durable when ``new_file`` ends.

Errors: BlockError in QEMU's words; what the body of ``new_file`` raises.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.qapi import parse
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions

_USED: Final = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


@dataclass(frozen=True, slots=True)
class NewFile:
    """The protocol node, without a byte in it; ``made``: there was no such file."""

    node: Node
    made: bool


@contextlib.asynccontextmanager
async def new_file(graph: Graph, path: str, shown: str) -> AsyncIterator[NewFile]:
    """An empty file to be filled; ``shown`` is its name in messages."""
    workers = graph.environment.workers
    try:
        made = await workers.run(_make, path)
    except OSError as error:
        raise BlockError.from_os_error(f"Could not create '{shown}'", error) from error
    try:
        options = {"driver": "file", "filename": path}
        file = await graph.open(parse(BlockdevOptions, options), monitor_owned=False)
        try:
            user = await graph.attach(file, _USED, Permission.CONSISTENT_READ, user="a new image")
        except BaseException:
            await graph.unref(file)
            raise
        try:
            if not made:
                await workers.run(_check_alone, shown, file, _open_files(graph))
            try:
                await file.truncate(0)
            except OSError as error:
                raise BlockError.from_os_error(f"Could not create '{shown}'", error) from error
            yield NewFile(file, made)
        finally:
            await graph.detach(user)
        await workers.run(sync_directory, path)
    except BaseException:
        if made:
            await to_its_end(remove_file(graph, path))
        raise


async def remove_file(graph: Graph, path: str) -> None:
    """Remove a file that was made; it is no error that it is gone."""
    with contextlib.suppress(OSError):
        await graph.environment.workers.run(os.unlink, path)


def _open_files(graph: Graph) -> list[tuple[Node, int]]:
    protocols = [n for n in graph.nodes.values() if n.opened and not n.driver_class.is_format]
    return [(node, host.fd) for node in protocols if (host := node.driver.host_file()) is not None]


def _check_alone(shown: str, new: Node, files: list[tuple[Node, int]]) -> None:
    """On a worker. Locks can be off, or not to be had; an image in use is in use all the same."""
    own = next(os.fstat(fd) for node, fd in files if node is new)
    for node, fd in files:
        if node is not new and os.path.samestat(os.fstat(fd), own):
            raise BlockError(
                f"Could not create '{shown}': the file is in use as node '{node.name}'", errno=16
            )


def _make(path: str) -> bool:
    """On a worker: see that there is a file; True if there was none."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        os.close(os.open(path, flags))
        return False
    os.close(fd)
    return True


def sync_directory(path: str) -> None:
    """On a worker: make the name of a new file durable."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
