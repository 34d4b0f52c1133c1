"""Host clusters for what was never written, so that later writes need no allocation.

Specification: qapi/block-core.json, PreallocMode. Runs on: the event loop, in a task of the engine,
with no guest request in flight; ``falloc`` in a thread.

Invariants: new clusters read as zeros; entries reach the disk after the file has been grown for
them, and a crash or an error leaves a part of the range allocated. Errors: OSError (ENOSPC),
``DamageError``, ``BlockError`` (ENOTSUP) before anything is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
from errno import ENOTSUP

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import COPIED, ZERO
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.storage.hostcalls import punch_hole

#: bytes written at a time
_PIECE = 1 << 20


class Preallocation(enum.StrEnum):
    """How much is done beforehand."""

    OFF = "off"
    METADATA = "metadata"  # tables; the data are holes
    FALLOC = "falloc"  # and space of the host
    FULL = "full"  # and written zeros


async def preallocate(
    metadata: Metadata, committer: Committer, mode: Preallocation, offset: int, length: int
) -> None:
    """Allocate what has no cluster in a range of the disk, in bytes. Durable on return."""
    if mode is Preallocation.OFF or not length:
        return
    geometry = metadata.geometry
    if metadata.header.crypt_method and not geometry.has_zero_clusters:
        raise BlockError("Encrypted images of version 2 cannot be preallocated", errno=ENOTSUP)
    cluster = offset >> geometry.cluster_bits
    end = geometry.clusters(offset + length)
    while cluster < end:
        l1_index, index = divmod(cluster, geometry.l2_entries)
        part = min(end - cluster, geometry.l2_entries - index)
        table = await metadata.writable(l1_index)
        table.pins += 1
        try:
            free = np.flatnonzero(table.entries[index : index + part] == 0) + index
            breaks = np.flatnonzero(np.diff(free) != 1) + 1
            for run in np.split(free, breaks):
                first, count = (int(run[0]), len(run)) if len(run) else (0, 0)
                while count:
                    guest = cluster + first - index
                    host_offset, found, fresh = await metadata.allocate_data(guest, count)
                    size = found << geometry.cluster_bits
                    try:
                        await _prepare(metadata, mode, host_offset, size, fresh=fresh)
                    except OSError:
                        await _give_up(metadata, host_offset, found)
                        raise
                    _publish(metadata, table, first, host_offset, found)
                    first, count = first + found, count - found
        finally:
            table.pins -= 1
        if len(metadata.dirty_tables) * 2 > metadata.max_tables:
            await committer.flush()
        cluster += part
        await asyncio.sleep(0)
    await committer.flush()


async def _give_up(metadata: Metadata, host_offset: int, clusters: int) -> None:
    """Clusters that nothing refers to; with their space, which tables may be waiting for."""
    host = metadata.data.host_file()
    if metadata.has_data_file:
        return  # they are the disk's, and nobody has written there
    if host is not None:
        length = clusters << metadata.geometry.cluster_bits
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # a file system without holes
            await loop.run_in_executor(None, punch_hole, host.fd, host_offset, length)
    metadata.free_data(host_offset, clusters)


def _publish(metadata: Metadata, table: L2Table, first: int, host_offset: int, count: int) -> None:
    """The clusters are there; subclusters of them are not: a backing file shows through."""
    encrypted = bool(metadata.header.crypt_method)
    if table.bitmaps is None and not encrypted:
        metadata.publish_run(table, first, host_offset, count)
        return
    hosts = np.arange(count, dtype=np.uint64) << np.uint64(metadata.geometry.cluster_bits)
    words = hosts + np.uint64(host_offset | COPIED)
    if table.bitmaps is None:
        # What nobody has encrypted would be noise decrypted: zeros until it is written to.
        metadata.publish(table, first, words | np.uint64(ZERO))
        return
    metadata.publish_words(table, first, words, np.zeros(count, np.uint64))


async def _prepare(
    metadata: Metadata, mode: Preallocation, host_offset: int, length: int, *, fresh: bool
) -> None:
    """Make the clusters read as zeros, with as much behind them as ``mode`` wants."""
    file = metadata.data
    end = host_offset + length
    if metadata.has_data_file:
        if mode is Preallocation.METADATA:
            return  # what the data file has is what the disk has
        end = min(end, file.length)
        length = end - host_offset
        if length <= 0:
            return
    if end > file.length:
        await file.truncate(end)
    host = file.host_file()
    if mode is Preallocation.FALLOC and host is not None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, os.posix_fallocate, host.fd, host_offset, length)
        if fresh:
            return
    elif mode is Preallocation.METADATA and fresh:
        return
    elif mode is Preallocation.METADATA:
        await file.write_zeroes(host_offset, length)
        return
    zeroes = bytes(min(_PIECE, length))
    for position in range(host_offset, end, len(zeroes)):
        await file.write(position, memoryview(zeroes)[: end - position])
