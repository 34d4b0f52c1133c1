"""How many bytes a qcow2 image takes.

Specification: docs/interop/qcow2; the figures are those of ``qemu-img measure``: header, L1 table,
L2 tables for the whole disk, and refcounts of all that, each from a cluster boundary on.

Runs on: pure. All sizes are bytes.
Errors: ``BlockError`` for a disk that is too large for its clusters.
"""

from __future__ import annotations

from collections.abc import Iterable
from errno import EFBIG

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.bitmaps import BitmapEntry, data_entries, serialise_directory
from liveblockd.formats.qcow2.layout import ENTRY_BYTES, MAX_L1_BYTES, Geometry


def allocated_bytes(geometry: Geometry, disk_size: int) -> int:
    """An image that has every cluster of the disk, with all its tables; raises BlockError."""
    l2_tables = geometry.l1_size(disk_size)
    l1_bytes = l2_tables * ENTRY_BYTES
    if l1_bytes > MAX_L1_BYTES:
        raise BlockError(
            "The image size is too large (try using a larger cluster size)", errno=EFBIG
        )
    used = 1 + geometry.clusters(l1_bytes) + l2_tables + geometry.clusters(disk_size)
    return (used + _refcount_clusters(geometry, used)) * geometry.cluster_size


def _refcount_clusters(geometry: Geometry, used: int) -> int:
    """Clusters of refcount blocks and table, which count ``used`` clusters and themselves."""
    blocks = table = 0
    while True:
        needed = -(-(used + table + blocks) // geometry.refcounts_per_block)
        found = needed, geometry.clusters(needed * ENTRY_BYTES)
        if found == (blocks, table):
            return blocks + table
        blocks, table = found


def bitmap_bytes(geometry: Geometry, disk_size: int, bitmaps: Iterable[tuple[str, int]]) -> int:
    """What bitmaps, given as (name, granularity), take when all of them is stored."""
    entries = [
        BitmapEntry(name.encode("utf-8", "surrogateescape"), 0, 0, 0, granularity.bit_length() - 1)
        for name, granularity in bitmaps
    ]
    used = geometry.clusters(len(serialise_directory(entries)))
    for entry in entries:
        data = data_entries(entry, disk_size, geometry)
        used += data + geometry.clusters(data * ENTRY_BYTES)
    return used * geometry.cluster_size
