"""The writes of a repair, each of which makes an image less wrong.

Specification: docs/interop/qcow2, "Host cluster management".

Runs on: the event loop; the image is used by nobody else. Invariants: new refcount structures lie
behind everything else and are durable before the header names them, and the header changes in one
sector; refcounts are right before a COPIED flag says so. Errors: ``OSError``.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EFBIG

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.allocator import Counts, pack_counts
from liveblockd.formats.qcow2.check import CheckResult, L2Format
from liveblockd.formats.qcow2.header import Header, fixed_fields
from liveblockd.formats.qcow2.layout import (
    COPIED,
    ENTRY_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_HEADER_LENGTH_V3,
    SECTOR,
    ZERO,
    Geometry,
)
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.formats.qcow2.tables import Entries, to_disk
from liveblockd.storage.driver import BlockIO

_PER_SECTOR = SECTOR // ENTRY_BYTES


async def write_block(file: BlockIO, geometry: Geometry, offset: int, counts: Counts) -> None:
    """A refcount block in its place; not yet durable."""
    assert offset > 0
    await file.write(offset, pack_counts(counts, geometry.refcount_order))


async def zero_entries(
    file: BlockIO, form: L2Format, places: list[tuple[int, int]], result: CheckResult
) -> None:
    """Entries (host offset of the L2 table, index) become plain zero clusters; durable."""
    zero = ZERO if not form.extended else 0
    for table, index in places:
        entry = to_disk(np.array([zero, ((1 << 32) - 1) << 32][: form.words], np.uint64))
        await file.write(table + index * form.words * ENTRY_BYTES, entry)
    await file.flush()
    result.corruptions -= len(places)
    result.corruptions_fixed += len(places)


async def flip_copied(
    file: BlockIO, offset: int, table: Entries, indices: npt.NDArray[np.intp]
) -> None:
    """Change the COPIED flag of entries, sector by sector; ``table`` too. Not yet durable."""
    table[indices] ^= np.uint64(COPIED)
    for sector in np.unique(indices // _PER_SECTOR).tolist():
        part = table[sector * _PER_SECTOR : (sector + 1) * _PER_SECTOR]
        await file.write(offset + sector * SECTOR, to_disk(part))


async def write_refcounts(file: BlockIO, header: Header, counts: Counts) -> tuple[Header, Entries]:
    """New blocks and a new table for ``counts``, behind all of it; the header names them, durable.

    ``counts`` are references without those to the old structures, whose clusters are free then.
    """
    geometry = header.geometry
    size, per_block = geometry.cluster_size, geometry.refcounts_per_block
    base = max(len(counts), geometry.clusters(file.length))
    padded = -(-base // per_block) * per_block
    used = np.zeros(padded, counts.dtype)
    used[: len(counts)] = counts
    wanted = np.flatnonzero(used.reshape(-1, per_block).any(axis=1)).tolist()
    blocks, table_clusters = len(wanted), 1
    while True:  # the structures describe themselves
        end = base + blocks + table_clusters
        own = range(base // per_block, -(-end // per_block))
        indices = sorted({*wanted, *own})
        clusters = geometry.clusters((indices[-1] + 1) * ENTRY_BYTES)
        if (len(indices), clusters) == (blocks, table_clusters):
            break
        blocks, table_clusters = len(indices), clusters
    if table_clusters * size > MAX_REFCOUNT_TABLE_BYTES:
        raise OSError(EFBIG, "the refcount table would be too large")
    table = np.zeros(table_clusters * geometry.table_entries, np.uint64)
    for number, index in enumerate(indices):
        block = np.zeros(per_block, counts.dtype)
        part = used[index * per_block : (index + 1) * per_block]
        block[: len(part)] = part
        first, last = max(0, base - index * per_block), min(per_block, end - index * per_block)
        if first < last:
            block[first:last] = 1
        offset = (base + number) * size
        table[index] = offset
        await file.write(offset, pack_counts(block, geometry.refcount_order))
    table_offset = (base + blocks) * size
    await file.write(table_offset, to_disk(table))
    await file.flush()
    changed = replace(
        header, refcount_table_offset=table_offset, refcount_table_clusters=table_clusters
    )
    await _write_header(file, changed)
    return changed, table


async def clear_marks(file: BlockIO, header: Header, marks: int) -> Header:
    """Take bits of incompatible_features away; durable."""
    changed = replace(header, incompatible=header.incompatible & ~marks)
    await _write_header(file, changed)
    return changed


async def _write_header(file: BlockIO, header: Header) -> None:
    """The fixed fields; what else is in the first sector stays."""
    length = min(MIN_HEADER_LENGTH_V3, header.header_length)
    sector = bytes(await read_bytes(file, 0, SECTOR))
    await file.write(0, fixed_fields(header)[:length] + sector[length:])
    await file.flush()
