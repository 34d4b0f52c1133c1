"""``image map``: which image of a chain has each range, and where.

Runs on an event loop of its own. JSON and words are those of ``qemu-img map``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph import chain
from liveblockd.graph.node import Node
from liveblockd.imagetool.images import Images, ToolError, size_of
from liveblockd.imagetool.output import say
from liveblockd.storage.driver import Extent, ExtentKind


@dataclass(frozen=True, slots=True)
class Entry:
    """A MapEntry of qapi/block-core.json; ``start``, ``length`` and ``offset`` are bytes."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    filename: str | None

    def follows(self, before: Entry) -> bool:
        """Whether both are one run."""
        same = (
            (self.depth, self.present, self.zero, self.data, self.filename)
            == (before.depth, before.present, before.zero, before.data, before.filename)
        )  # fmt: skip
        if before.offset is None or self.offset is None:
            return same and before.offset is self.offset
        return same and before.offset + before.length == self.offset

    def json(self) -> str:
        """One object on a line, as scripts read it."""
        members = {
            "start": self.start, "length": self.length, "depth": self.depth,
            "present": self.present, "zero": self.zero, "data": self.data,
        }  # fmt: skip
        text = "{ " + json.dumps(members)[1:-1]
        return text + (f', "offset": {self.offset}' if self.offset is not None else "") + "}"


async def run(args: argparse.Namespace) -> int:
    """The command."""
    start = size_of(args.start_offset, "start offset") if args.start_offset else 0
    limit = size_of(args.max_length, "max length") if args.max_length else None
    async with Images(args.objects) as images:
        node = await images.open(args.filename, args.format, force_share=args.force_share)
        await images.use(node)
        end = node.driver.virtual_size
        if limit is not None:
            end = min(end, start + limit)
        lines = 0
        if args.output == "human":
            say(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        async for entry in merged(node, start, end):
            if args.output == "json":
                sys.stdout.write(("[" if not lines else ",\n") + entry.json())
                lines += 1
            else:
                _show(entry)
        if args.output == "json":
            say("]" if lines else "[]")
    return 0


def _show(entry: Entry) -> None:
    if entry.data and entry.offset is None:
        raise ToolError("File contains external, encrypted or compressed clusters.")
    if entry.data and not entry.zero:
        start, length = _hex(entry.start), _hex(entry.length)
        say(f"{start:<16}{length:<16}{_hex(entry.offset or 0):<16}{entry.filename}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"  # as printf's %#x


async def merged(node: Node, start: int, end: int) -> AsyncIterator[Entry]:
    """The entries of a range, neighbours that say the same as one."""
    last: Entry | None = None
    async for entry in entries(node, start, end):
        if last is not None and entry.follows(last):
            last = replace(last, length=last.length + entry.length)
            continue
        if last is not None:
            yield last
        last = entry
    if last is not None:
        yield last


#: still to be asked: depth, first and last byte + 1
_Question = tuple[int, int, int]


async def entries(node: Node, start: int, end: int) -> AsyncIterator[Entry]:
    """What the layers say, from the top down."""
    layers = chain.chain(node)
    pending: list[_Question | Entry] = [(0, start, end)] if start < end else []
    while pending:  # what comes next is at the end
        item = pending.pop()
        if isinstance(item, Entry):
            yield item
        else:
            pending.extend(reversed(await _ask(layers, *item)))


async def _ask(layers: list[Node], depth: int, start: int, end: int) -> list[_Question | Entry]:
    layer = layers[depth]
    length = layer.driver.length
    if start >= length:  # the last sector of a file that ends within it
        return [_entry(layer, start, depth, Extent(end - start, ExtentKind.ZERO))]
    # What lies beyond the end of the image below reads as zeros in this one.
    below = layers[depth + 1].driver.virtual_size if depth + 1 < len(layers) else 0
    answer: list[_Question | Entry] = []
    position = start
    for extent in await layer.map(start, min(end, length) - start):
        stop = position + extent.length
        if extent.kind is ExtentKind.ZERO and isinstance(layer.driver, Qcow2):
            place = position
            for part in await layer.driver.map_zeroes(position, extent.length):
                answer.append(_entry(layer, place, depth, part))
                place += part.length
        elif extent.kind is ExtentKind.MARKED:
            answer.append(Entry(position, extent.length, depth, False, False, False, None, None))
        elif extent.kind is not ExtentKind.UNALLOCATED:
            answer.append(_entry(layer, position, depth, extent))
        else:
            middle = max(position, min(stop, below))
            if position < middle:
                answer.append((depth + 1, position, middle))
            if middle < stop:
                answer.append(Entry(middle, stop - middle, depth, False, True, False, None, None))
        position = stop
    if position < end:
        answer.append((depth, position, end))
    return answer


def _entry(layer: Node, position: int, depth: int, extent: Extent) -> Entry:
    data = extent.kind in (ExtentKind.DATA, ExtentKind.COMPRESSED)
    offset = extent.host_offset if extent.host_offset >= 0 else None
    if layer.driver.encrypted:
        offset = None  # what is there is not what is read
    elif extent.kind is ExtentKind.ZERO and not layer.supports_backing:
        offset = position  # a hole in a file that holds the bytes as they are
    file = layer.file if layer.driver_class.is_format else layer
    if (edge := layer.children.get("data-file")) is not None:
        file = edge.child
    name = file.filename if file is not None and offset is not None else None
    return Entry(position, extent.length, depth, True, not data, data, offset, name)
