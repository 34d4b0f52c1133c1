"""Changes of the graph under running users: overlays, backing links, filters.

Specification: QEMU's docs/interop/live-block-operations; the messages are those of its block layer.

Runs on the event loop; each function takes the graph's lock and drains what it changes. Invariants:
the switch itself has no await, so that no request ever sees half of it; whatever fails before it
(permissions, locks, a flush) leaves the graph as it was.

Errors: BlockError in QEMU's words; OSError from a flush.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from liveblockd.errors import BlockError
from liveblockd.graph import chain, filenames
from liveblockd.graph.activation import inactivate
from liveblockd.graph.backend import Backend
from liveblockd.graph.filter import CopyOnRead, JobFilter
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node
from liveblockd.graph.opening import check_depth
from liveblockd.graph.permissions import InactiveChildError, check_active_child
from liveblockd.storage.driver import BlockDriver
from liveblockd.storage.options import BlockdevDiscardOptions, BlockdevOptions


def check_no_cycle(parent: Node, child: Node, role: str = "backing") -> None:
    """BlockError if ``parent`` is ``child`` or hangs below it."""
    pending, seen = [child], {child}
    while pending:
        node = pending.pop()
        if node is parent:
            raise BlockError(
                f"Making '{child.name}' a {role} child of '{parent.name}' would create a cycle"
            )
        for edge in node.children.values():
            if edge.child not in seen:
                seen.add(edge.child)
                pending.append(edge.child)


def check_link(parent: Node, child: Node, role: str = "backing") -> None:
    """BlockError if ``child`` cannot be the ``role`` of ``parent``."""
    check_no_cycle(parent, child, role)
    check_active_child(child, role, parent)


class PlacedOverlay:
    """An overlay that was put above ``node``, as long as that can be taken back.

    The caller holds the graph's lock, and has drained both, from ``place_overlay`` to the end.
    """

    def __init__(self, graph: Graph, node: Node, overlay: Node) -> None:
        self._graph = graph
        self.node = node
        self.overlay = overlay
        self._moved = list(node.parents)
        self._link = Edge(overlay, "backing", node)
        self._sealed = False

    async def place(self) -> None:
        """The switch; BlockError for a conflict of permissions, then nothing has changed."""
        graph = self._graph
        _move(graph, self._moved, self.overlay)
        graph.connect(self._link)
        try:
            await graph.refresh_permissions(self.overlay)
        except BaseException:
            await self.undo()
            raise

    async def seal(self) -> None:
        """Make the old image read-only, flushed; what fails has not done so."""
        if not self.node.read_only:
            await self._graph.set_read_only(self.node, True)
            self._sealed = True

    def announce(self) -> None:
        """Tell the users that they stand on the overlay."""
        self._graph.rebind_above(self.overlay)

    async def undo(self) -> None:
        """All is as it was before ``place``."""
        graph = self._graph
        if self._sealed:
            # While the overlay shields it: its users may write as soon as they are back.
            await graph.set_read_only(self.node, False)
            self._sealed = False
        graph.disconnect(self._link)
        _move(graph, self._moved, self.node)
        await graph.refresh_permissions(self.node, self.overlay)
        graph.rebind_above(self.node)


async def place_overlay(graph: Graph, node: Node, overlay: Node) -> PlacedOverlay:
    """Make ``node`` the backing node of ``overlay``, and put all who use ``node`` on the overlay.

    All that was written to ``node`` is durable on return; BlockError, OSError: nothing changed.
    """
    if not overlay.supports_backing:
        raise BlockError("The overlay does not support backing images")
    check_no_cycle(overlay, node)
    if overlay.backing is not None:
        raise BlockError("The overlay already has a backing image")
    check_depth(overlay, node)
    if overlay.length < node.length:
        _check_no_users_beyond(node, overlay)
    for edge in node.parents:
        edge.check_movable()
    if node.active and node.parents and not overlay.active:
        raise BlockError("Block node is read-only", errno=1)
    if overlay.active and not node.active:
        await inactivate(graph, overlay)
    async with graph.drained(node, overlay):
        # Nothing is in flight. What guests wrote is made durable while it can still fail.
        await node.driver.flush()
        placed = PlacedOverlay(graph, node, overlay)
        await placed.place()
    return placed


async def append_overlay(graph: Graph, node: Node, overlay: Node) -> None:
    """``place_overlay`` for good.

    All that was written to ``node`` is durable, and it is read-only, when this returns.
    """
    async with graph.lock:
        await flush_ahead([node])
        async with graph.drained(node, overlay):
            placed = await place_overlay(graph, node, overlay)
            try:
                await placed.seal()
            except BaseException:
                await placed.undo()
                raise
            placed.announce()


async def flush_ahead(nodes: Iterable[Node], *, for_good: bool = False) -> bool:
    """Make durable what there is while requests go on, so that they wait for little of it later.

    All nodes at the same time; one that cannot be flushed says so again when it counts. Those that
    are to be closed, or read-only, ``for_good`` have more to write: a flush frees clusters, whose
    refcounts the next one writes. Returns whether none failed.
    """
    failed = False
    writable = [node for node in nodes if node.opened and not node.read_only]
    for _ in range(2 if for_good else 1):
        work = [node.driver.flush() for node in writable]
        failed |= any(await asyncio.gather(*work, return_exceptions=True))
    return not failed


def _check_no_users_beyond(node: Node, overlay: Node) -> None:
    if any(isinstance(edge.parent, Backend) for edge in node.parents):
        raise BlockError(
            f"The overlay '{overlay.name}' is smaller ({overlay.length} bytes) than "
            f"'{node.name}' ({node.length} bytes), which is in use"
        )


def _move(graph: Graph, edges: Iterable[Edge], node: Node) -> None:
    for edge in edges:
        graph.redirect(edge, node)


async def replace_backing(graph: Graph, node: Node, backing: Node | None) -> None:
    """Put ``backing`` (or nothing) below ``node``; what hung there goes if nobody uses it.

    The header of the image is the caller's business, and it comes first.
    """
    async with graph.lock:
        old = node.children.get("backing")
        if old is None and backing is None:
            return
        if old is not None:
            if old.child is backing:
                _note_backing(node)
                return
            old.check_not_frozen()
        if backing is not None:
            check_link(node, backing)
            check_depth(node, backing)
        was = None if old is None else old.child
        async with graph.drained(node):
            if old is not None:
                graph.disconnect(old)
            new = None
            try:
                if backing is not None:
                    new = Edge(node, "backing", backing)
                    graph.connect(new)
                await graph.refresh_permissions(node)
            except BaseException:
                if new is not None:
                    graph.disconnect(new)
                if old is not None:
                    graph.connect(old)
                await graph.refresh_permissions(node)
                raise
        _note_backing(node)
        if was is not None:
            if was.used:
                await graph.refresh_permissions(was)
            await graph.unref(was)


async def replace_file(graph: Graph, node: Node, child: Node) -> None:
    """Let ``node`` stand on ``child``, which reads as what it stands on now, filters apart.

    BlockError for a frozen link or permissions: then nothing has changed. The caller sees to what
    nobody uses any more.
    """
    async with graph.lock:
        edge = node.children["file"]
        old = edge.child
        if old is child:
            return
        edge.check_not_frozen()
        check_link(node, child, "file")
        async with graph.drained(node, child):
            await node.driver.flush()
            graph.redirect(edge, child)
            try:
                await graph.refresh_permissions(node, old)
            except BaseException:
                graph.redirect(edge, old)
                await graph.refresh_permissions(node, child)
                raise
        graph.rebind_above(node)


def _note_backing(node: Node) -> None:
    """If the header leads to the backing node by another spelling, that is no override."""
    written, backing = node.driver.backing_file, node.backing
    node.implied_backing = None
    if not written or backing is None:
        return
    shown = filenames.exact_filename(backing)
    if shown is None or filenames.has_protocol(shown):
        return
    try:
        leads_to = filenames.full_backing_filename(node, written)
    except BlockError:
        return
    if os.path.realpath(leads_to) == os.path.realpath(shown):
        node.implied_backing = (written, backing.filename)


async def insert_filter(
    graph: Graph,
    node: Node,
    name: str | None = None,
    *,
    keep: Iterable[Edge] = (),
    kind: type[JobFilter] = CopyOnRead,
    read_only: bool | None = None,
) -> Node:
    """Put a pass-through node of ``kind`` above ``node``, below all its users but ``keep``.

    BlockError for a name that cannot be used, or a frozen link.
    """
    return await insert_driver(
        graph,
        node,
        lambda child: kind(child, read_only=node.read_only if read_only is None else read_only),
        name,
        keep=keep,
    )


async def insert_driver(
    graph: Graph,
    node: Node,
    make: Callable[[Node], BlockDriver],
    name: str | None = None,
    *,
    beside: Mapping[str, Node] = MappingProxyType({}),
    keep: Iterable[Edge] = (),
) -> Node:
    """Put a filter of a job above ``node``, below all its users but ``keep`` and ``beside``.

    ``make`` gets ``node``; ``beside`` are further children by role. No request of any user of
    theirs is in flight when it comes to stand there. BlockError for a name that cannot be used, a
    frozen link, or permissions; then all is as it was.
    """
    async with graph.lock:
        implicit = name is None
        if name is None:
            name = graph.generate_name()
        else:
            graph.check_new_name(name)
        staying = set(keep)
        # A target may stand on the node: on the filter it would stand on itself.
        below = set[object]().union(*map(_below, beside.values()))
        moving = [e for e in node.parents if e not in staying and e.parent not in below]
        for edge in moving:
            edge.check_movable()
        driver = make(node)
        children = {driver.filtered: node, **beside}
        above = _job_filter(driver, name, node)
        above.implicit = implicit
        for role, child in children.items():
            shown = driver.link if isinstance(driver, JobFilter) else role
            check_active_child(child, shown, above)
        async with graph.drained(*children.values()):
            graph.nodes[name] = above
            _move(graph, moving, above)
            links = [Edge(above, role, child) for role, child in children.items()]
            for link in links:
                graph.connect(link)
            try:
                await graph.refresh_permissions(above)
            except BaseException:
                for link in links:
                    graph.disconnect(link)
                _move(graph, moving, node)
                del graph.nodes[name]
                await graph.refresh_permissions(*children.values())
                raise
        return above


def _job_filter(driver: BlockDriver, name: str, node: Node) -> Node:
    options = BlockdevOptions.model_construct(
        {"driver", "node_name"}, driver=driver.driver_name, node_name=name
    )
    above = Node(name, type(driver), options, read_only=driver.read_only)
    above.change_options(
        discard=BlockdevDiscardOptions.UNMAP,
        cache=node.options.cache,
        detect_zeroes=node.options.detect_zeroes,
    )
    above.job_filter = True
    above.bind(driver)
    return above


@contextmanager
def replacing() -> Iterator[None]:
    """A context that says of a BlockError, as QEMU does, that a filter could not be put in."""
    try:
        yield
    except BlockError as error:
        what = "create" if isinstance(error, InactiveChildError) else "replace"
        message = f"Could not {what} node: {error.message}"
        raise BlockError(message, error_class=error.error_class, errno=error.errno) from error


async def remove_filter(graph: Graph, above: Node) -> None:
    """Take a filter out: its users stand on what it filtered. Twice is harmless."""
    async with graph.lock:
        if graph.nodes.get(above.name) is not above:
            return
        node = above.file
        assert node is not None and above.is_filter
        async with graph.drained(above):
            moving = list(above.parents)
            links = list(above.children.values())
            for link in links:
                graph.disconnect(link)
            _move(graph, moving, node)
            del graph.nodes[above.name]
            await graph.refresh_permissions(*(link.child for link in links))
        for link in links:
            await graph.unref(link.child)


async def replace_nodes(
    graph: Graph, nodes: Iterable[Node], other: Node, *, keep: Iterable[Edge] = ()
) -> list[tuple[Edge, Node]]:
    """Put all who use ``nodes``, but ``keep``, on ``other``; BlockError, and nothing changed.

    Returns what was moved, and where it was, for ``put_back``.

    What hangs below ``other`` itself stays. The caller has drained all of them and sees to it that
    they read the same, and calls ``unref`` for what is left over.
    """
    async with graph.lock:
        nodes = tuple(nodes)
        staying = set(keep)
        below = _below(other)
        moving = [
            (edge, node)
            for node in nodes
            for edge in node.parents
            if edge not in staying and edge.parent not in below
        ]
        for edge, _ in moving:
            edge.check_movable()
        _move(graph, (edge for edge, _ in moving), other)
        try:
            await graph.refresh_permissions(other, *nodes)
        except BaseException:
            await put_back(graph, moving, other)
            raise
        return moving


async def put_back(graph: Graph, moved: Iterable[tuple[Edge, Node]], other: Node) -> None:
    """Undo ``replace_nodes``; still drained."""
    moved = tuple(moved)
    for edge, node in moved:
        graph.redirect(edge, node)
    await graph.refresh_permissions(other, *dict.fromkeys(node for _, node in moved))


def _below(node: Node) -> set[object]:
    """``node`` and all that it stands on."""
    found: set[object] = {node}
    pending = [node]
    while pending:
        for edge in pending.pop().children.values():
            if edge.child not in found:
                found.add(edge.child)
                pending.append(edge.child)
    return found


async def drop_intermediate(graph: Graph, above: Node, base: Node) -> None:
    """Put all who use the filter ``above`` on ``base``, which is below it and reads the same.

    The headers of the overlays are the caller's business, and they come first. The layers in
    between stay open as long as somebody uses them. BlockError for a frozen link.
    """
    async with graph.lock:
        link = above.children[above.driver_class.filtered]
        overlays = chain.overlays(above)
        moving = list(above.parents)
        for edge in moving:
            edge.check_movable()
        async with graph.drained(above, base):
            graph.disconnect(link)
            _move(graph, moving, base)
            try:
                await graph.refresh_permissions(base, link.child)
            except BaseException:
                _move(graph, moving, above)
                graph.connect(link)
                await graph.refresh_permissions(above)
                raise
            del graph.nodes[above.name]
        for overlay in overlays:
            _note_backing(overlay)
        graph.rebind_above(base)
        await graph.unref(link.child)


def layers_between(top: Node, base: Node | None) -> list[Node]:
    """The layers strictly between ``top`` and ``base`` (None: to the end), from the top down."""
    stop = chain.skip_filters(base)
    found = []
    for layer in chain.chain(top)[1:]:
        if layer is stop:
            break
        found.append(layer)
    return found
