"""Growing and shrinking the virtual disk.

Specification: docs/interop/qcow2, "Header" (size, l1_size). Runs on: the event loop, in a task of
the engine, with no guest request in flight.

Invariants: new bytes read as zeros, whatever the backing file has there; the new size is durable
when ``resize`` returns. A crash leaves the old size or the new one. Growing makes the zeros durable
before the size that shows them. Shrinking first stores the size and then frees what is beyond it,
so that an old size never goes with freed clusters; what a crash leaves there, growing frees.
Errors: ``BlockError`` in QEMU's words; OSError.
"""

from __future__ import annotations

import logging
from errno import EFBIG, ENOTSUP

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.cow import Writer
from liveblockd.formats.qcow2.layout import ENTRY_BYTES, MAX_DISK_SIZE, MAX_L1_BYTES, SECTOR
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.tables import DamageError
from liveblockd.formats.qcow2.zeroes import Eraser

log = logging.getLogger(__name__)


async def resize(
    metadata: Metadata, committer: Committer, writer: Writer, eraser: Eraser, size: int
) -> None:
    """Make the disk ``size`` bytes long; ``writer.disk_size`` is the size before and after."""
    if size > MAX_DISK_SIZE:
        raise BlockError(f"offset({size}) exceeds maximum({MAX_DISK_SIZE})", errno=EFBIG)
    if size % SECTOR:
        raise BlockError("The new size must be a multiple of 512")
    if metadata.header.nb_snapshots and metadata.header.version < 3:
        raise BlockError("Can't resize a v2 image which has snapshots", errno=ENOTSUP)
    old_size = writer.disk_size
    if size > old_size:
        await _grow_l1(metadata, size)
        if metadata.has_data_file and metadata.data.length < size:
            await metadata.data.truncate(size)
    writer.disk_size = size
    try:
        if size > old_size:
            await _zero_new_part(metadata, eraser, old_size, size)
            await committer.flush()
        metadata.pending_fields["size"] = size
        metadata.on_dirty()
        await committer.flush()
    except BaseException:
        writer.disk_size = old_size
        # The header may be on the disk already: what is durable next is durable with the old size.
        metadata.pending_fields["size"] = old_size
        metadata.on_dirty()
        raise
    if size < old_size:
        await _give_back(metadata, committer, eraser, old_size, size)


async def _give_back(
    metadata: Metadata, committer: Committer, eraser: Eraser, old_size: int, size: int
) -> None:
    """Free what is behind the new end. It has that end already: what cannot be freed leaks."""
    first = metadata.geometry.clusters(size)
    try:
        await eraser.drop(first, metadata.geometry.clusters(old_size) - first)
        await committer.flush()
    except DamageError:
        raise
    except OSError as error:
        log.warning("clusters beyond the new end of the disk were not freed: %s", error)
        return
    if metadata.has_data_file and metadata.data.length > size:
        try:
            await metadata.data.truncate(size)
        except (OSError, BlockError) as error:
            log.warning("the data file was not made shorter: %s", error)


async def _grow_l1(metadata: Metadata, size: int) -> None:
    needed = metadata.geometry.l1_size(size)
    if needed <= len(metadata.l1):
        return
    if needed * ENTRY_BYTES > MAX_L1_BYTES:
        raise BlockError("Failed to grow the L1 table: File too large", errno=EFBIG)
    clusters = metadata.geometry.clusters(needed * ENTRY_BYTES)
    await metadata.event("l1_grow_alloc_table", "cluster_alloc", "refblock_alloc")
    host_offset = await metadata.allocate_exactly(clusters)
    await metadata.event("l1_grow_write_table", "l1_grow_activate_table")
    entries = np.zeros(needed, np.uint64)
    entries[: len(metadata.l1)] = metadata.l1
    metadata.replace_l1(entries, host_offset)
    await metadata.event("cluster_free", "refblock_alloc")


async def _zero_new_part(metadata: Metadata, eraser: Eraser, old_size: int, size: int) -> None:
    """What is behind the old end in its last cluster, and what the backing file has further on."""
    cluster_size = metadata.geometry.cluster_size
    first = metadata.geometry.clusters(old_size)
    await eraser.drop(first, metadata.geometry.clusters(size) - first)
    edge = min(size, first * cluster_size)
    if old_size < edge:
        await eraser.write_zeroes(old_size, edge - old_size, may_unmap=False, fast_only=False)
    backing = metadata.children.get("backing")
    if backing is None or backing.length <= edge:
        return
    # Whole clusters, so that no other cluster is read and copied for a few bytes of zeros.
    end = min(size, -(-backing.length // cluster_size) * cluster_size)
    if edge < end:
        await eraser.write_zeroes(edge, end - edge, may_unmap=False, fast_only=False)
