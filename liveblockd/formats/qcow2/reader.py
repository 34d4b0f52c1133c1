"""Guest reads that have to wait, and what a range of the disk is made of.

Specification: docs/interop/qcow2, "Cluster mapping".

Runs on: the event loop; clusters are decompressed by workers. A request is in the quarantine's
epoch from before it looks at an entry until it has its bytes, so that no host cluster it goes to
is given to somebody else meanwhile.
Errors: OSError from below; ``DamageError``; EIO for compressed data that is no cluster.
"""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np

from liveblockd.formats.qcow2.cells import next_l1
from liveblockd.formats.qcow2.encrypted import LegacyAesStore
from liveblockd.formats.qcow2.inflating import inflate_clusters, inflate_into
from liveblockd.formats.qcow2.layout import OFFSET_MASK
from liveblockd.formats.qcow2.mapping import append_extent, runs
from liveblockd.formats.qcow2.metadata import Metadata, read_bytes
from liveblockd.formats.qcow2.tables import compressed_range
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.blkdebug_events import step
from liveblockd.storage.driver import Buffer, Extent, ExtentKind, Packed
from liveblockd.storage.flatmap import FlatMap

#: bytes that one job inflates: enough that the way to a worker and back costs little
INFLATE_BATCH = 512 << 10
#: extents in one answer of ``map``
MAP_LIMIT = 4096
_OFFSET_BITS = np.uint64(OFFSET_MASK)


class _Part:
    """A piece of a request: where it goes, and where its bytes come from."""

    __slots__ = ("entries", "extent", "guest_offset")

    def __init__(self, guest_offset: int, extent: Extent, entries: list[int]) -> None:
        self.guest_offset = guest_offset
        self.extent = extent
        self.entries = entries  # of compressed clusters


