"""What is said of damage: the words of BLOCK_IMAGE_CORRUPTED, QEMU's where it has them.

Specification: qapi/block-core.json, BLOCK_IMAGE_CORRUPTED. Runs on: pure. Errors: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from liveblockd.formats.qcow2.layout import OFFSET_MASK
from liveblockd.formats.qcow2.tables import DamageError, shown

if TYPE_CHECKING:
    from liveblockd.formats.qcow2.metadata import Metadata


def bad_offset(metadata: Metadata, what: str, offset: int, where: str) -> DamageError:
    """An entry (``where``) that names ``offset``; of an unaligned one QEMU says no range."""
    size = metadata.geometry.cluster_size
    if offset % size:
        return DamageError(f"{what} offset {shown(offset)} unaligned ({where})")
    reason = f"overlaps with {use_of(metadata, offset)}"
    return DamageError(
        f"{what} offset {shown(offset)} invalid ({where}, {reason})", offset=offset, size=size
    )


def use_of(metadata: Metadata, host_offset: int) -> str:
    """What a cluster holds."""
    size = metadata.geometry.cluster_size
    refcounts = metadata.refcounts
    for name, start, clusters in (
        ("qcow2_header", 0, 1),
        ("active L1 table", metadata.l1_offset, metadata.l1_clusters),
        ("refcount table", refcounts.table_offset, refcounts.table_clusters),
    ):
        if start <= host_offset < start + clusters * size:
            return name
    cluster = np.uint64(host_offset // size * size)
    if (refcounts.table == cluster).any():
        return "refcount block"
    if ((metadata.l1 & np.uint64(OFFSET_MASK)) == cluster).any():
        return "active L2 table"
    return "other metadata or the end of the file"
