"""Another size for a disk, with the space that its new part will need.

Specification: qapi/block-core.json, PreallocMode. Runs on: the event loop; ``falloc`` on a worker.

Invariants: no request is in flight while it lasts; what fails or is cancelled leaves the old size,
or, where that cannot be written either (a quota of a file system that writes anew what changes),
the new one, with a line in the log. Nothing that the disk had is touched.
Errors: ``BlockError`` in QEMU's words, before anything is done or from the node; OSError (ENOSPC).
"""

from __future__ import annotations

import logging
import os
from errno import ENOTSUP
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.preallocate import Preallocation
from liveblockd.graph import chain
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.runtime.unbroken import to_its_end

log = logging.getLogger(__name__)

#: bytes written at a time
_PIECE: Final = 1 << 20


async def resize(graph: Graph, node: Node, size: int, mode: Preallocation) -> None:
    """Make the disk ``size`` bytes long; what is new is allocated as ``mode`` says. Durable."""
    if mode is Preallocation.OFF:
        await graph.resize(node, size)
        return
    async with graph.lock:
        old_size = node.driver.virtual_size
        image = chain.skip_filters(node)
        assert image is not None, "a filter has a child"
        _check(image, mode, shrinks=size < old_size)
        async with graph.drained(node):
            await graph.resize(node, size)
            try:
                await to_its_end(_take_space(graph, image, mode, old_size, size - old_size))
            except BaseException:
                await to_its_end(_go_back(node, old_size))
                raise


def _check(image: Node, mode: Preallocation, *, shrinks: bool) -> None:
    if isinstance(image.driver, Qcow2):
        if shrinks:
            raise BlockError("Preallocation can't be used for shrinking an image", errno=ENOTSUP)
        return
    if mode is Preallocation.METADATA:
        raise BlockError("Unsupported preallocation mode: metadata", errno=ENOTSUP)
    if shrinks:
        raise BlockError("Cannot use preallocation for shrinking files", errno=ENOTSUP)


async def _take_space(
    graph: Graph, image: Node, mode: Preallocation, offset: int, length: int
) -> None:
    if not length:
        return
    driver = image.driver
    if isinstance(driver, Qcow2):
        await driver.preallocate(mode, offset, length)
        return
    host = image.host_file()
    if mode is Preallocation.FALLOC and host is not None:
        await graph.environment.workers.run(os.posix_fallocate, host.fd, offset, length)
    else:
        zeros = memoryview(bytes(min(_PIECE, length)))
        for start in range(offset, offset + length, _PIECE):
            await image.write(start, zeros[: offset + length - start])
    await image.flush()


async def _go_back(node: Node, size: int) -> None:
    """Not by ``Graph.resize``: this task is another one than that which has the lock."""
    try:
        await node.truncate(size)
    except (OSError, BlockError) as error:
        log.warning("%s keeps its new size, not all of it allocated: %s", node.name, error)