class Reader:
    """Reads of one image; ``below`` is the driver's map of its backing chain."""

    def __init__(
        self,
        metadata: Metadata,
        below: FlatMap,
        workers: WorkerPool,
    ) -> None:
        self._metadata = metadata
        self._below = below
        self._workers = workers

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes as the guest sees them; the caller is in an epoch of the quarantine."""
        parts: list[_Part] = []
        position, end = offset, offset + length
        span = self._metadata.geometry.span
        while position < end:
            stop = min(end, (position // span + 1) * span)
            parts.extend(await self._parts(position, stop - position))
            position = stop
        if len(parts) == 1:
            return await self._read_part(parts[0])
        result = bytearray(length)
        for part in parts:
            if part.extent.kind is ExtentKind.ZERO:
                continue
            start = part.guest_offset - offset
            result[start : start + part.extent.length] = await self._read_part(part)
        return result

    async def _parts(self, offset: int, length: int) -> list[_Part]:
        """The parts of a range within the span of one L2 table."""
        metadata = self._metadata
        geometry = metadata.geometry
        bits = geometry.cluster_bits
        table = await metadata.load(offset // geometry.span)
        if table is None:
            return [_Part(offset, Extent(length, ExtentKind.UNALLOCATED), [])]
        start = offset & (geometry.span - 1)
        if table.bad:
            first = start >> bits
            metadata.check_entries(table, first, (start + length - 1 >> bits) - first + 1)
        found = []
        for run in runs(table.entries, table.bitmaps, start, length, bits):
            entries = []
            if run.kind is ExtentKind.COMPRESSED:
                last = run.start + run.length - 1 >> bits
                entries = table.entries[run.start >> bits : last + 1].tolist()
            extent = Extent(run.length, run.kind, run.host_offset)
            found.append(_Part(offset + run.start - start, extent, entries))
        return found

    async def _read_part(self, part: _Part) -> Buffer:
        length, kind, host_offset = part.extent
        if kind is ExtentKind.DATA:
            data = self._metadata.data
            if isinstance(data, LegacyAesStore):
                return await data.read_guest(part.guest_offset, host_offset, length)
            return await read_bytes(data, host_offset, length)
        if kind is ExtentKind.UNALLOCATED:
            if "backing" in self._metadata.children:
                await self._metadata.event("read_backing_aio")
            return await self.read_backing(part.guest_offset, length)
        if kind is ExtentKind.ZERO:
            return bytes(length)
        return await self._read_compressed(part)

    async def read_backing(self, offset: int, length: int) -> Buffer:
        """The bytes below this image; zeros beyond its end or without it."""
        return await self._below.read(offset, length)

    async def _read_compressed(self, part: _Part) -> Buffer:
        """Neighbours are read together, and several workers inflate their share of a request."""
        size = self._metadata.geometry.cluster_size
        skip = part.guest_offset % size
        entries = part.entries[: -(-(skip + part.extent.length) // size)]
        batch = max(1, INFLATE_BATCH // size)
        batches = [
            await step("read_compressed", self._read_packed(entries[start : start + batch]))
            for start in range(0, len(entries), batch)
        ]
        compression = self._metadata.header.compression_type
        result = np.empty(len(entries) * size, np.uint8)
        jobs = []
        for number, packed in enumerate(batches):
            place = result[number * batch * size :][: len(packed) * size]
            jobs.append(self._workers.submit(inflate_into, place, packed, size, compression))
        await asyncio.gather(*jobs)
        return result.data[skip : skip + part.extent.length]

    async def _read_packed(self, entries: list[int]) -> list[Buffer]:
        """The compressed bytes of each of these clusters; what follows them may come with them."""
        geometry, file = self._metadata.geometry, self._metadata.file
        places = [compressed_range(entry, geometry) for entry in entries]
        low = min(place.host_offset for place in places)
        high = max(place.host_offset + place.length for place in places)
        if high - low > 2 * sum(place.length for place in places):
            return [await read_bytes(file, place.host_offset, place.length) for place in places]
        data = memoryview(await read_bytes(file, low, high - low))
        return [data[place.host_offset - low :][: place.length] for place in places]

    async def packed(self, offset: int, length: int) -> Packed | None:
        """See ``BlockDriver.packed``."""
        metadata = self._metadata
        host = metadata.file.host_file()
        span, size = metadata.geometry.span, metadata.geometry.cluster_size
        if host is None or offset % size:
            return None
        places: list[tuple[int, int]] = []
        position, end = offset, offset + length
        while position < end:
            stop = min(end, (position // span + 1) * span)
            for part in await self._parts(position, stop - position):
                if part.extent.kind is not ExtentKind.COMPRESSED:
                    return None
                places += [compressed_range(entry, metadata.geometry) for entry in part.entries]
            position = stop
        compression = metadata.header.compression_type
        unpack = partial(inflate_clusters, size=size, compression=compression)
        return Packed(host, places, size, unpack)

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Extents of a prefix of the range; whole spans without a table cost nothing."""
        metadata = self._metadata
        span = metadata.geometry.span
        extents: list[Extent] = []
        position, end = offset, offset + length
        while position < end and len(extents) < MAP_LIMIT:
            l1_index = position // span
            if not metadata.l2_offset(l1_index):
                stop = min(end, next_l1(metadata, l1_index) * span)
                append_extent(extents, Extent(stop - position, ExtentKind.UNALLOCATED))
            else:
                if extents and l1_index not in metadata.tables:
                    break  # what is known is answered before the disk is asked
                stop = min(end, (l1_index + 1) * span)
                for part in await self._parts(position, stop - position):
                    append_extent(extents, part.extent)
            position = stop
        return extents

    async def map_zeroes(self, offset: int, length: int) -> list[Extent]:
        """Extents of a range of zero clusters: ``host_offset`` says where they are preallocated."""
        metadata = self._metadata
        geometry = metadata.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        extents: list[Extent] = []
        position, end = offset, offset + length
        while position < end:
            stop = min(end, (position // geometry.span + 1) * geometry.span)
            table = await metadata.load(position // geometry.span)
            first = position >> bits & (geometry.l2_entries - 1)
            count = (stop - 1 >> bits) - (position >> bits) + 1
            hosts = np.zeros(0, np.uint64)
            if table is not None:
                hosts = table.entries[first : first + count] & _OFFSET_BITS
            if not np.any(hosts):  # mostly none is kept
                last = extents[-1] if extents else None
                if last is not None and last.host_offset == -1:
                    extents[-1] = last._replace(length=last.length + stop - position)
                else:
                    extents.append(Extent(stop - position, ExtentKind.ZERO))
                position = stop
                continue
            for host in map(int, hosts):
                inside = position & (size - 1)
                part = min(stop - position, size - inside)
                place = host + inside if host else -1
                last = extents[-1] if extents else None
                if last is not None and (
                    place == last.host_offset == -1
                    or (place >= 0 and place == last.host_offset + last.length)
                ):
                    extents[-1] = last._replace(length=last.length + part)
                else:
                    extents.append(Extent(part, ExtentKind.ZERO, place))
                position += part
        return extents
