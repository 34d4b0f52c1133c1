"""Writes of compressed clusters: packed one behind the other into host clusters.

Specification: docs/interop/qcow2, "Compressed Clusters Descriptor".

Runs on: the event loop, in tasks of the engine; workers compress, several clusters at a time.
Invariants: those of ``cow``: a claim on the guest cluster, data before the entry, no wait between
the last look at the entry and the claim. Every entry counts one reference to each host cluster that
its data touches. What is not smaller compressed, and what has a host cluster of its own already
(where a guest may write to in place), is written plainly.
Errors: OSError, EINVAL for parts of clusters; ``DamageError``.
"""

from __future__ import annotations

import asyncio
from errno import EINVAL

import numpy as np

from liveblockd.formats.qcow2.allocator import BlockNeeded
from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.compression import deflate
from liveblockd.formats.qcow2.cow import Writer, write_bytes
from liveblockd.formats.qcow2.layout import COPIED
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.tables import CompressedRange, compressed_entry
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.blkdebug_events import step

#: bytes that are compressed at once
BATCH = 4 << 20


class Packer:
    """See the module."""

    def __init__(
        self, metadata: Metadata, claims: Claims, writer: Writer, workers: WorkerPool
    ) -> None:
        self._metadata = metadata
        self._claims = claims
        self._writer = writer
        self._workers = workers

    async def write(self, offset: int, data: memoryview) -> None:
        """Store whole clusters; the last one of the disk may be short. Raises OSError."""
        geometry = self._metadata.geometry
        size = geometry.cluster_size
        end = offset + len(data)
        if offset % size or (end % size and end != self._writer.disk_size):
            raise OSError(EINVAL, "not whole clusters")
        step = max(1, BATCH // size) * size
        kind = self._metadata.header.compression_type
        for start in range(0, len(data), step):
            stop = min(start + step, len(data))
            parts = [data[at : min(at + size, stop)] for at in range(start, stop, size)]
            jobs = [self._workers.run(deflate, part, size, kind) for part in parts]
            packed = await asyncio.gather(*jobs)
            for number, part in enumerate(parts):
                await self._store((offset + start) // size + number, part, packed[number])

    async def _store(self, cluster: int, data: memoryview, packed: bytes | None) -> None:
        metadata, claims = self._metadata, self._claims
        geometry = metadata.geometry
        index = cluster & (geometry.l2_entries - 1)
        while True:
            table = await metadata.writable(cluster // geometry.l2_entries)
            if cluster not in claims:
                break
            await claims.wait(cluster)
        if table.bad:
            metadata.check_entries(table, index, 1)
        if packed is None or table.view[index] & COPIED:
            await self._writer.write(cluster << geometry.cluster_bits, data)
            return
        claim = claims.take(cluster, 1)
        table.pins += 1
        place: CompressedRange | None = None
        try:
            place = CompressedRange(await self._allocate(len(packed)), len(packed))
            await step("write_compressed", write_bytes(metadata.file, place.host_offset, packed))
            entry = compressed_entry(place, geometry)
            metadata.publish(table, index, np.array([entry], np.uint64))
        except OSError:
            if place is not None:
                self._free(place)
            raise
        finally:
            table.pins -= 1
            claims.release(claim)

    async def _allocate(self, length: int) -> int:
        await self._metadata.event("cluster_alloc_bytes")
        await self._metadata.event("refblock_alloc")
        while True:
            try:
                host_offset = self._metadata.refcounts.allocate_bytes(length)
            except BlockNeeded as needed:
                await self._metadata.load_block(needed.index)
                continue
            self._metadata.on_dirty()
            return host_offset

    def _free(self, place: CompressedRange) -> None:
        bits = self._metadata.geometry.cluster_bits
        first = place.host_offset >> bits
        last = (place.host_offset + place.length - 1) >> bits
        self._metadata.quarantine.free(first << bits, last - first + 1, unmap=False)
