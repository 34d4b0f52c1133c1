"""One map of a whole backing chain, so that its depth costs nothing: what lies below one image.

A chain is read through one flat map (guest cell -> layer, host offset). It is made span by
span, when somebody reads there, from the tables of all layers (``BlockDriver.cells``): one array in
the finest allocation unit of the chain. A read is then one lookup and one read of the file of
the layer that has the bytes. Where a layer's bytes are not simply those of its file (compressed,
encrypted, damaged) the map says which layer to ask; a node that cannot say where its bytes
lie (raw, other formats, filters that do something) is the last one in the map and is asked for all
that nobody above it has.

Runs on: the event loop. Invariants:

* The map says at every instant what the tables in memory say: each layer tells of every change
  (``BlockDriver.remapped``, ``restructured``) in the same step in which it makes it. A change
  that comes while a span is made is put into it before anybody sees it.
* Between a lookup and the begin of the read that uses it there is no await.
* Spans of all maps together take ``POOL.limit`` bytes at most, whatever the disks' sizes.

Errors: OSError from the layers; EIO for nodes nested deeper than Python's stack.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from errno import EIO
from typing import Final, cast

import numpy as np

from liveblockd.storage.cells import (
    ASK,
    ASK_CELL,
    DATA,
    HOST_MASK,
    KIND_SHIFT,
    LAYER_SHIFT,
    MAX_LAYERS,
    SECTOR_BITS,
    UNALLOCATED,
    ZERO,
    CellRun,
    Cells,
    add_layer,
    cell_runs,
    first_run,
    replace_layer,
)
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Source
from liveblockd.storage.spans import POOL, Span, Spans

#: cells of a span: at least, and at most where the tables of a layer cover more
MIN_CELLS: Final = 1 << 13
MAX_CELLS: Final = 1 << 18
#: bytes; a larger request that spans cells is left to the coroutine
NOWAIT_LIMIT: Final = 1 << 20
#: how often a span is made anew because the chain changed meanwhile
ATTEMPTS: Final = 3
_ENDLESS: Final = 1 << 63


async def read_padded(node: BlockIO, offset: int, length: int) -> Buffer:
    """Bytes of a node; zeros past its end."""
    available = min(length, max(0, node.length - offset))
    if available == length:
        data = node.read_nowait(offset, length)
        return data if data is not None else await node.read(offset, length)
    if not available:
        return bytes(length)
    return bytes(await node.read(offset, available)).ljust(length, b"\0")


class Layer:
    """One layer of a map."""

    __slots__ = ("data", "data_end", "driver", "index", "length", "limit", "node")

    def __init__(self, index: int, node: BlockIO, driver: BlockDriver | None) -> None:
        self.index = index
        self.node = node
        #: None: this node must be asked for everything
        self.driver = driver
        self.length = _ENDLESS if driver is None else driver.length
        #: bytes that are seen of it: layers above that are shorter hide the rest behind zeros
        self.limit = self.length
        self.data = node
        #: bytes that are known to be in ``data``
        self.data_end = -1
        if driver is not None:
            self.data = driver.data_node
            self.data_end = self.data.length


class _Watcher:
    """What a layer tells the map."""

    __slots__ = ("layer", "map")

    def __init__(self, owner: FlatMap, layer: Layer) -> None:
        self.map = owner
        self.layer = layer

    def remapped(self, offset: int, length: int) -> None:
        self.map.layer_changed(self.layer, offset, length)

    def restructured(self) -> None:
        self.map.reset()


class _Build:
    """A span in the making."""

    __slots__ = ("changes", "task", "void")

    def __init__(self) -> None:
        self.task: asyncio.Task[Span | None] | None = None
        #: (layer, offset, length) of changes since it began
        self.changes: list[tuple[Layer, int, int]] = []
        #: the chain is another one
        self.void = False


class FlatMap:
    """What lies below an image: the chain that begins with ``children["backing"]``."""

    def __init__(self, children: Mapping[str, BlockIO]) -> None:
        self._children = children
        #: what ``layers`` were found below; None: to be found anew
        self._root: BlockIO | None = None
        self.layers: list[Layer] = []
        self._watchers: list[tuple[BlockDriver, _Watcher]] = []
        self._building: dict[int, _Build] = {}
        self._spans: Spans = {}
        self._bits = self._span_bits = 0
        self._cell_mask = self._index_mask = 0

    # -- structure

    def reset(self) -> None:
        """The chain is another one, or closed: forget everything."""
        if self._root is None:
            return
        self._root = None
        for driver, watcher in self._watchers:
            driver.unwatch(watcher)
        self._watchers = []
        self.layers = []
        POOL.forget(self._spans)
        for build in self._building.values():
            build.void = True
        self._building = {}

    def find_layers(self) -> bool:
        """Look at the chain if it is a new one; whether there is one."""
        root = self._children.get("backing")
        if root is self._root:
            return root is not None
        self.reset()
        if root is None:
            return False
        self._root = root
        node: BlockIO | None = root
        while node is not None:
            found = _layer_of(node) if len(self.layers) < MAX_LAYERS - 1 else None
            layer = _described(len(self.layers), node, found)
            if self.layers:
                layer.limit = min(layer.limit, self.layers[-1].limit)
            self.layers.append(layer)
            driver = layer.driver
            if driver is None:
                if found is not None:  # it may be replaced, all the same
                    self._watch(found[1], layer)
                break
            self._watch(driver, layer)
            node = driver.children.get("backing")
        self._set_geometry()
        return True

    def _watch(self, driver: BlockDriver, layer: Layer) -> None:
        watcher = _Watcher(self, layer)
        driver.watch(watcher)
        self._watchers.append((driver, watcher))

    def _set_geometry(self) -> None:
        drivers = [layer.driver for layer in self.layers if layer.driver is not None]
        units = [driver.cell_unit for driver in drivers]
        known = [unit for unit in units if unit is not None]
        self._bits = min((unit[0] for unit in known), default=16)
        widest = max((unit[1] for unit in known), default=0)
        cells = min(MAX_CELLS, max(MIN_CELLS, widest >> self._bits))
        self._span_bits = self._bits + cells.bit_length() - 1
        self._cell_mask = (1 << self._bits) - 1
        self._index_mask = (1 << self._span_bits - self._bits) - 1

    @property
    def _is_trivial(self) -> bool:
        """Whether a map would only say that the first node is to be asked."""
        return self.layers[0].driver is None

    # -- changes

    def layer_changed(self, layer: Layer, offset: int, length: int) -> None:
        """``layer`` answers otherwise for a range than it did."""
        with suppress(OSError):  # who reads there is told
            layer.data_end = layer.data.length
        first, last = offset >> self._span_bits, (offset + length - 1) >> self._span_bits
        if len(self._spans) < last - first:
            stored = [index for index in self._spans if first <= index <= last]
        else:
            stored = [index for index in range(first, last + 1) if index in self._spans]
        for index in stored:
            span = self._spans[index]
            if span.shared or not self._update(index, span.cells, layer, offset, length):
                POOL.remove(self._spans, index)
        for index, build in self._building.items():
            if first <= index <= last:
                build.changes.append((layer, offset, length))

    def _update(self, index: int, known: Cells, layer: Layer, offset: int, length: int) -> bool:
        """Put a change into the cells of a span; False where they have to be found anew."""
        driver = layer.driver
        if driver is None:
            return True
        start = index << self._span_bits
        low = max(start, offset & ~self._cell_mask)
        end = offset + length + self._cell_mask & ~self._cell_mask
        high = min(start + (1 << self._span_bits), end)
        cells = driver.cells_now(low, high - low, self._bits)
        if cells is None:
            return False
        part = slice(low - start >> self._bits, high - start >> self._bits)
        return replace_layer(known[part], cells, layer.index)

    # -- spans

    async def _span(self, index: int) -> Span | None:
        """A span, made if need be; None if the chain does not keep still.

        No await follows between the end of its making and the return to the caller.
        """
        for _ in range(ATTEMPTS):
            if not self.find_layers() or self._is_trivial:
                return None
            span = self._spans.get(index)
            if span is not None:
                span.used = True
                return span
            build = self._building.get(index)
            if build is None:
                build = _Build()
                build.task = asyncio.get_running_loop().create_task(self._make(index, build))
                self._building[index] = build
            assert build.task is not None
            # Shielded: others may wait for the same span.
            await asyncio.shield(build.task)
        return None

    async def _make(self, index: int, build: _Build) -> Span | None:
        try:
            cells = await self._compose(index, build)
            if cells is None or build.void:
                return None
            for layer, offset, length in build.changes:
                if not self._update(index, cells, layer, offset, length):
                    return None
            span = Span(cells)
            POOL.add(self._spans, index, span)
            return span
        finally:
            if self._building.get(index) is build:
                del self._building[index]

    async def _compose(self, index: int, build: _Build) -> Cells | None:
        start, length, bits = index << self._span_bits, 1 << self._span_bits, self._bits
        known = np.zeros(length >> bits, np.int64)
        for layer in self.layers:
            driver = layer.driver
            if driver is None or (layer.index and known.all()):
                if driver is None:
                    known[known == 0] = ASK_CELL + (layer.index << LAYER_SHIFT)
                break
            try:
                cells = await driver.cells(start, length, bits)
            except OSError:
                # A table cannot be read, or cannot be: that is for who needs it, and only there.
                cells = np.full(length >> bits, ASK_CELL, np.int64)
            if build.void:
                return None
            if cells is not None and layer.index:
                add_layer(known, cells, layer.index)
            elif cells is not None:
                known = cells
        return known

    # -- reads that do not wait

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes, if the span is made and the file has the data at hand; zeros without a chain.

        ``length`` is above 0.
        """
        if self._children.get("backing") is not self._root and not self.find_layers():
            return bytes(length)
        span = self._spans.get(offset >> self._span_bits)
        if span is None:
            return self._read_nowait_without(offset, length)
        span.used = True
        inside = offset & self._cell_mask
        if inside + length > self._cell_mask + 1:
            return self._read_nowait_many(offset, length)
        code = span.view[offset >> self._bits & self._index_mask]
        layer = self.layers[code >> LAYER_SHIFT]
        kind = code >> KIND_SHIFT & 3
        if kind == DATA:
            host_offset = ((code & HOST_MASK) << SECTOR_BITS) + inside
            if offset + length > layer.limit:
                return bytes(length) if offset >= layer.limit else None
            if host_offset + length > layer.data_end:
                return None
            return layer.data.read_nowait(host_offset, length)
        if kind == ASK:
            return self._ask_nowait(layer, offset, length)
        return bytes(length)

    def read_each_nowait(self, here: BlockIO, places: Sequence[int], length: int) -> list[Buffer]:
        """The first ones at hand of many ranges of one length, each within a cell.

        A place is an offset of ``here``, or ``~`` an offset of what is below.
        """
        reads, found = here.read_nowait, list[Buffer]()
        if self._children.get("backing") is not self._root:
            self.find_layers()
        spans, span_bits, bits = self._spans.get, self._span_bits, self._bits
        cell_mask, index_mask, layers = self._cell_mask, self._index_mask, self.layers
        room, number, view = cell_mask + 1 - length, -1, None
        for place in places:
            if place >= 0:
                data = reads(place, length)
            else:
                offset, data = ~place, None
                if offset >> span_bits != number:
                    number = offset >> span_bits
                    span = spans(number)
                    view = None
                    if span is not None:
                        span.used = True
                        view = span.view
                code = 0 if view is None else view[offset >> bits & index_mask]
                if code >> KIND_SHIFT & 3 == DATA:
                    layer, inside = layers[code >> LAYER_SHIFT], offset & cell_mask
                    host_offset = ((code & HOST_MASK) << SECTOR_BITS) + inside
                    if (
                        inside <= room
                        and offset + length <= layer.limit
                        and host_offset + length <= layer.data_end
                    ):
                        data = layer.data.read_nowait(host_offset, length)
                if data is None:
                    data = self.read_nowait(offset, length)
            if data is None:
                break
            found.append(data)
        return found

    def zeroes_now(self, offset: int, length: int) -> bool:
        """Whether the span is made and says that a range within a cell reads as zeros."""
        if self._children.get("backing") is not self._root and not self.find_layers():
            return True
        span = self._spans.get(offset >> self._span_bits)
        if span is None or (offset & self._cell_mask) + length > self._cell_mask + 1:
            return False
        code = span.view[offset >> self._bits & self._index_mask]
        kind = code >> KIND_SHIFT & 3
        return kind not in (DATA, ASK) or offset >= self.layers[code >> LAYER_SHIFT].limit

    def source_now(self, offset: int, length: int) -> Source | None:
        """The host file that has all of a range within a cell, if the map says so now."""
        if self._children.get("backing") is not self._root and not self.find_layers():
            return None
        span = self._spans.get(offset >> self._span_bits)
        if span is None:
            return self._source_without(offset, length)
        span.used = True
        inside = offset & self._cell_mask
        code = span.view[offset >> self._bits & self._index_mask]
        if code >> KIND_SHIFT & 3 != DATA or inside + length > self._cell_mask + 1:
            return None
        layer = self.layers[code >> LAYER_SHIFT]
        host_offset = ((code & HOST_MASK) << SECTOR_BITS) + inside
        if offset + length > layer.limit or host_offset + length > layer.data_end:
            return None
        file = layer.data.host_file()
        return None if file is None else Source(offset, length, file, host_offset)

    def _source_without(self, offset: int, length: int) -> Source | None:
        if self._root is None or not self._is_trivial:
            return None
        layer = self.layers[0]
        if offset + length > min(layer.node.length, layer.limit):
            return None
        file = layer.node.host_file()
        return None if file is None else Source(offset, length, file, offset)

    def _read_nowait_without(self, offset: int, length: int) -> Buffer | None:
        if self._root is None:
            return bytes(length)
        return self._ask_nowait(self.layers[0], offset, length) if self._is_trivial else None

    def _ask_nowait(self, layer: Layer, offset: int, length: int) -> Buffer | None:
        node = layer.node
        end = min(node.length, layer.limit)
        if offset + length <= end:
            return node.read_nowait(offset, length)
        return bytes(length) if offset >= end else None

    def _read_nowait_many(self, offset: int, length: int) -> Buffer | None:
        """The same for a request that spans cells."""
        if length > NOWAIT_LIMIT:
            return None
        parts: list[Buffer] = []
        position, end = offset, offset + length
        while position < end:
            span = self._spans.get(position >> self._span_bits)
            if span is None:
                return None
            span.used = True
            stop = min(end, (position >> self._span_bits) + 1 << self._span_bits)
            first = position >> self._bits & self._index_mask
            last = stop - 1 >> self._bits & self._index_mask
            skip = position & self._cell_mask
            runs = cell_runs(span.cells[first : last + 1], self._bits, skip, stop - position)
            for found in runs:
                for run in self._clipped(found, position):
                    data = self._run_nowait(run, position)
                    if data is None:
                        return None
                    parts.append(data)
                    position += run.length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _run_nowait(self, run: CellRun, offset: int) -> Buffer | None:
        layer = self.layers[run.layer]
        if run.kind == DATA:
            if run.host_offset + run.length > layer.data_end:
                return None
            return layer.data.read_nowait(run.host_offset, run.length)
        if run.kind == ASK:
            return self._ask_nowait(layer, offset, run.length)
        return bytes(run.length)

    # -- reads

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes below the image; zeros beyond the end of the chain, and without one."""
        try:
            data = await self._read_piece(offset, length)
            if len(data) == length:
                return data
            result = bytearray(length)
            position = 0
            while True:
                result[position : position + len(data)] = data
                position += len(data)
                if position == length:
                    return result
                data = await self._read_piece(offset + position, length - position)
        except RecursionError:
            raise OSError(EIO, "the block nodes are nested too deep") from None

    async def _read_piece(self, offset: int, length: int) -> Buffer:
        """The bytes of the first run of a range."""
        index = offset >> self._span_bits
        span = None
        if self.find_layers():
            index = offset >> self._span_bits
            span = self._spans.get(index) or await self._span(index)
        if span is None:
            root = self._children.get("backing")
            return bytes(length) if root is None else await read_padded(root, offset, length)
        # No await from here to the begin of the read.
        if self._spans.get(offset >> self._span_bits) is not span:
            return b""  # changed between the end of its making and now: look again
        run = self._first_run(span, offset, length)
        layer = self.layers[run.layer]
        if run.kind == ASK:
            return await read_padded(layer.node, offset, run.length)
        if run.kind != DATA:
            return bytes(run.length)
        assert layer.driver is not None
        if run.host_offset + run.length > layer.data_end:
            layer.data_end = layer.data.length  # it grows while somebody writes to the layer
        return await layer.driver.read_host(run.host_offset, run.length)

    def _first_run(self, span: Span, offset: int, length: int) -> CellRun:
        stop = min(offset + length, (offset >> self._span_bits) + 1 << self._span_bits)
        first = offset >> self._bits & self._index_mask
        last = stop - 1 >> self._bits & self._index_mask
        skip = offset & self._cell_mask
        run = first_run(span.cells[first : last + 1], self._bits, skip, stop - offset)
        return self._clipped(run, offset)[0]

    def _clipped(self, run: CellRun, offset: int) -> list[CellRun]:
        """A run without what is behind the end of its layer or of one above: that is zeros.

        Cells say what the tables say; there may be more in them, and in those below, than is seen.
        """
        layer = self.layers[run.layer] if run.kind != UNALLOCATED else self.layers[-1]
        end = offset + run.length
        if end <= layer.limit:
            return [run]
        position = max(offset, layer.limit)
        found = [run._replace(length=position - offset)] if position > offset else []
        while position < end:
            # Of all that are too short the first one is asked.
            short = next(at for at in self.layers if at.length <= position)
            stop = min(end, self.layers[short.index - 1].limit) if short.index else end
            found.append(CellRun(stop - position, short.index, ZERO, -1))
            position = stop
        return found

    # -- what is where

    async def runs(self, offset: int, length: int) -> list[CellRun] | None:
        """What a non-empty prefix of the range is made of; ``layer`` is an index of ``layers``.

        None: ask the node below. Ranges for which no layer has tables cost nothing.
        """
        if not self.find_layers() or self._is_trivial:
            return None
        empty = self._without_tables(offset, length)
        if empty is not None:
            return [empty]
        span = await self._span(offset >> self._span_bits)
        if span is None or self._spans.get(offset >> self._span_bits) is not span:
            return None
        stop = min(offset + length, (offset >> self._span_bits) + 1 << self._span_bits)
        first = offset >> self._bits & self._index_mask
        last = stop - 1 >> self._bits & self._index_mask
        skip = offset & self._cell_mask
        found: list[CellRun] = []
        position = offset
        for run in cell_runs(span.cells[first : last + 1], self._bits, skip, stop - offset):
            found.extend(self._clipped(run, position))
            position += run.length
        return found

    def _without_tables(self, offset: int, length: int) -> CellRun | None:
        """The run from ``offset`` on for which no layer has a table, if there is one."""
        stop, layer, kind = offset + length, 0, UNALLOCATED
        for known in self.layers:
            if known.driver is None:
                layer, kind = known.index, ASK
                break
            if known.length <= offset:
                layer, kind = known.index, ZERO
                break
            stop = min(stop, known.length, known.driver.next_table(offset))
            if stop <= offset:
                return None
        return CellRun(stop - offset, layer, kind, -1)


def _layer_of(node: BlockIO) -> tuple[BlockIO, BlockDriver] | None:
    """The node and driver that answer for ``node``, filters that do nothing left out."""
    layer = getattr(node, "layer", None)
    return None if layer is None else cast("tuple[BlockIO, BlockDriver] | None", layer())


def _described(index: int, node: BlockIO, found: tuple[BlockIO, BlockDriver] | None) -> Layer:
    if found is not None and found[1].cell_unit is not None:
        try:
            return Layer(index, found[0], found[1])
        except OSError:
            pass  # its file is not there at the moment: who needs it gets the error
    return Layer(index, node, None)
