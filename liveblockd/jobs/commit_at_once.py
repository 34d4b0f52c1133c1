"""The commit of the human monitor: what an image in use holds goes into its backing image, at once.

Specification: QEMU's manual, ``commit``. Runs on the event loop; the guest waits until it is done,
which is why ``block-commit`` is what everybody should use.

Invariants: the base is durable before anything is taken from the image; what fails
before leaves the disk as it reads. Bitmaps of the base record what it is given.
Errors: BlockError with an errno; OSError.
"""

from __future__ import annotations

from errno import EACCES, ENOTSUP
from os import strerror
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.backend import Backend
from liveblockd.graph.filter import CommitTop
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node, Operation
from liveblockd.jobs.commit_hold import CommitHold
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.driver import ExtentKind

#: what is read and written at a time; bytes
_CHUNK: Final = 2 << 20


async def commit(graph: Graph, node: Node) -> None:
    """Write what ``node`` holds into its backing image, then empty it.

    A client that vanishes meanwhile does not cut it short: what was taken is given back at its end.
    """
    await to_its_end(_commit(graph, node))


async def _commit(graph: Graph, node: Node) -> None:
    async with graph.lock:
        base = chain.layer_below(node)
        if base is None:
            raise BlockError(strerror(ENOTSUP), errno=ENOTSUP)
        if node.read_only:
            raise BlockError(strerror(EACCES), errno=EACCES)
        node.check_operation(Operation.COMMIT_SOURCE)
        base.check_operation(Operation.COMMIT_TARGET)
        hold = CommitHold(graph, "commit", node, base)
        async with graph.drained(node):
            try:
                await hold.base_open.open()
                await hold.cover(None, CommitTop)
                await hold.take_links()
                await _fill(graph, node, base, await hold.stand_on_base())
                await node.driver.make_empty()
            finally:
                await hold.let_go()
                await hold.uncover()
                await hold.base_open.close()
                await hold.unblock()


async def _fill(graph: Graph, node: Node, base: Node, writer: Backend) -> None:
    await graph.grow(base, node.length)
    offset = 0
    while offset < node.length:
        for extent in await node.map(offset, node.length - offset):
            if extent.kind is ExtentKind.ZERO:
                await writer.write_zeroes(offset, extent.length, may_unmap=True)
            elif extent.kind is not ExtentKind.UNALLOCATED:
                await _copy(node, writer, offset, extent.length)
            offset += extent.length
    await writer.flush()


async def _copy(node: Node, writer: Backend, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        data = await node.read(offset, min(_CHUNK, end - offset))
        await writer.write(offset, data)
        offset += len(data)
