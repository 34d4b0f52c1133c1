"""Active and inactive nodes: an image is handed to another process, and taken back.

Specification: qapi/block-core.json (blockdev-set-active, ``active`` of blockdev-add). While a node
is inactive nothing is written to its image and no lock keeps others from writing; what is read may
be old. It becomes inactive after everything is durable, and active by opening its image anew. A
child is active as long as a parent is.

Runs on the event loop, under the graph's lock, with the nodes drained. Invariants:

* All of the nodes that a call is about change, or none: what fails is taken back.
* Nothing is written on account of a node before its locks are held again.
* A bitmap that is not stored in the image cannot know what another process wrote: it says
  afterwards that everything was. Those in the image are read from it again.

Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from errno import EPERM

from liveblockd.errors import BlockError
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph, parents_first
from liveblockd.graph.node import Node
from liveblockd.graph.opening import open_driver
from liveblockd.runtime.unbroken import to_its_end

log = logging.getLogger(__name__)


async def set_active(graph: Graph, node: Node | None, active: bool) -> None:
    """blockdev-set-active; without ``node`` for all of them."""
    if active:
        await activate(graph, *(graph.nodes.values() if node is None else (node,)))
    elif node is not None:
        await inactivate(graph, node)
    else:
        async with graph.lock:
            await _inactivate(graph, graph.nodes.values(), "Failed to inactivate all nodes")


async def inactivate(graph: Graph, node: Node) -> None:
    """``node``, and what is below it and not in use by another active node."""
    async with graph.lock:
        if any(isinstance(e.parent, Node) and e.parent.active for e in node.parents):
            raise BlockError("Node has active parent node", errno=EPERM)
        await _inactivate(graph, (node,), "Failed to inactivate node")


async def activate(graph: Graph, *nodes: Node) -> None:
    """The nodes and all below them."""
    async with graph.lock:
        resting = [node for node in reversed(parents_first(nodes)) if not node.active]
        if resting:
            async with graph.drained(*resting):
                await to_its_end(_activate(graph, resting))


async def _inactivate(graph: Graph, roots: Iterable[Node], failure: str) -> None:
    chosen: dict[Node, None] = {}
    for node in parents_first(roots):
        above = [edge.parent for edge in node.parents if isinstance(edge.parent, Node)]
        if node.active and all(not parent.active or parent in chosen for parent in above):
            _check_may_rest(node, failure)
            chosen[node] = None
    if not chosen:
        return
    async with graph.drained(*chosen):
        await to_its_end(_write_back_and_rest(graph, list(chosen), failure))


def _check_may_rest(node: Node, failure: str) -> None:
    """No job is at it, and nobody needs to write to it."""
    users = [edge.parent for edge in node.parents if isinstance(edge.parent, Backend)]
    if node.job_filter or node.op_blockers or not all(user.may_rest for user in users):
        raise BlockError(f"{failure}: Operation not permitted", errno=EPERM)
    for bitmap in node.bitmaps:
        if bitmap.persistent:
            bitmap.check(allow_inconsistent=True)


async def _write_back_and_rest(graph: Graph, chosen: Sequence[Node], failure: str) -> None:
    done: list[Node] = []
    try:
        for node in chosen:  # what a parent writes goes through its children
            done.append(node)
            await _write_back(node)
    except (OSError, BlockError) as error:
        for node in reversed(done):
            await _write_again(node)
        if isinstance(error, OSError):
            raise BlockError.from_os_error(failure, error) from error
        raise BlockError(f"{failure}: {error.message}", errno=error.errno) from error
    await _rest(graph, chosen)


async def _write_back(node: Node) -> None:
    """All is durable, and the driver writes nothing any more."""
    if node.read_only:
        return
    await node.driver.flush()
    if node.children:
        await node.driver.set_read_only(True)


async def _write_again(node: Node) -> None:
    """Undo ``_write_back``: the locks were held all the time."""
    try:
        if node.driver.read_only is not node.read_only:
            await node.driver.set_read_only(node.read_only)
    except (OSError, BlockError) as error:  # writes to it fail, which its users are told
        log.error("node %s stays read-only: %s", node.name, error)


async def _rest(graph: Graph, chosen: Sequence[Node]) -> None:
    for node in chosen:
        node.active = False
        node.driver.inactive = True
        for edge in node.parents:
            if isinstance(edge.parent, Backend):
                edge.parent.rest()
        for bitmap in [bitmap for bitmap in node.bitmaps if bitmap.persistent]:
            node.remove_bitmap(bitmap)
    await graph.refresh_permissions(*chosen)  # less than before, which does not fail
    for node in chosen:
        graph.rebind_above(node)


async def _activate(graph: Graph, resting: Sequence[Node]) -> None:
    """``resting``: children first."""
    woken: list[Node] = []
    try:
        for node in resting:
            woken.append(node)
            node.active = True
            # Before anything is written on its account, the locks of the files below it.
            await graph.refresh_permissions(node)
            await _open_again(graph, node)
        for user in _users(resting):
            if user.suspended is not None:
                user.claim(*user.suspended)
        await graph.refresh_permissions(*resting)
    except BaseException as error:
        await _back_to_rest(graph, woken[::-1])
        if isinstance(error, OSError):
            raise BlockError.from_os_error("Could not activate node", error) from error
        raise
    for node in resting:
        for bitmap in node.bitmaps:
            if not bitmap.persistent:
                bitmap.resize(node.length)
                bitmap.record(0, node.length)
        graph.rebind_above(node)


def _users(nodes: Iterable[Node]) -> list[Backend]:
    return [e.parent for node in nodes for e in node.parents if isinstance(e.parent, Backend)]


async def _back_to_rest(graph: Graph, woken: Sequence[Node]) -> None:
    for node in woken:
        try:
            await _write_back(node)
        except (OSError, BlockError) as error:  # nobody has written to it since it was opened
            log.warning("node %s: %s", node.name, error)
    await _rest(graph, woken)


async def _open_again(graph: Graph, node: Node) -> None:
    """Know of the image what it is now. BlockError, OSError: the old driver is there yet."""
    old = node.driver
    if not node.driver_class.is_format:
        await old.activate()
        await old.set_read_only(node.read_only)
        old.inactive = False
        return
    new = await open_driver(graph, node)
    stored = new.stored_bitmaps()
    known = {bitmap.name for bitmap in node.bitmaps}
    if taken := [bitmap.name for bitmap in stored if bitmap.name in known]:
        new.bitmap_source = lambda: stored  # they stay as they were found
        await new.close()
        raise BlockError(f"Bitmap already exists: {taken[0]}")
    node.bind(new)
    old.restructured()
    await old.close()
