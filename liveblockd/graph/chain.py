"""Walks along backing chains, and the one question all readers ask: which layer has this range?

QEMU's docs/interop/live-block-operations calls base, intermediate and top (active) image what is so
called here. Filters (``is_filter``) stand in a chain without being a layer of it: walks look behind
them.

Runs on the event loop; walks are pure, ``resolve`` and ``allocated_above`` ask the drivers' maps.

Invariants: the runs of an answer follow each other without a gap from ``offset`` on. A layer that
is shorter than the range reads as zeros past its end, whatever lies below it.

Errors: BlockError from the finders; OSError from a driver's ``map``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable, Iterator
from errno import EIO
from itertools import pairwise, takewhile
from typing import NamedTuple

from liveblockd.errors import BlockError
from liveblockd.graph import filenames
from liveblockd.graph.node import Edge, Node
from liveblockd.storage.driver import BlockIO, ExtentKind, HostFile
from liveblockd.storage.filters.base import FilterDriver


def skip_filters(node: Node | None) -> Node | None:
    """The first node at or below ``node`` that is a layer; None if there is none."""
    while node is not None and node.is_filter:
        node = node.file
    return node


def stacked(node: Node) -> Iterator[Node]:
    """``node``, and what is below it where it is a filter, down to the layer."""
    found: Node | None = node
    while found is not None:
        yield found
        found = found.file if found.is_filter else None


def snapshot_keeper(node: Node) -> Node:
    """Whose internal snapshots are those of ``node``: what stands on one node alone has none."""
    while len(node.children) == 1 and (node.is_filter or node.driver_class.driver_name == "raw"):
        (edge,) = node.children.values()
        node = edge.child
    return node


def layer_below(node: Node) -> Node | None:
    """The next layer of the chain below ``node``, filters skipped on both sides."""
    layer = skip_filters(node)
    return None if layer is None else skip_filters(layer.backing)


def chain(top: Node) -> list[Node]:
    """The layers from ``top`` down, without filters."""
    found = []
    node = skip_filters(top)
    while node is not None:
        found.append(node)
        node = layer_below(node)
    return found


def layers_between(top: Node, base: Node | None) -> list[Node]:
    """The layers from ``top`` down to above ``base`` (None: all of them)."""
    return list(takewhile(lambda layer: layer is not base, chain(top)))


def is_above(top: Node, node: Node) -> bool:
    """Whether ``node`` is a layer of the chain of ``top``, or ``top`` itself."""
    below = skip_filters(node)
    return any(layer is below for layer in chain(top))


def overlay_of(top: Node, node: Node) -> Node | None:
    """The layer of the chain of ``top`` whose backing layer is ``node``; None if there is none."""
    layers = chain(top)
    target = skip_filters(node)
    for above, below in pairwise(layers):
        if below is target:
            return above
    return None


def find_base_by_filename(top: Node, filename: str) -> Node | None:
    """The layer below ``top`` that is called ``filename``, as shown, as written or as resolved.

    A name is resolved from the directory of the image above, as the names in headers are, and
    through symbolic links.
    """
    layers = chain(top)
    for above, below in pairwise(layers):
        written = above.driver.backing_file
        if filename in (below.filename, filenames.exact_filename(below), written):
            return below
        if written and _same_file(above, written, filename):
            return below
    return None


def _same_file(above: Node, written: str, wanted: str) -> bool:
    try:
        one, other = (filenames.full_backing_filename(above, n) for n in (written, wanted))
    except BlockError:
        return False
    if one == other:
        return True
    if filenames.has_protocol(one) or filenames.has_protocol(other):
        return False
    return os.path.realpath(one) == os.path.realpath(other)


def edges_between(top: Node, base: Node | None) -> Iterator[Edge]:
    """The ``backing`` and filter links from ``top`` down to ``base`` (None: to the end)."""
    node: Node | None = top
    while node is not None and node is not base:
        edge = node.children.get("backing")
        if edge is None and node.is_filter:
            edge = node.children.get(node.driver_class.filtered)
        if edge is None:
            return
        yield edge
        node = edge.child


def freeze(top: Node, base: Node | None) -> list[Edge]:
    """Let nobody change the links from ``top`` to ``base``; the answer is for ``unfreeze``.

    BlockError, and nothing frozen, when one of them is frozen already.
    """
    edges = list(edges_between(top, base))
    for edge in edges:
        edge.check_not_frozen()
    for edge in edges:
        edge.frozen += 1
    return edges


def commit_through(edges: Iterable[Edge], on: bool) -> None:
    """Let a commit write below ``edges``, or no longer; ``refresh_permissions`` comes after it."""
    for edge in edges:
        edge.committed += 1 if on else -1
        assert edge.committed >= 0


def overlays(node: Node) -> list[Node]:
    """The layers that have ``node`` as their backing node, filters in between."""
    found = []
    for edge in node.parents:
        parent = edge.parent
        if not isinstance(parent, Node):
            continue
        if parent.is_filter:
            found.extend(overlays(parent))
        elif edge.role == "backing":
            found.append(parent)
    return found


def behind_filters(top: Node) -> set[Node]:
    """The layers at and below ``top`` that are to be read through a filter between, not past it."""
    found: set[Node] = set()
    node: Node | None = top
    behind = False
    while node is not None:
        if node.is_filter:
            driver = node.driver
            behind |= isinstance(driver, FilterDriver) and driver.sees_reads
            node = node.file
        else:
            if behind:
                found.add(node)
            node = node.backing
    return found


def unfreeze(edges: list[Edge]) -> None:
    """Undo ``freeze``; ``edges`` is empty afterwards, so that twice is harmless."""
    for edge in edges:
        assert edge.frozen > 0
        edge.frozen -= 1
    edges.clear()


def host_file(layer: Node) -> HostFile | None:
    """The file to which the host offsets in the map of ``layer`` refer, for a worker's copy."""
    if layer.driver_class.is_format:
        return layer.driver.data_host_file()
    return layer.driver.host_file()  # to read: nothing is written past a bitmap of the node


