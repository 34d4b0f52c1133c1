"""Several changes of the graph at one instant: all of them, or none.

Specification: qapi/transaction.json. An ``Action`` goes through ``prepare`` (it takes effect, and
the next one sees that), ``seal`` (the last step that may fail) and ``commit``. When one fails, all
that were begun are undone, the last one first. All of it happens while no request of any user of
the nodes concerned is in flight, so that what is kept of several disks is of one moment.

Overlays that the first actions need are created and opened before that, and images are flushed, for
that takes longest.

Runs on the event loop, in a task of its own: who asked for it may go away, it comes to its end.
Errors: BlockError, OSError of the action that failed; ``undo`` and ``commit`` raise nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack

from liveblockd.errors import BlockError
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.graph.surgery import flush_ahead
from liveblockd.runtime.unbroken import to_its_end

log = logging.getLogger(__name__)


class Action:
    """One of the changes; the lock of the graph is held whenever it is called."""

    #: it went ahead, and an action before it failed: set before ``undo``
    too_early = False
    #: it makes its nodes durable: most of that is done before requests have to wait
    flushes = False

    def names(self) -> Iterable[str]:
        """The nodes and drives whose users have to stand still; unknown ones are left out."""
        return ()

    def may_go_ahead(self) -> bool:
        """Whether ``go_ahead`` has anything to do."""
        return False

    async def go_ahead(self) -> None:
        """What nobody notices, done while the guests go on; only of the first actions."""

    async def prepare(self) -> None:
        """Take effect, so that ``undo`` can take it back. Raises BlockError, OSError."""
        raise NotImplementedError

    async def seal(self) -> None:
        """What can hardly be undone; all actions are prepared. Raises BlockError, OSError."""

    async def commit(self) -> None:
        """All went well. Must not fail."""

    async def undo(self) -> None:
        """Take back what was done, however far it came. Must not fail."""

    async def finish(self) -> None:
        """Called last, after either; the requests go on, the lock is no longer held."""


async def perform(graph: Graph, actions: Sequence[Action]) -> None:
    """Do all of them or none. Raises what the one that failed raised."""
    await to_its_end(_perform(graph, actions))


async def _perform(graph: Graph, actions: Sequence[Action]) -> None:
    begun: list[Action] = []
    try:
        async with graph.lock, AsyncExitStack() as stack:
            try:
                await _go_ahead(graph, actions, begun)
                await flush_ahead(_nodes(graph, [a for a in actions if a.flushes]))
                await stack.enter_async_context(graph.drained(*_nodes(graph, actions)))
                await _prepare(actions, begun)
                for action in actions:
                    await action.seal()
            except BaseException:
                await _undo(begun)
                raise
            for action in actions:
                await _guarded(action.commit(), "ended")
    finally:
        for action in begun:
            await _guarded(action.finish(), "finished")


async def _prepare(actions: Sequence[Action], begun: list[Action]) -> None:
    for number, action in enumerate(actions):
        if number == len(begun):
            begun.append(action)
        try:
            await action.prepare()
        except BaseException:
            for later in begun[number + 1 :]:
                later.too_early = True
            raise


async def _go_ahead(graph: Graph, actions: Sequence[Action], begun: list[Action]) -> None:
    """The first actions, as long as none of them is about what another one changes."""
    untouched = set(graph.nodes.values())
    for action in actions:
        nodes = _nodes(graph, [action])
        if not action.may_go_ahead() or not untouched.issuperset(nodes):
            return
        untouched.difference_update(nodes)
        begun.append(action)
        await action.go_ahead()


def _nodes(graph: Graph, actions: Iterable[Action]) -> list[Node]:
    found: dict[Node, None] = {}
    for action in actions:
        for name in action.names():
            try:
                found[graph.lookup_any(name)] = None
            except BlockError:
                continue
    return list(found)


async def _undo(begun: Sequence[Action]) -> None:
    for action in reversed(begun):
        await _guarded(action.undo(), "undone")


async def _guarded(step: object, what: str) -> None:
    try:
        await step  # type: ignore[misc]
    except Exception:
        log.exception("an action of a transaction could not be %s", what)
