"""blockdev-reopen: new options for nodes in use, all of them or none.

Specification: qapi/block-core.json (blockdev-reopen). Changed can be read-only, the backing node,
discard and detect-zeroes of format nodes, what a driver says is ``changeable``, and the ``file``
where the new one leads to the same bytes (a filter more or less); any other difference is refused,
since it would need the image to be opened again under its users.

Runs on the event loop. Invariant: on an error every node is as it was; a node that is put aside
stays open until the whole set has succeeded.

Errors: BlockError in QEMU's words; OSError from a flush.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node
from liveblockd.qapi import members, to_qmp
from liveblockd.storage.options import BlockdevDetectZeroesOptions, BlockdevOptions

_HOLD: Final = "block device is being reopened"
_CHANGEABLE: Final = frozenset(
    ("node-name", "read-only", "backing", "discard", "detect-zeroes", "driver")
)


async def reopen(graph: Graph, options: Sequence[BlockdevOptions]) -> None:
    """Give each node in ``options`` these; what is left out, but ``discard``, gets its default."""
    async with graph.lock:
        wanted = [_keeping_discard(_find(graph, given), given) for given in options]
        for node, given in wanted:
            _check(graph, node, given)
        held: list[Node] = []
        undo: list[Callable[[], Awaitable[None]]] = []
        try:
            for node, given in wanted:
                await _apply(graph, node, given, held, undo)
        except BaseException:
            for step in reversed(undo):
                await step()
            raise
        finally:
            for node in held:
                node.op_blockers.remove(_HOLD)
            for node in held:
                await graph.unref(node)


def _find(graph: Graph, given: BlockdevOptions) -> Node:
    if given.node_name is None:
        raise BlockError("node-name not specified")
    return graph.find(given.node_name)


def _keeping_discard(node: Node, given: BlockdevOptions) -> tuple[Node, BlockdevOptions]:
    """``discard`` alone stays as it is where it is left out, as in QEMU."""
    if given.discard is None and node.driver_class.is_format:
        given = given.model_copy(update={"discard": node.options.discard})
    return node, given


def _check(graph: Graph, node: Node, given: BlockdevOptions) -> None:
    has_backing = node.backing is not None or node.driver.backing_file
    if has_backing and "backing" not in given.model_fields_set:
        raise BlockError(f"backing is missing for '{node.name}'")
    if given.driver != node.driver_class.driver_name:
        raise BlockError("Cannot change the option 'driver'")
    if given.detect_zeroes is BlockdevDetectZeroesOptions.UNMAP and not given.unmaps:
        raise BlockError(
            "setting detect-zeroes to unmap is not allowed "
            "without setting discard operation to unmap"
        )
    for role in ("backing", "file"):
        _check_child(graph, node, role, getattr(given, role, None))
    for member in members(type(given)):
        if member.name in _CHANGEABLE and not _fixed(node, member.name):
            continue
        if member.name in node.driver_class.changeable:
            continue
        new = to_qmp(getattr(given, member.attribute, None))
        old = to_qmp(getattr(node.given, member.attribute, None))
        edge = node.children.get(member.name)
        if edge is not None:
            old = edge.child.name if isinstance(new, str) else old
        if new != old and not (member.name == "file" and edge is not None):
            raise BlockError(f"Cannot change the option '{member.name}'")


def _check_child(graph: Graph, node: Node, role: str, given: object) -> None:
    """A reference to another node is in order; anything but a reference has to stay."""
    edge = node.children.get(role)
    if not given and role == "backing" and edge is not None:
        _check_no_job_filter(node, edge)
    if not given or (edge is None and role == "file"):
        return
    if not isinstance(given, str):
        if role == "backing" or to_qmp(given) != to_qmp(getattr(node.given, role, None)):
            raise BlockError(f"Cannot change the option '{role}'")
        return
    child = graph.lookup(None, given)
    if edge is not None and _stays(edge, child):
        return
    if edge is not None:
        _check_no_job_filter(node, edge)
    surgery.check_link(node, child, role)
    if edge is not None:
        edge.check_not_frozen()
    if role == "file" and not _same_bytes(node, edge, child):
        raise BlockError("Cannot change the option 'file'")


def _stays(edge: Edge, child: Node) -> bool:
    """Whether ``child`` is there already; who named it may not know of a job's filter above it."""
    found: Node | None = edge.child
    while found is not child and found is not None and found.job_filter:
        found = found.file
    return found is child


def _check_no_job_filter(node: Node, edge: Edge) -> None:
    """A job that sees the writes of a guest goes on seeing them."""
    if edge.child.job_filter:
        raise BlockError(f"Cannot replace implicit {edge.role} child of {node.name}")


def _same_bytes(node: Node, edge: Edge | None, child: Node) -> bool:
    """Filters may come and go above the same file; tables of another one would not fit."""
    assert edge is not None
    if node.driver_class.driver_name == "raw" or node.is_filter:
        return child.length == edge.child.length
    return chain.skip_filters(edge.child) is chain.skip_filters(child)


def _fixed(node: Node, name: str) -> bool:
    """What a protocol driver has looked at when it was opened."""
    return name == "discard" and not node.driver_class.is_format


async def _apply(
    graph: Graph,
    node: Node,
    given: BlockdevOptions,
    held: list[Node],
    undo: list[Callable[[], Awaitable[None]]],
) -> None:
    edges = node.children
    if "backing" in given.model_fields_set:
        name = getattr(given, "backing", None)
        old = node.backing
        new = graph.lookup(None, name) if name else None
        below_job = new is not None and old not in (None, new) and _stays(edges["backing"], new)
        if not below_job:
            if old is not None:
                old.op_blockers.append(_HOLD)
                held.append(old)
            await surgery.replace_backing(graph, node, new)
            undo.append(lambda: surgery.replace_backing(graph, node, old))
    file, name = node.children.get("file"), getattr(given, "file", None)
    if file is not None and isinstance(name, str) and not _stays(file, graph.lookup(None, name)):
        before_file = file.child
        before_file.op_blockers.append(_HOLD)
        held.append(before_file)
        await surgery.replace_file(graph, node, graph.lookup(None, name))
        undo.append(lambda: surgery.replace_file(graph, node, before_file))
    if node.driver_class.changeable:
        before_given = node.given
        await _change_own(graph, node, given)
        undo.append(lambda: _change_own(graph, node, before_given))
    was_read_only = node.read_only
    await graph.set_read_only(node, bool(given.read_only))
    undo.append(lambda: graph.set_read_only(node, was_read_only))
    before, options, explicit = node.detect_zeroes, node.options, node.given

    async def back() -> None:
        node.change_options(detect_zeroes=before, discard=options.discard)
        node.given = explicit
        graph.rebind_above(node)

    undo.append(back)
    node.change_options(detect_zeroes=given.detect_zeroes, discard=given.discard)
    node.given = given
    graph.rebind_above(node)


async def _change_own(graph: Graph, node: Node, given: BlockdevOptions) -> None:
    async with graph.drained(node):
        node.driver.change_options(given, graph.environment_for(node, ""))