class Run(NamedTuple):
    """A run of guest bytes that one layer answers for."""

    length: int  # bytes
    kind: ExtentKind  # UNALLOCATED: nobody does, it reads as zeros (or as the base has it)
    layer: Node | None  # who does; None for UNALLOCATED
    host_offset: int  # bytes, of DATA; else -1
    depth: int  # 1 for the first layer that was asked; 0 for UNALLOCATED

    @property
    def zero(self) -> bool:
        """Reads as zeros, if no base is below."""
        return self.kind in (ExtentKind.ZERO, ExtentKind.UNALLOCATED)

    @property
    def hole(self) -> bool:
        """Nobody has bytes for it, or that is what is to be shown."""
        return self.zero or self.kind is ExtentKind.MARKED


async def allocated_above(top: Node, base: Node | None, offset: int, length: int) -> list[Run]:
    """Which layer strictly below ``top`` and above ``base`` has each part of the range.

    ``base`` None stands for the end of the chain. UNALLOCATED: none of them, so that the base (or
    zeros, without one) shows through. Past the end of a layer that is shorter than the range that
    layer says ZERO when there is a base, which would show otherwise. Covers the whole range.
    """
    first = layer_below(top)
    if first is None or first is skip_filters(base):
        return [Run(length, ExtentKind.UNALLOCATED, None, -1, 0)]
    return [
        run async for run in resolve(first, base, offset, length, short_is_zero=base is not None)
    ]


class _Question(NamedTuple):
    """Still to be asked."""

    layer: Node
    depth: int
    offset: int  # bytes
    length: int  # bytes
    #: whose flat map shows ``layer`` and what is below it
    above: Node | None = None


