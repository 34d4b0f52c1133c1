"""A job's copy into the image, below every guest write: streamed data.

Specification: README.md, invariant 1; ``storage.driver.BlockDriver.populate``.

Runs on: the event loop, in tasks of the engine; ``populate_from`` copies on workers.
Invariants: clusters are published by compare-and-set: an entry that is no longer unallocated, or
a cluster that a guest write has claimed, wins over the copy, whose cluster is freed. No claim
is taken, so a guest write never waits (but see ``_complete``). On return every cluster of the range
is held by this image: where a guest write failed, its cluster has been copied again.
Errors: OSError; ``DamageError``; ``HaltedError``. Clusters that were published before it stay.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from errno import EINVAL, ENOTSUP

import numpy as np

from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.cow import Writer
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, MIXED, OFFSET_MASK, ZERO
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.subclusters import SUBCLUSTERS, lowest_run, mask
from liveblockd.formats.qcow2.zeroes import Eraser
from liveblockd.runtime import halting
from liveblockd.runtime.halting import HaltedError
from liveblockd.runtime.workers import Lane, WorkerPool
from liveblockd.storage import copy_engine, hostcalls
from liveblockd.storage.copy_engine import Copied, Transfer, Zeroes
from liveblockd.storage.driver import Buffer, HostFile, Packed
from liveblockd.storage.flags import run_length, runs_of
from liveblockd.storage.unpacking import Unpacking, unpack_clusters

#: bytes that are copied at a time: what is lost when the last cluster of them fails
MAX_COPY = 64 << 20
#: the same where a guest write to one of the clusters would have to wait
MAX_CLAIMED_COPY = 1 << 20
#: what goes through memory at a time where no worker can copy
PUT = 2 << 20

#: Gives the bytes of one cluster of the request, padded at the end of the disk.
_Read = Callable[[int], Awaitable[Buffer]]
#: Puts clusters ``start`` to ``start + count`` of the request at a host offset and says which of
#: them are zeros (those were not written).
_Fill = Callable[[int, int, int], Awaitable[Zeroes | None]]


def clone_or_copy(transfer: Transfer) -> Copied:
    """On a worker: ``copy_engine.clone_or_copy``.

    Closes both descriptors: duplicates, so that a node that is closed meanwhile does no harm.
    """
    try:
        return copy_engine.clone_or_copy(transfer)
    finally:
        os.close(transfer.source_fd)
        os.close(transfer.fd)


def read_and_close(fd: int, offset: int, length: int, direct: bool) -> bytes:
    """On a worker: bytes of a file, zeros past its end; closes the (duplicated) descriptor."""
    try:
        if direct:
            return bytes(hostcalls.read_direct(fd, offset, length, copy_engine.CLONE_ALIGNMENT))
        return bytes(hostcalls.read(fd, offset, length))
    finally:
        os.close(fd)


class Populator:
    """See the module."""

    def __init__(
        self,
        metadata: Metadata,
        claims: Claims,
        writer: Writer,
        eraser: Eraser,
        workers: WorkerPool,
    ) -> None:
        self._metadata = metadata
        self._claims = claims
        self._writer = writer
        self._eraser = eraser
        self._workers = workers
        self._lane: Lane | None = None
        #: bytes of ``populate_from`` that share the source's extents, and that a worker copied
        self.cloned = 0
        self.copied = 0
        #: clusters of ``populate_packed``
        self.unpacked = 0

    async def populate(self, offset: int, data: Buffer) -> None:
        """Store data of the chain below; whole clusters, but for the end of the disk."""
        size = self._metadata.geometry.cluster_size
        self._check(offset, len(data))
        view = memoryview(data)
        count = -(-len(data) // size)
        zero = np.zeros(count, np.bool_)
        whole = len(data) // size
        if self.has_zero_clusters:
            zero[:whole] = copy_engine.zero_clusters(view[: whole * size], size)
            if whole < count:
                zero[whole] = copy_engine.is_zero(view[whole * size :])

        async def fill(start: int, clusters: int, host_offset: int) -> Zeroes | None:
            part = view[start * size : (start + clusters) * size]
            if len(part) < clusters * size:
                part = memoryview(bytes(part).ljust(clusters * size, b"\0"))
            await self._writer.put(host_offset, part)
            return None

        async def read(start: int) -> Buffer:
            return bytes(view[start * size : (start + 1) * size]).ljust(size, b"\0")

        await self._populate(offset // size, count, zero, fill, read)

    async def populate_zeroes(self, offset: int, length: int) -> None:
        """The same for zeros: zero clusters, or real zeros in version 2."""
        geometry = self._metadata.geometry
        self._check(offset, length)
        count = geometry.clusters(length)

        async def fill(start: int, clusters: int, host_offset: int) -> Zeroes | None:
            del start
            length = clusters * geometry.cluster_size
            if self._metadata.has_data_file:
                length = min(length, self._writer.disk_size - host_offset)
            await self._metadata.data.write_zeroes(host_offset, length)
            return None

        async def read(start: int) -> Buffer:
            del start
            return bytes(geometry.cluster_size)

        zero = np.full(count, self.has_zero_clusters, np.bool_)
        await self._populate(offset // geometry.cluster_size, count, zero, fill, read)

    async def populate_from(
        self, offset: int, length: int, source: HostFile, source_offset: int
    ) -> None:
        """The same for bytes of a host file."""
        size = self._metadata.geometry.cluster_size
        self._check(offset, length)
        target = self._metadata.data.host_file()
        # O_DIRECT wants whole blocks; a target that is no host file, somebody to write to it.
        blocks = (source_offset | size) % copy_engine.CLONE_ALIGNMENT == 0
        by_worker = target is not None and (blocks or not (source.direct or target.direct))

        async def fill(start: int, clusters: int, host_offset: int) -> Zeroes | None:
            at = source_offset + start * size
            part = min(clusters * size, length - start * size)
            whole = part - part % size if by_worker else 0
            zero = np.zeros(clusters, np.bool_)
            if whole:
                assert target is not None
                zero[: whole // size] = await self._transfer(source, at, target, host_offset, whole)
            for done in range(whole, part, PUT):
                data = await self._read(source, at + done, min(PUT, part - done))
                await self._writer.put(
                    host_offset + done, data.ljust(-(-len(data) // size) * size, b"\0")
                )
            if not self.has_zero_clusters:
                # Version 2 has no zero clusters: they need real zeros.
                for index in np.flatnonzero(zero).tolist():
                    await self._writer.put(host_offset + index * size, bytes(size))
                return None
            return zero if zero.any() else None

        async def read(start: int) -> Buffer:
            at = source_offset + start * size
            data = await self._read(source, at, min(size, length - start * size))
            return data.ljust(size, b"\0")

        count = self._metadata.geometry.clusters(length)
        await self._populate(offset // size, count, np.zeros(count, np.bool_), fill, read)

    async def populate_packed(self, offset: int, length: int, packed: Packed) -> None:
        """The same for compressed clusters of a host file."""
        metadata = self._metadata
        size = metadata.geometry.cluster_size
        self._check(offset, length)
        target = metadata.data.host_file()
        direct = target is not None and target.direct
        if (
            target is None
            or metadata.has_data_file
            or size != packed.cluster_size
            or len(packed.places) != metadata.geometry.clusters(length)
            or (direct and size % copy_engine.CLONE_ALIGNMENT)
            or not self.has_zero_clusters
        ):
            raise OSError(ENOTSUP, os.strerror(ENOTSUP))

        async def fill(start: int, clusters: int, host_offset: int) -> Zeroes | None:
            places = packed.places[start : start + clusters]
            source_fd, fd = _duplicates(packed.file, target)
            work = Unpacking(
                source_fd,
                places,
                size,
                packed.unpack,
                fd,
                host_offset,
                packed.file.direct,
                direct,
            )
            zero = await halting.run(self._workers.copies, unpack_clusters, work)
            self.unpacked += clusters
            return zero if zero.any() else None

        async def read(start: int) -> Buffer:
            place = np.empty(size, np.uint8)
            host_offset, length = packed.places[start]
            data = np.frombuffer(await self._read(packed.file, host_offset, length), np.uint8)
            await self._workers.run(packed.unpack, place, data, [(0, length)])
            return place.data

        count = len(packed.places)
        await self._populate(offset // size, count, np.zeros(count, np.bool_), fill, read)

    async def _transfer(
        self, source: HostFile, at: int, target: HostFile, host_offset: int, length: int
    ) -> Zeroes:
        """Whole clusters, by a worker; which of them are zeros and were not written."""
        source_fd, fd = _duplicates(source, target)
        transfer = Transfer(
            source_fd,
            at,
            fd,
            host_offset,
            length,
            self._metadata.geometry.cluster_size,
            source.direct,
            target.direct,
        )
        copied = await halting.run(self.copying(target), clone_or_copy, transfer)
        self.cloned += copied.cloned
        self.copied += length - copied.cloned
        return copied.zero

    def copying(self, target: HostFile) -> Lane | WorkerPool:
        """The workers for copies to the image; those with O_DIRECT wait for the disk together."""
        if target.direct:
            return self._workers.copies
        if self._lane is None:
            in_memory = target.read_flags == 0  # nothing to wait for, as ``file`` found out
            self._lane = self._workers.lane(waits=not in_memory)
        return self._lane

    async def _read(self, source: HostFile, offset: int, length: int) -> bytes:
        fd = os.dup(source.fd)
        return await self._workers.run(read_and_close, fd, offset, length, source.direct)

    @property
    def has_zero_clusters(self) -> bool:
        """Whether zeros need not be written; who reads a raw data file alone must find them."""
        return self._metadata.geometry.has_zero_clusters and not self._metadata.raw_data_file

    def _check(self, offset: int, length: int) -> None:
        """The contract of ``populate``; raises OSError(EINVAL)."""
        size = self._metadata.geometry.cluster_size
        end = offset + length
        if offset % size or (end % size and end != self._writer.disk_size):
            raise OSError(EINVAL, "not whole clusters")

    async def _populate(
        self, first: int, count: int, zero: Zeroes, fill: _Fill, read: _Read
    ) -> None:
        """Make the image hold the clusters from ``first`` on; those in ``zero`` read as zeros."""
        metadata, claims = self._metadata, self._claims
        entries = metadata.geometry.l2_entries
        limit = MAX_CLAIMED_COPY if metadata.has_data_file else MAX_COPY
        limit = max(1, limit >> metadata.geometry.cluster_bits)
        done = 0
        while done < count:
            cluster = first + done
            index = cluster & (entries - 1)
            part = min(count - done, entries - index, limit)
            table = await metadata.writable(cluster // entries)
            if table.bad:
                metadata.check_entries(table, index, part)
            held = table.holds(index, part)
            if held[0]:
                done += run_length(held)
                continue
            if cluster in claims:
                await claims.wait(cluster)
                continue
            if table.view[index]:  # MIXED
                await self._complete(table, index, cluster, done, read)
                done += 1
                continue
            empty = table.entries[index : index + part] == 0
            run = claims.free_count(cluster, run_length(empty))
            wanted = zero[done : done + run]
            run = run_length(wanted if wanted[0] else ~wanted)
            if wanted[0]:
                if self._eraser.has_below:
                    metadata.publish(table, index, np.full(run, ZERO, np.uint64))
                done += run
                continue
            # What was lost to a guest write, or to its claim, is looked at again.
            await self._copy(table, index, cluster, run, done, fill)

    async def _complete(
        self, table: L2Table, index: int, cluster: int, start: int, read: _Read
    ) -> None:
        """Fill what is missing of one cluster that this image holds in parts.

        Here a claim is taken: a guest write to the same missing subclusters waits for this one
        write, whose data are in memory. The guest writes to the same host cluster, so that
        there is no place apart from which a copy could be published.
        """
        metadata, claims = self._metadata, self._claims
        geometry = metadata.geometry
        size = geometry.subcluster_size
        table.pins += 1
        try:
            data = memoryview(await read(start))
            while table.view[index] & (COMPRESSED | MIXED) == MIXED:
                if cluster in claims:
                    await claims.wait(cluster)
                    continue
                missing = table.missing(index)
                if not missing:
                    return
                first, end = lowest_run(missing)
                entry, part = table.view[index], data[first * size : end * size]
                if copy_engine.is_zero(part):
                    word = np.array([entry & (OFFSET_MASK | COPIED)], np.uint64)
                    bitmap = table.bitmap(index) | mask(first, end) << SUBCLUSTERS
                    metadata.publish_words(table, index, word, np.array([bitmap], np.uint64))
                    continue
                own = entry & OFFSET_MASK if entry & COPIED else None
                offset = (cluster << geometry.cluster_bits) + first * size
                await self._writer.write_new(table, cluster, 1, offset, part, own)
        finally:
            table.pins -= 1

    async def _copy(
        self, table: L2Table, index: int, cluster: int, count: int, start: int, fill: _Fill
    ) -> None:
        """Allocate, fill and publish up to ``count`` clusters."""
        metadata, claims = self._metadata, self._claims
        table.pins += 1
        claim = None
        if metadata.has_data_file:
            # The copy goes where a guest write would go: here that has to wait.
            claim = claims.take(cluster, count)
        try:
            host_offset, count, _ = await metadata.allocate_data(cluster, count)
            try:
                zero = await fill(start, count, host_offset)
            except (OSError, HaltedError):
                metadata.free_data(host_offset, count)
                raise
            # From here on no await: compare and set.
            self.publish_copy(table, index, host_offset, count, zero, claimed=claim is not None)
        finally:
            table.pins -= 1
            if claim is not None:
                claims.release(claim)

    def publish_copy(
        self,
        table: L2Table,
        index: int,
        host_offset: int,
        count: int,
        zero: Zeroes | None,
        *,
        claimed: bool,
    ) -> bool:
        """Clusters at ``host_offset`` have a copy, but for those in ``zero``: compare and set.

        What a guest write has taken meanwhile, or claimed (unless by the ``claimed`` of the
        caller), is freed: False, and the range is to be looked at again.
        """
        metadata, claims = self._metadata, self._claims
        size = metadata.geometry.cluster_size
        cluster = table.l1_index * metadata.geometry.l2_entries + index
        taken = table.entries[index : index + count] != 0
        if not claimed and claims.free_count(cluster, count) < count:
            for number in range(count):
                if cluster + number in claims:
                    taken[number] = True
        if zero is None and not taken.any():  # by far the most frequent
            metadata.publish_run(table, index, host_offset, count)
            return True
        wins = ~taken
        written = wins if zero is None else wins & ~zero
        for begin, end in runs_of(written):
            metadata.publish_run(table, index + begin, host_offset + begin * size, end - begin)
        for begin, end in runs_of(~written):
            metadata.free_data(host_offset + begin * size, end - begin)
        if zero is not None:
            for begin, end in runs_of(wins & zero):
                metadata.publish(table, index + begin, np.full(end - begin, ZERO, np.uint64))
        return not taken.any()


def _duplicates(source: HostFile, target: HostFile) -> tuple[int, int]:
    """Descriptors for a worker, which closes them."""
    source_fd = os.dup(source.fd)
    try:
        return source_fd, os.dup(target.fd)
    except OSError:
        os.close(source_fd)
        raise
