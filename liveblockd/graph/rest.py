"""The lock of the graph, taken at a moment when no guest's request hangs.

What a job took of the graph is given back while the requests above stand still. A drain that began
while one of them hangs would hold up all the others of those guests, and the lock, for as long. So
who is in no hurry waits before that, while guests go on.

Runs on the event loop. Nothing is promised of what hangs later. Raises nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from liveblockd.graph.graph import Graph, parents_first
from liveblockd.graph.node import Node

#: seconds without an answer after which a server is said to hang
HANGS: Final = 1.0
#: seconds for which guests may have to wait for a drain that is tried: the first, and the longest
TRY: Final = (1.0, 30.0)
#: how many times longer is waited until the next one
PAUSE: Final = 3
#: seconds between two looks, which cost nothing
AGAIN: Final = 0.1


def hangs(graph: Graph, *nodes: Node) -> bool:
    """Whether a server that a user of ``nodes`` may have asked does not answer."""
    roots = [backend.node for node in nodes for backend in graph.users_above(node)]
    return any(n.opened and n.driver.silence() >= HANGS for n in parents_first(roots))


@asynccontextmanager
async def lock_at_rest(graph: Graph, *nodes: Node) -> AsyncIterator[None]:
    """``graph.lock``, when the requests of all users above ``nodes`` have just come to an end."""
    patience, longest = TRY
    while True:
        while hangs(graph, *nodes):  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(AGAIN)
        async with graph.lock:
            try:
                async with asyncio.timeout(patience), graph.drained(*nodes):
                    pass
            except TimeoutError:
                pass
            else:
                yield
                return
        if not hangs(graph, *nodes):  # a disk of this machine, which says no more than that
            await asyncio.sleep(PAUSE * patience)
            patience = min(2 * patience, longest)
