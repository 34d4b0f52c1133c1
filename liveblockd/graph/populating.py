"""Copies of what is read of a backing chain into the image on top (copy-on-read).

The driver ``copy-on-read`` and drives with ``copy-on-read=on`` do that. It is the reader who pays
for the copy; the copy goes in below every guest write (``BlockDriver.populate``), so it can undo
none.

Runs on: the event loop. Errors: none; an error of the copy is none of the read, which tells itself
if it cannot be.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.node import Node
from liveblockd.storage.cells import KIND_SHIFT, UNALLOCATED
from liveblockd.storage.driver import BlockDriver, BlockIO, ExtentKind

#: bytes copied at a time
PIECE: Final = 4 << 20


def layer_of(top: BlockIO) -> BlockDriver | None:
    """The driver of the layer that is copied into; None if it has nothing below."""
    node = chain.skip_filters(top) if isinstance(top, Node) else None
    if node is None or node.backing is None or node.read_only:
        return None
    return node.driver


def has(layer: BlockDriver, offset: int, length: int) -> bool:
    """Whether the layer is known to have all of the range, without a look at the disk."""
    if layer.cell_unit is None:
        return False
    bits = layer.cell_unit[0]
    start, end = offset >> bits << bits, -(-(offset + length) >> bits << bits)
    cells = layer.cells_now(start, end - start, bits)
    return cells is not None and not bool((cells >> KIND_SHIFT & 3 == UNALLOCATED).any())


async def copy(top: BlockIO, offset: int, length: int, bottom: Node | None = None) -> None:
    """Copy what is missing of the range, and layers down to ``bottom`` hold (None: all layers)."""
    layer = layer_of(top)
    if layer is None or not length:
        return
    unit = layer.cluster_size or 1
    end = min(-(-(offset + length) // unit) * unit, layer.length)
    step = max(unit, PIECE // unit * unit)
    with suppress(OSError, BlockError):
        async for start, stop in _missing(top, layer, bottom, offset // unit * unit, end):
            # Ends are those of runs; what is copied is whole clusters.
            first, last = start // unit * unit, min(-(-stop // unit) * unit, layer.length)
            for at in range(first, last, step):
                await layer.populate(at, await top.read(at, min(step, last - at)))


async def _missing(
    top: BlockIO, layer: BlockDriver, bottom: Node | None, start: int, end: int
) -> AsyncIterator[tuple[int, int]]:
    """Ranges that the top layer does not have, and layers down to ``bottom`` do."""
    while start < end:
        for extent in await layer.map(start, end - start):
            stop = start + extent.length
            if extent.kind is ExtentKind.UNALLOCATED:
                async for found in _held_below(top, bottom, start, stop):
                    yield found
            start = stop


async def _held_below(
    top: BlockIO, bottom: Node | None, start: int, stop: int
) -> AsyncIterator[tuple[int, int]]:
    if bottom is None:
        yield start, stop
        return
    assert isinstance(top, Node)
    base = chain.layer_below(bottom)
    for run in await chain.allocated_above(top, base, start, stop - start):
        if run.layer is not None:
            yield start, start + run.length
        start += run.length
