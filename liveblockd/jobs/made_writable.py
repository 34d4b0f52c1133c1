"""An image that a job writes to though it is read-only: the base of a commit, the top of a stream.

Specification: QEMU's jobs reopen such nodes for their time. Runs on the event loop; the graph lock
is held by the caller of everything but ``close_left``.

Invariants: what was read-only is so again, flushed, when the job is gone, unless another job has
taken it over before, or guests write to it by then (``keep``). Each call is harmless twice.

Errors: BlockError and OSError from ``open``; an image that cannot be flushed stays writable, with a
line in the log.
"""

from __future__ import annotations

import logging

from liveblockd.errors import BlockError
from liveblockd.graph import permissions, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.graph.rest import lock_at_rest

log = logging.getLogger(__name__)


class MadeWritable:
    """``node``, of the job that ``name`` says in messages."""

    def __init__(self, graph: Graph, node: Node, name: str) -> None:
        self.graph = graph
        self.node = node
        self._name = name
        self._ours = False
        self._left = False

    async def open(self) -> None:
        """Make it writable, if it is not, or is so only until the end of another job."""
        if (keep := self.graph.going_read_only.pop(self.node, None)) is not None:
            keep()
            self._ours = True
        if self.node.read_only:
            await self.graph.set_read_only(self.node, False)
            self._ours = True

    def keep(self) -> None:
        """It stays writable: others need that."""
        self._ours = self._left = False

    def leave(self) -> None:
        """It is for ``close_left`` to close, unless another job wants it before."""
        if self._ours:
            self._left = True
            self.graph.going_read_only[self.node] = self.keep

    async def close(self, *, durable: bool = False) -> None:
        """Make it read-only again, if it was and is not left; ``durable``: need not be flushed."""
        if self._ours and not self._left:
            self._ours = False
            try:
                await self.graph.set_read_only(self.node, True, durable=durable)
            except (BlockError, OSError) as error:
                log.warning("%s: '%s' stays writable: %s", self._name, self.node.name, error)

    async def close_left(self) -> None:
        """``close`` what was left, by who does not hold the lock.

        Before it takes that all is made durable: while other jobs write that takes long. If nobody
        could write meanwhile, no guest waits for another flush, nor does who waits for the lock.
        """
        if not self._left:
            return
        before = self._unused()
        flushed = await surgery.flush_ahead([self.node], for_good=True)
        async with lock_at_rest(self.graph, self.node):
            if self._left:
                del self.graph.going_read_only[self.node]
                self._left = False
                if self.graph.nodes.get(self.node.name) is self.node:
                    unused = before is not None and before == self._unused()
                    await self.close(durable=flushed and unused)

    def _unused(self) -> int | None:
        """A number that is the same as long as nobody may write to the image; None: somebody may.

        Of an image with metadata, whose file nobody else may write to.
        """
        node = self.node
        if not permissions.is_storage(node) or node.permissions[0] & permissions.WRITES:
            return None
        return node.grants
