"""Write-back of the metadata, in the order that keeps data whatever happens in between.

Runs on: the event loop; one commit at a time. Callers of ``flush`` that arrive during a commit
share the next one.

The order (README.md, invariant 2); ``|`` is a flush of the file child, that is fdatasync:

    1. refcount blocks that the table on disk does not name yet      |   only if there are any
    2. refcount table, refcount blocks, L2 tables that nothing on disk names, a moved L1 table  |
    3. the header, if a table moved or the size changed              |   only then
    4. entries of the L2 tables and the L1 table that the disk has   |   only if there are any

Everything is copied at one instant, so that the copy is consistent: it names only data whose
writes have completed, and those are durable after the flush of step 2. A reference reaches the
disk after the refcount and the data it stands for; a refcount falls after the reference
is gone (``quarantine``). A crash between any two writes leaves leaked clusters at worst.

After a failure everything that was copied is dirty again, and nothing is reused: what the disk
has is then either the old state or the new one, entry by entry.

Errors: OSError from ``flush``; EIO for good once the image is ``damaged``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from errno import EIO
from typing import Any, NamedTuple

from liveblockd.formats.qcow2.allocator import SealedRefcounts, Write
from liveblockd.formats.qcow2.header import Header, Rewrite, fixed_fields
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import (
    ENTRY_BYTES,
    MIN_HEADER_LENGTH_V3,
    SECTOR,
    Incompatible,
)
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.quarantine import Batch
from liveblockd.formats.qcow2.release import Releaser
from liveblockd.formats.qcow2.tables import DamageError, to_disk

#: dirty metadata is committed after this time, in seconds, if nobody flushes before
AUTOSYNC_SECONDS = 1.0
#: such commits take at most about a tenth of the time: a guest that fills new clusters faster than
#: the disk takes them would otherwise wait for fdatasync all the time, which nobody has asked for
AUTOSYNC_PAUSE = 9
LONGEST_AUTOSYNC = 30.0
#: writes of a stage that are handed to the file child at once
PARALLEL_WRITES = 16


class _Sealed(NamedTuple):
    """What one commit writes, copied at one instant."""

    refcounts: SealedRefcounts
    new_tables: list[tuple[L2Table, list[Write]]]
    tables: list[tuple[L2Table, tuple[int, int], Write]]
    l1_whole: Write | None
    l1_range: tuple[int, int] | None
    l1_write: Write | None
    fields: dict[str, Any]
    batch: Batch

    def unpin(self) -> None:
        """What was copied is on the disk, or dirty again."""
        for block in [x[0] for x in self.refcounts.new] + [x[0] for x in self.refcounts.blocks]:
            block.pins -= 1
        for table in [x[0] for x in self.new_tables] + [x[0] for x in self.tables]:
            table.pins -= 1


class Committer:
    """Owns the order of metadata writes of one image, and everything that writes its header."""

    def __init__(
        self, metadata: Metadata, first_sector: bytes, *, autosync: float | None = AUTOSYNC_SECONDS
    ) -> None:
        self.metadata = metadata
        #: set by the driver once metadata was found bad: nothing is written any more
        self.damaged = False
        #: told when a refcount turns out to be too low
        self.on_damage: Callable[[DamageError], None] = lambda _: None
        #: writing the header failed: the disk may have another one than memory
        self.header_uncertain = False
        self._first_sector = first_sector
        self._autosync = autosync
        #: seconds that the last commit took
        self._took = 0.0
        self._committing = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._wanted = False  # a commit, though nobody waits for it
        #: a flush failed and nobody was told: writes before it may be lost for good
        self._lost: OSError | None = None
        self._worker: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._releaser = Releaser(metadata)
        self._ended = True
        metadata.on_dirty = self._on_dirty

    # -- what others call

    async def flush(self) -> None:
        """Return when everything that memory has now is durable; raises OSError."""
        if self._ended:
            raise OSError(EIO, "the image is read-only")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._wake()
        await waiter

    def kick(self) -> None:
        """Requests have ended: something that was freed may be ready for use."""
        self._wake()

    def pending(self) -> Iterator[tuple[int, int]]:
        """(host_offset, clusters) of what has one refcount more than memory has references."""
        for freed in self.metadata.quarantine.pending():
            yield freed.host_offset, freed.clusters
        for freed in self._releaser.pending():
            yield freed.host_offset, freed.clusters
        yield from self.metadata.refcounts.retired

    @property
    def is_idle(self) -> bool:
        """Whether no commit is under way."""
        return self._worker is None

    @property
    def is_dirty(self) -> bool:
        """Whether a commit would write anything."""
        metadata = self.metadata
        return bool(
            metadata.dirty_tables
            or metadata.l1_dirty
            or metadata.l1_unwritten
            or metadata.pending_fields
            or metadata.refcounts.is_dirty
            or metadata.quarantine.has_freed
            or self._lost is not None
        )

    async def close(self) -> None:
        """Commit until nothing is left, refcounts of freed clusters included; raises OSError."""
        try:
            # A commit makes clusters ready, whose release makes refcounts dirty: two rounds do.
            for _ in range(4):
                while self._worker is not None:
                    await asyncio.wait([self._worker])
                if self.damaged or not (self.is_dirty or not self.metadata.quarantine.is_empty):
                    break
                await self.flush()
            while self._worker is not None:
                await asyncio.wait([self._worker])
        finally:
            self._stop_timer()

    def begin(self) -> None:
        """The image is writable."""
        self._ended = False

    async def end(self) -> None:
        """It is read-only or closed: nothing is written any more, by the timer or otherwise."""
        self._ended = True
        while self._worker is not None:
            await asyncio.wait([self._worker])
        self._stop_timer()

    async def rewrite_header(self, make: Callable[[], Rewrite]) -> None:
        """Replace the header by what ``make`` gives: every step durable before the next.

        Raises OSError; the disk has the old link or the new one then.
        """
        async with self._lock:
            self._check_damage()
            rewrite = make()
            for number, (offset, data) in enumerate(rewrite.steps):
                self.header_uncertain = True
                try:
                    await self.metadata.file.write(offset, data)
                    await self._sync()
                except OSError:
                    if len(data) <= SECTOR:
                        await self._put_back()
                    raise
                # Up to date after each step: should the next one fail, this is what the disk has.
                if number == len(rewrite.steps) - 1:
                    self._has_header(data, rewrite.header)
                elif number == 0 and rewrite.between is not None:
                    self._has_header(data, rewrite.between)

    async def _put_back(self) -> None:
        """Nobody knows which header the disk has: the one of before, as far as that can be.

        Its first sector suffices, for nothing that it names was touched.
        """
        with contextlib.suppress(OSError):
            await self.metadata.file.write(0, self._first_sector)
            await self.metadata.file.flush()

    def _has_header(self, first: bytes, header: Header) -> None:
        self.header_uncertain = False
        self._first_sector = first[:SECTOR].ljust(SECTOR, b"\0")
        self.metadata.header = header

    @property
    def lock(self) -> asyncio.Lock:
        """Held while metadata is written; who holds it may read ``metadata.header``."""
        return self._lock

    async def mark_corrupt(self) -> None:
        """Set the corrupt bit (version 3); other metadata is no longer written. Raises OSError."""
        async with self._lock:
            header = self.metadata.header
            if header.version >= 3 and not header.corrupt:
                bits = header.incompatible | Incompatible.CORRUPT
                await self.write_header(replace(header, incompatible=bits))

    # -- the task that does it

    def _wake(self) -> None:
        if self._worker is None and not self._ended:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    def _on_dirty(self) -> None:
        metadata = self.metadata
        # Room for other tables is made only where not all of them fit.
        if len(metadata.dirty_tables) * 2 > metadata.max_tables < len(metadata.l1_view):
            self._wake_for_commit()
        self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is None and not (self._autosync is None or self._ended or self._committing):
            loop = asyncio.get_running_loop()
            pause = min(self._took * AUTOSYNC_PAUSE, LONGEST_AUTOSYNC)
            self._timer = loop.call_later(max(self._autosync, pause), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.is_dirty and not self.damaged:
            self._wake_for_commit()

    def _wake_for_commit(self) -> None:
        """A commit that nobody waits for; if it fails, the timer or a flush tries again."""
        self._wanted = True
        self._wake()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _work(self) -> None:
        waiters: list[asyncio.Future[None]] = []
        try:
            while True:
                if self._waiters or self._wanted:
                    waiters, self._waiters = self._waiters, []
                    self._wanted = False
                    error = await self._try_commit()
                    self._tell(waiters, error)
                elif self._releaser:
                    await self._release()
                elif freed := self.metadata.quarantine.ready():
                    self._releaser.add(freed)
                else:
                    break
        finally:
            self._worker = None
            # Only a defect of this module comes here with waiters: they must not hang.
            for waiter in (*waiters, *self._waiters):
                if not waiter.done():
                    waiter.set_exception(OSError(EIO, "the commit was aborted"))

    async def _release(self) -> None:
        """A part, for it takes long: who waits for a commit does not wait for all of it."""
        if self.damaged:
            self._releaser.clear()
            return
        self._releaser.on_damage = self.on_damage
        await self._releaser.release()
        await asyncio.sleep(0)

    def _tell(self, waiters: list[asyncio.Future[None]], error: OSError | None) -> None:
        """Answer those who wait, with a loss that nobody has heard of as well."""
        waiting = [waiter for waiter in waiters if not waiter.done()]
        if not waiting:
            return
        error, self._lost = error or self._lost, None
        for waiter in waiting:
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(OSError(error.errno, error.strerror))

    async def _sync_data(self) -> None:
        """An external data file: what entries refer to is durable before they are."""
        if self.metadata.has_data_file:
            try:
                await self.metadata.data.flush()
            except OSError as error:
                self._lost = error
                raise

    async def _sync(self) -> None:
        try:
            await self.metadata.file.flush()
        except OSError as error:
            self._lost = error
            raise

    async def _try_commit(self) -> OSError | None:
        try:
            async with self._lock:
                self._check_damage()
                self._stop_timer()
                clock = asyncio.get_running_loop().time
                begun = clock()
                self._committing = True
                try:
                    await self._commit()
                finally:
                    self._took = clock() - begun
                    # What became dirty meanwhile waits as long as this commit makes it wait.
                    self._committing = False
                    if self.is_dirty:
                        self._start_timer()
                if self.is_dirty:
                    self._on_dirty()
        except OSError as error:
            if not self.damaged:
                # However many tables are dirty: at once it would fail again, and again.
                self._wanted = False
                self._start_timer()
            return error
        return None

    def _check_damage(self) -> None:
        if self.damaged:
            raise OSError(EIO, "the image is corrupt")

    # -- one commit

    async def _commit(self) -> None:
        sealed = self._seal()
        metadata = self.metadata
        refcounts = sealed.refcounts
        done = False
        header_done = not sealed.fields
        try:
            if refcounts.new:
                await self._write([write for _, write in refcounts.new])
                await self._sync()
                for block, _ in refcounts.new:
                    block.is_new = False
            first = [*refcounts.table, *(write for _, _, write in refcounts.blocks)]
            first += [write for _, writes in sealed.new_tables for write in writes]
            if sealed.l1_whole is not None:
                first.append(sealed.l1_whole)
            await self._write(first)
            await self._sync_data()
            await self._sync()
            for table, _ in sealed.new_tables:
                # From here on the disk may name it: it is changed in place, after its data.
                table.is_new = False
            # Either may have moved once more in the meantime.
            if (
                refcounts.table_whole
                and refcounts.table[0].offset == metadata.refcounts.table_offset
            ):
                metadata.refcounts.table_unwritten = False
            if sealed.l1_whole is not None and sealed.l1_whole.offset == metadata.l1_offset:
                metadata.l1_unwritten = False
            if sealed.fields:
                await self.write_header(replace(metadata.header, **sealed.fields))
                header_done = True
            second = [write for _, _, write in sealed.tables]
            if sealed.l1_write is not None:
                second.append(sealed.l1_write)
            if second:
                await self._write(second)
                await self._sync()
            done = True
        finally:
            sealed.unpin()
            if done:
                metadata.quarantine.committed(sealed.batch)
            else:
                self._reopen(sealed, header_done=header_done)

    def _seal(self) -> _Sealed:
        """Copy all that is dirty, now."""
        metadata = self.metadata
        refcounts = metadata.refcounts
        if refcounts.moved:
            refcounts.moved = False
            metadata.pending_fields["refcount_table_offset"] = refcounts.table_offset
            metadata.pending_fields["refcount_table_clusters"] = refcounts.table_clusters
        for host_offset, clusters in refcounts.retired:
            metadata.quarantine.free(host_offset, clusters, unmap=False)
        refcounts.retired.clear()
        new_tables, tables = [], []
        file_length = metadata.file.length
        per_sector = SECTOR // metadata.geometry.l2_entry_bytes
        for table in metadata.dirty_tables.values():
            low, high = table.dirty.take()
            table.pins += 1  # until it is on the disk it must not be read from there
            if table.is_new:
                new_tables.append((table, table.take_writes(file_length)))
            else:
                low_sector, high_sector = low // per_sector, -(-high // per_sector)
                data = table.to_disk(low_sector * per_sector, high_sector * per_sector)
                write = Write(table.host_offset + low_sector * SECTOR, data)
                tables.append((table, (low, high), write))
        metadata.dirty_tables.clear()
        l1_whole = l1_range = l1_write = None
        if metadata.l1_unwritten:
            metadata.l1_dirty.clear()
            size = metadata.l1_clusters * metadata.geometry.cluster_size
            l1_whole = Write(metadata.l1_offset, to_disk(metadata.l1).ljust(size, b"\0"))
        elif metadata.l1_dirty:
            l1_range = metadata.l1_dirty.take()
            per_sector = SECTOR // ENTRY_BYTES
            low = l1_range[0] // per_sector * per_sector
            high = -(-l1_range[1] // per_sector) * per_sector
            data = to_disk(metadata.l1[low:high]).ljust((high - low) * ENTRY_BYTES, b"\0")
            l1_write = Write(metadata.l1_offset + low * ENTRY_BYTES, data)
        fields = dict(metadata.pending_fields)
        metadata.pending_fields.clear()
        batch = metadata.quarantine.seal()
        return _Sealed(
            refcounts.seal(), new_tables, tables, l1_whole, l1_range, l1_write, fields, batch
        )

    def _reopen(self, sealed: _Sealed, *, header_done: bool) -> None:
        """The commit failed: what it took is dirty again."""
        metadata = self.metadata
        metadata.refcounts.reopen(sealed.refcounts)
        for table, (low, high), _ in sealed.tables:
            table.dirty.add(low, high)
            metadata.dirty_tables[table.l1_index] = table
        for table, _ in sealed.new_tables:
            table.dirty.add(0, len(table.entries))
            metadata.dirty_tables[table.l1_index] = table
        if sealed.l1_range is not None:
            metadata.l1_dirty.add(*sealed.l1_range)
        if not header_done:
            metadata.pending_fields = {**sealed.fields, **metadata.pending_fields}
        metadata.quarantine.failed(sealed.batch)

    async def write_header(self, header: Header) -> None:
        """The fixed fields, in one sector; durable on return. ``lock`` is held."""
        length = min(MIN_HEADER_LENGTH_V3, header.header_length)
        sector = fixed_fields(header)[:length] + self._first_sector[length:]
        self.header_uncertain = True
        await self.metadata.file.write(0, sector)
        await self._sync()
        self.header_uncertain = False
        self._first_sector = sector
        self.metadata.header = header

    async def _write(self, writes: Sequence[Write]) -> None:
        """Write all; on return none is under way any more. Raises the first error."""
        file = self.metadata.file
        waiting = [w for w in _merged(writes) if not file.write_nowait(w.offset, w.data)]
        for start in range(0, len(waiting), PARALLEL_WRITES):
            part = waiting[start : start + PARALLEL_WRITES]
            results = await asyncio.gather(
                *(file.write(w.offset, w.data) for w in part), return_exceptions=True
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result


def _merged(writes: Sequence[Write]) -> list[Write]:
    """The writes in the order of their offsets, adjacent ones joined."""
    merged: list[Write] = []
    parts: list[bytes] = []
    start = end = -1
    for write in sorted(writes):
        if write.offset != end:
            if parts:
                merged.append(Write(start, b"".join(parts)))
            parts, start = [], write.offset
        parts.append(write.data)
        end = write.offset + len(write.data)
    if parts:
        merged.append(Write(start, b"".join(parts)))
    return merged
