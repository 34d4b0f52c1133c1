"""An image as a layer of a chain that is read through one flat map: its tables as arrays of cells.

Specification: docs/interop/qcow2, "Cluster mapping"; ``storage/cells.py``.

Runs on: the event loop. Invariants: tables that are in memory are used, others are read and not
kept, for the map keeps what they say: a deep chain does not fill the memory with tables. Entries
that cannot be say "ask this image", which raises what is to be raised.
Errors: OSError from below; ``DamageError`` for a table that cannot be.
"""

from __future__ import annotations

import asyncio

import numpy as np

from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import OFFSET_MASK
from liveblockd.formats.qcow2.mapping import kinds
from liveblockd.formats.qcow2.metadata import Metadata, read_bytes
from liveblockd.formats.qcow2.subclusters import SUBCLUSTERS, expand, has_mixed
from liveblockd.formats.qcow2.tables import Entries
from liveblockd.storage.cells import ASK_CELL, DATA, KIND_SHIFT, Cells, pack, refine

_SUBCLUSTER_BITS = SUBCLUSTERS.bit_length() - 1


def cell_unit(metadata: Metadata) -> tuple[int, int]:
    """(log2 of a cluster, or of a subcluster where there are some; bytes of an L2 table's span)."""
    geometry = metadata.geometry
    bits = geometry.cluster_bits
    return bits - (_SUBCLUSTER_BITS if geometry.extended_l2 else 0), geometry.span


async def cells(metadata: Metadata, offset: int, length: int, bits: int) -> Cells | None:
    """See ``BlockDriver.cells``."""
    span = metadata.geometry.span
    found: Cells | None = None
    position, end = next_table(metadata, offset), offset + length
    while position < end:
        start, stop = max(offset, position), min(end, (position // span + 1) * span)
        table = metadata.tables.get(position // span)
        if table is None:
            table = await _look(metadata, position // span)
            await asyncio.sleep(0)  # it took a fraction of a millisecond, and a chain has many
        if table is not None:
            answer = _of_table(metadata, table, start, stop - start, bits)
            if found is None:
                if len(answer) == length >> bits:
                    return answer
                found = np.zeros(length >> bits, np.int64)
            found[start - offset >> bits : stop - offset >> bits] = answer
        position = next_table(metadata, stop)
    return found


def cells_now(metadata: Metadata, offset: int, length: int, bits: int) -> Cells | None:
    """See ``BlockDriver.cells_now``."""
    span = metadata.geometry.span
    found = np.zeros(length >> bits, np.int64)
    position, end = next_table(metadata, offset), offset + length
    while position < end:
        start, stop = max(offset, position), min(end, (position // span + 1) * span)
        table = metadata.tables.get(position // span)
        if table is None:
            return None
        part = slice(start - offset >> bits, stop - offset >> bits)
        found[part] = _of_table(metadata, table, start, stop - start, bits)
        position = next_table(metadata, stop)
    return found


def next_table(metadata: Metadata, offset: int) -> int:
    """``offset``, or where the next L2 table begins if there is none for it."""
    span, view = metadata.geometry.span, metadata.l1_view
    index = offset // span
    if index < len(view) and view[index]:
        return offset
    index = next_l1(metadata, index)
    return index * span if index < len(view) else 1 << 63


def next_l1(metadata: Metadata, l1_index: int) -> int:
    """The first L1 index after ``l1_index`` that has a table, or the end of the L1 table."""
    view = metadata.l1_view
    size = len(view)
    for step in range(l1_index + 1, min(l1_index + 64, size)):
        if view[step]:
            return step
    rest = metadata.l1[l1_index + 1 :] != 0
    hit = int(rest.argmax()) if len(rest) else 0
    return l1_index + 1 + hit if len(rest) and rest[hit] else size


async def _look(metadata: Metadata, l1_index: int) -> L2Table | None:
    """A table that is not in memory, for now; it is not kept."""
    host_offset = metadata.l2_offset(l1_index)
    if not host_offset:
        return None
    # A cluster that is freed meanwhile is not given to somebody else before this has ended.
    epoch = metadata.quarantine.enter()
    try:
        data = await read_bytes(metadata.file, host_offset, metadata.geometry.cluster_size)
    finally:
        metadata.leave(epoch)
    table = metadata.tables.get(l1_index)
    return table or metadata.parse(l1_index, host_offset, data, exclusive=False)


def _plain(entries: Entries) -> Cells:
    """Cells of entries none of which is MIXED; most of them are 0, mostly."""
    places = np.flatnonzero(entries != 0)
    if len(places) * 4 > len(entries):
        return pack(kinds(entries), entries & np.uint64(OFFSET_MASK))
    few = entries[places]
    found = np.zeros(len(entries), np.int64)
    found[places] = pack(kinds(few), few & np.uint64(OFFSET_MASK))
    return found


def _of_table(metadata: Metadata, table: L2Table, offset: int, length: int, bits: int) -> Cells:
    """What one table says of a range within its span."""
    geometry = metadata.geometry
    unit = geometry.cluster_bits
    start = offset & (geometry.span - 1)
    first, last = start >> unit, start + length - 1 >> unit
    part = table.entries[first : last + 1]
    if table.bitmaps is not None and has_mixed(part):
        kind, hosts = expand(part, table.bitmaps[first : last + 1], unit)
        repeat = unit - _SUBCLUSTER_BITS
        found = pack(kind, hosts)
    else:
        found, repeat = _plain(part), unit
    if metadata.stores is not metadata.children:  # its bytes are not those of the file
        found[(found >> KIND_SHIFT & 3) == DATA] = ASK_CELL
    found = refine(found, repeat - bits, bits)
    factor = unit - bits
    for index in table.bad:
        if first <= index <= last:
            found[index - first << factor : index - first + 1 << factor] = ASK_CELL
    skip = start - (first << unit) >> bits
    return found[skip : skip + (length >> bits)]