async def resolve(
    top: Node,
    base: Node | None,
    offset: int,
    length: int,
    *,
    short_is_zero: bool = True,
    shown: bool = False,
) -> AsyncGenerator[Run, None]:
    """As ``allocated_above``, with ``top`` itself as the first layer; runs come as they are found.

    Runs that say the same of contiguous host bytes are merged. What is to be read through a filter
    is COMPRESSED: nobody reads it from the host file. Past the end of a layer below the first it is
    ZERO there, or UNALLOCATED without ``short_is_zero``. MARKED is COMPRESSED, too, but for who
    wants to know what is to be ``shown``.
    """
    stop = skip_filters(base)
    first = skip_filters(top)
    assert first is not None and first is not stop
    last: Run | None = None
    pending: list[_Question | Run] = [_Question(first, 1, offset, length)]  # the next one is last
    behind = behind_filters(top)
    while pending:
        item = pending.pop()
        if not isinstance(item, Run):
            known = await _look_up(item, stop) if short_is_zero else None
            pending.extend(reversed(known or await _ask(item, stop, short_is_zero)))
            continue
        if item.layer in behind and item.kind is ExtentKind.DATA:
            item = item._replace(kind=ExtentKind.COMPRESSED, host_offset=-1)
        if item.kind is ExtentKind.MARKED and not shown:
            item = item._replace(kind=ExtentKind.COMPRESSED)
        if last is None:
            last = item
        elif _continues(last, item):
            last = last._replace(length=last.length + item.length)
        else:
            yield last
            last = item
    if last is not None:
        yield last


async def _ask(
    question: _Question, stop: Node | None, short_is_zero: bool
) -> list[_Question | Run]:
    """What ``layer`` knows of its range, and what is left to ask, in the order of offsets."""
    layer, depth, offset, length, _ = question
    end = layer.driver.length
    if offset >= end:
        if short_is_zero:
            return [Run(length, ExtentKind.ZERO, layer, -1, depth)]
        return [Run(length, ExtentKind.UNALLOCATED, None, -1, 0)]
    below = layer_below(layer)
    answer: list[_Question | Run] = []
    position = offset
    for extent in await layer.map(offset, min(length, end - offset)):
        if extent.kind is not ExtentKind.UNALLOCATED:
            answer.append(Run(extent.length, extent.kind, layer, extent.host_offset, depth))
        elif below is None or below is stop:
            answer.append(Run(extent.length, ExtentKind.UNALLOCATED, None, -1, 0))
        else:
            answer.append(_Question(below, depth + 1, position, extent.length, layer))
        position += extent.length
    if position == offset:
        raise OSError(EIO, f"the map of node '{layer.name}' has no answer at {offset}")
    if position < offset + length:
        answer.append(_Question(layer, depth, position, offset + length - position))
    return answer


async def _look_up(question: _Question, stop: Node | None) -> list[_Question | Run] | None:
    """The same out of the flat map of the layer above, for all layers at once; None: ask."""
    _, depth, offset, length, above = question
    below = None if above is None else above.driver.below
    if below is None or (found := await below.runs(offset, length)) is None:
        return None
    layers = below.layers
    nodes = {index: _node_of(layers[index].node) for index in {run.layer for run in found}}
    last = len(layers)
    if stop is not None:
        last = next((n for n, at in enumerate(layers) if _node_of(at.node) is stop), last)
    answer: list[_Question | Run] = []
    position = offset
    for run in found:
        kind = ExtentKind(run.kind)
        if kind is ExtentKind.UNALLOCATED or run.layer >= last:
            answer.append(Run(run.length, ExtentKind.UNALLOCATED, None, -1, 0))
        elif kind is ExtentKind.COMPRESSED:  # only the layer itself knows
            answer.append(_Question(nodes[run.layer], depth + run.layer, position, run.length))
        else:
            at = depth + run.layer
            answer.append(Run(run.length, kind, nodes[run.layer], run.host_offset, at))
        position += run.length
    if position < offset + length:
        answer.append(question._replace(offset=position, length=offset + length - position))
    return answer


def _node_of(node: BlockIO) -> Node:
    """The layer that a flat map of nodes of a graph calls ``node``."""
    assert isinstance(node, Node)
    layer = skip_filters(node)
    assert layer is not None
    return layer


def _continues(last: Run, run: Run) -> bool:
    if run.kind is not last.kind or run.layer is not last.layer:
        return False
    return run.kind is not ExtentKind.DATA or last.host_offset + last.length == run.host_offset
