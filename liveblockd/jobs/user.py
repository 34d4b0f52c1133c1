"""A job's place in the graph: above the node that it changes, reading the nodes below that.

Runs on the event loop. Invariant: whatever the job has under way on its nodes is in flight here, so
that a drain of any of them waits for it, and none begins while they are quiesced.

Errors: BlockError from ``attach`` when another user's permissions conflict; those of the requests.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.storage.driver import Buffer, Permission

T = TypeVar("T")


class JobUser(Backend):
    """The user that stands for a job."""

    @classmethod
    async def attach(
        cls,
        graph: Graph,
        node: Node,
        used: Permission,
        shared: Permission,
        *,
        role: str = "root",
        user: str | None = None,
    ) -> Self:
        """Stand on ``node``; end it by ``graph.detach``. The graph lock is held.

        ``role`` and ``user`` are for messages, as QEMU has them.
        """
        await graph.reopen_for(node, used)
        found = cls(graph, node, user=user)
        found.edge.role = role
        found.claim(used, shared)
        graph.connect(found.edge)
        try:
            await graph.refresh_permissions(node)
        except BaseException:
            graph.disconnect(found.edge)
            raise
        found.rebind()
        graph.backends.append(found)
        return found

    async def run(self, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Make and await a request to any node below, once nothing is quiesced."""
        await self._enter("rd", 0, 0)
        return await self._counted(request())

    @property
    def quiesced(self) -> bool:
        """Whether requests have to wait now."""
        return self._quiesced > 0

    @staticmethod
    async def run_on_both(
        one: JobUser, other: JobUser, request: Callable[[], Coroutine[Any, Any, T]]
    ) -> T:
        """As ``run``, in flight on two nodes; it begins when neither is quiesced.

        Who waits for one while it counts for the other would hang a drain of both.
        """
        while True:
            await one._enter("rd", 0, 0)
            await other._enter("rd", 0, 0)
            if not one._quiesced:
                return await one._counted(other._counted(request()))

    async def run_now(self, request: Coroutine[Any, Any, T]) -> T:
        """Await a request that begins although its node may be quiesced: its cause is in flight."""
        return await self._counted(request)

    async def store(self, offset: int, data: Buffer) -> None:
        """Write, looking for zeros if the node is to; for use in one of the above."""
        await self._store(offset, data, False)

    async def store_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zeros; for use in one of the above."""
        await self._store_zeroes(offset, length, may_unmap, False, False)
