"""The driver ``qcow2``.

Specification: docs/interop/qcow2; the invariants of README.md.

Runs on: the event loop. ``read_nowait`` and ``write_nowait`` answer from tables in memory with one
lookup and one call below. What changes entries runs in tasks of this image, which go on when
their caller is cancelled: a worker may still be writing, and half a change is worse than a
whole one. ``close`` waits for them.

Invariants: see ``metadata``, ``commit``, ``cow``, ``zeroes``, ``populate``.
Errors: OSError (EPERM read-only, EIO for good once damage was found); ``BlockError`` from
``open`` and the management calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from errno import EIO, ENOTSUP, EPERM
from typing import Any, ClassVar, Self

from liveblockd.errors import BlockError
from liveblockd.events import BlockImageCorrupted
from liveblockd.formats.ciphers import SectorCipher
from liveblockd.formats.encrypted_store import EncryptedStore
from liveblockd.formats.qcow2.bitmap_store import BitmapStore
from liveblockd.formats.qcow2.check import CheckResult
from liveblockd.formats.qcow2.checking import check_image, repair_dirty
from liveblockd.formats.qcow2.claims import Claims
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.cow import Writer
from liveblockd.formats.qcow2.description import Described
from liveblockd.formats.qcow2.encrypted import LegacyAesStore, describe_luks, unlock_image
from liveblockd.formats.qcow2.gather import Gatherer
from liveblockd.formats.qcow2.header import Rewrite, check_supported, relink
from liveblockd.formats.qcow2.inplace import LARGEST_COPY, InPlace
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layered import Layered
from liveblockd.formats.qcow2.layout import COMPRESSED, MIXED, OFFSET_MASK, ZERO, Autoclear, Crypt
from liveblockd.formats.qcow2.management import Management
from liveblockd.formats.qcow2.many import Many
from liveblockd.formats.qcow2.mapping import runs
from liveblockd.formats.qcow2.opening import Opened, open_image, read_header
from liveblockd.formats.qcow2.options import Qcow2Options
from liveblockd.formats.qcow2.packing import Packer
from liveblockd.formats.qcow2.populate import Populator
from liveblockd.formats.qcow2.reader import Reader
from liveblockd.formats.qcow2.snapshot_store import SnapshotStore
from liveblockd.formats.qcow2.subclusters import mask
from liveblockd.formats.qcow2.survey import Surveyor
from liveblockd.formats.qcow2.tables import DamageError, UnsettledError
from liveblockd.formats.qcow2.zeroes import Eraser
from liveblockd.storage.driver import (
    BlockIO,
    Buffer,
    Extent,
    ExtentKind,
    HostFile,
    Packed,
    Source,
)
from liveblockd.storage.flatmap import FlatMap
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver

#: bytes; a larger request that spans clusters is left to the coroutine
NOWAIT_LIMIT = 1 << 20
#: entries with one of these are no plain data
_SPECIAL = COMPRESSED | ZERO | MIXED


@register_driver
class Qcow2(Many, InPlace, Management, Layered, Described):
    """One qcow2 image; ``open`` makes it."""

    driver_name = "qcow2"
    is_format = True
    child_roles = ("file", "backing", "data-file")
    Options: ClassVar[type[BlockdevOptions]] = Qcow2Options
    below: FlatMap

    def __init__(
        self,
        options: Qcow2Options,
        children: dict[str, BlockIO],
        environment: Environment,
        opened: Opened,
        *,
        autosync: float | None,
        cipher: SectorCipher | None = None,
    ) -> None:
        self.children = children
        self.read_only = True
        self._options = options
        self._environment = environment
        self._amending = asyncio.Lock()
        self._autosync = autosync
        self._cipher = cipher
        self._lazy_refcounts = options.lazy_refcounts
        self._tasks: set[asyncio.Task[None]] = set()
        self.below = FlatMap(children)
        self._damaged = self._closed = self.being_checked = self._shows_snapshot = False
        self._begun = 0
        self._settling: asyncio.Future[None] | None = None
        self._assemble(opened)

    def _assemble(self, opened: Opened) -> None:
        """The parts, for what was read from the disk; nothing is dirty."""
        options, children, environment = self._options, self.children, self._environment
        metadata = opened.metadata
        if self._cipher is not None:
            role = metadata.data_role
            legacy = metadata.header.crypt_method == Crypt.AES
            kind = LegacyAesStore if legacy else EncryptedStore
            metadata.stores = {role: kind(children, role, self._cipher, environment.workers)}
        geometry = metadata.geometry
        self.cluster_size = geometry.cluster_size
        self._metadata = metadata
        self._committer = Committer(metadata, opened.first_sector, autosync=self._autosync)
        self._committer.on_damage = self._on_damage
        self._claims = Claims()
        self._reader = Reader(metadata, self.below, environment.workers)
        self._surveyor = Surveyor(metadata, environment.workers)
        self._writer = Writer(metadata, self._committer, self._claims, self._reader)
        self._writer.on_resize = self.restructured
        metadata.on_idle = self._committer.kick
        unmap = options.pass_discard_request
        self._eraser = Eraser(
            metadata,
            self._claims,
            self._writer,
            unmap_requests=options.unmaps if unmap is None else unmap,
            keep_on_discard=bool(options.discard_no_unref),
        )
        self._populator = Populator(
            metadata, self._claims, self._writer, self._eraser, environment.workers
        )
        self._gatherer = Gatherer(metadata, self._claims, self._populator)
        self._packer = Packer(metadata, self._claims, self._writer, environment.workers)
        self._snapshots = SnapshotStore(
            metadata, self._committer, opened.snapshots, opened.snapshots_length
        )
        #: whether the host gets back what a deleted snapshot had
        self._unmap_snapshots = options.pass_discard_snapshot is not False
        self._bitmaps = BitmapStore(metadata, self._committer)
        #: bytes of the image file that are known to be there
        self._file_end = metadata.data.length
        self._stores, self._data_role = metadata.stores, metadata.data_role
        self._copies_clusters = (
            geometry.cluster_size <= LARGEST_COPY
            and not geometry.extended_l2
            and not metadata.has_data_file
            and metadata.stores is children
        )
        # For the request path
        self._tables = metadata.tables
        self._bits = geometry.cluster_bits
        self._in_cluster = geometry.cluster_size - 1
        self._l2_bits = geometry.l2_bits
        self._l2_mask = geometry.l2_entries - 1
        self._read_backing_nowait = self.below.read_nowait
        self._tell_watchers()
        self.restructured()

    @classmethod
    async def open(
        cls,
        options: Qcow2Options,
        children: dict[str, BlockIO],
        environment: Environment,
        *,
        autosync: float | None = 1.0,
    ) -> Self:
        """Open the image in ``children["file"]``; ``backing`` may be set later. Raises BlockError.

        ``autosync``: metadata is written back after so many seconds; None: by ``flush`` alone.
        """
        read_only = bool(options.read_only) or environment.inactive
        opened = await open_image(options, children, read_only=read_only)
        header = opened.metadata.header
        cipher = await unlock_image(header, options.encrypt, children, environment)
        self = cls(options, children, environment, opened, autosync=autosync, cipher=cipher)
        self._luks = await describe_luks(header, children["file"])
        if not environment.inactive:  # else somebody may be writing them
            await self._bitmaps.read()
        if not read_only:
            await self._begin_writing()
        return self

    async def _begin_writing(self) -> None:
        """Say in the header what a writer of this kind does not keep up; raises BlockError."""
        check_supported(self._metadata.header, read_only=False)
        if self._metadata.header.dirty:
            await self._repair_dirty()
        header = self._metadata.header
        self._committer.begin()
        try:
            autoclear = self._bitmaps.autoclear | header.autoclear & Autoclear.RAW_DATA_FILE
            if header.autoclear != autoclear:
                async with self._committer.lock:
                    await self._committer.write_header(replace(header, autoclear=autoclear))
            await self._bitmaps.mark_in_use()
        except OSError as error:
            raise BlockError.from_os_error("Could not update qcow2 header", error) from error
        geometry = self._metadata.geometry
        self._metadata.refcounts.touched(0, geometry.clusters(self.children["file"].length))
        self.read_only = False

    async def _repair_dirty(self) -> None:
        """A writer with lazy refcounts was interrupted: make the refcounts right. BlockError."""
        await repair_dirty(self.children["file"])
        self._assemble(await open_image(self._options, self.children, read_only=False))
        await self._bitmaps.read()

    async def check(self) -> CheckResult:
        """What ``qemu-img check`` would say of the open image; the caller has quiesced it.

        Nothing is repaired. Raises OSError, BlockError.
        """
        await self._settle()
        if not self.read_only:
            await self._committer.close()  # also the refcounts of what was freed
        return await check_image(self.children["file"])

    @classmethod
    async def named_children(cls, children: Mapping[str, BlockIO]) -> dict[str, str]:
        """See ``BlockDriver``: the external data file."""
        header, _ = await read_header(children["file"])
        if not header.has_data_file or "data-file" in children:
            return {}
        name = header.data_file_name
        if name is None:
            raise BlockError("'data-file' is required for this image")
        return {"data-file": name}

    @property
    def length(self) -> int:
        """Bytes of the virtual disk."""
        return self._writer.disk_size

    # -- guest I/O that needs no wait

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes, if the tables are in memory and the child has the data at hand."""
        cluster = offset >> self._bits
        if (offset + length - 1) >> self._bits != cluster:
            return self._read_nowait_many(offset, length)
        l1_index = cluster >> self._l2_bits
        table = self._tables.get(l1_index)
        if table is None:
            if self._metadata.l1_view[l1_index]:
                return None
            entry = 0
        else:
            if table.bad:
                return None
            table.used = True
            entry = table.view[cluster & self._l2_mask]
            if entry & _SPECIAL:
                if entry & COMPRESSED:
                    return None
                if entry & ZERO:
                    return bytes(length)
                return self._read_nowait_mixed(table, offset, length)
        if entry:
            host_offset = (entry & OFFSET_MASK) + (offset & self._in_cluster)
            if host_offset + length > self._file_end:
                return None
            return self._stores[self._data_role].read_nowait(host_offset, length)
        return self._read_backing_nowait(offset, length)

    def _read_nowait_mixed(self, table: L2Table, offset: int, length: int) -> Buffer | None:
        """The same within a cluster whose subclusters differ."""
        index = (offset >> self._bits) & self._l2_mask
        inside, bits = offset & self._in_cluster, self._bits - 5
        wanted = mask(inside >> bits, (inside + length - 1 >> bits) + 1)
        bitmap = table.bitmap(index)
        if bitmap & wanted == wanted:
            host_offset = (table.view[index] & OFFSET_MASK) + inside
            if host_offset + length > self._file_end:
                return None
            return self._stores[self._data_role].read_nowait(host_offset, length)
        return self._read_nowait_many(offset, length)

    def _read_nowait_many(self, offset: int, length: int) -> Buffer | None:
        """The same for a request that spans clusters."""
        if not 0 < length <= NOWAIT_LIMIT:
            return None if length else b""
        parts: list[Buffer] = []
        position, end = offset, offset + length
        span_bits = self._bits + self._l2_bits
        while position < end:
            stop = min(end, ((position >> span_bits) + 1) << span_bits)
            found = self._read_nowait_span(position, stop - position)
            if found is None:
                return None
            parts.extend(found)
            position = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_nowait_span(self, offset: int, length: int) -> list[Buffer] | None:
        """The pieces of a range within the span of one L2 table."""
        cluster = offset >> self._bits
        l1_index = cluster >> self._l2_bits
        table = self._tables.get(l1_index)
        if table is None:
            if self._metadata.l1_view[l1_index]:
                return None
            data = self._read_backing_nowait(offset, length)
            return None if data is None else [data]
        if table.bad:
            return None
        table.used = True
        start = offset & ((1 << self._bits + self._l2_bits) - 1)
        parts: list[Buffer] = []
        for run in runs(table.entries, table.bitmaps, start, length, self._bits):
            data = None
            if run.kind is ExtentKind.DATA:
                if run.host_offset + run.length <= self._file_end:
                    data = self._stores[self._data_role].read_nowait(run.host_offset, run.length)
            elif run.kind is ExtentKind.UNALLOCATED:
                data = self._read_backing_nowait(offset + run.start - start, run.length)
            elif run.kind is ExtentKind.ZERO:
                data = bytes(run.length)
            if data is None:
                return None
            parts.append(data)
        return parts

    # -- guest I/O

    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes; raises OSError."""
        quarantine = self._metadata.quarantine
        epoch = quarantine.enter()
        try:
            return await self._reader.read(offset, length)
        except DamageError as damage:
            self._on_damage(damage)
            raise
        finally:
            self._file_end = self._metadata.data.length
            if quarantine.leave(epoch):
                self._committer.kick()

    async def write(self, offset: int, data: Buffer) -> None:
        """Store ``data``; raises OSError."""
        self._check_writable()
        if not self.write_nowait(offset, data):
            await self._run(self._writer.write, offset, memoryview(data))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Zero clusters in version 3; written zeros for parts of clusters and in version 2."""
        self._check_writable()

        async def erase() -> None:
            await self._eraser.write_zeroes(
                offset, length, may_unmap=may_unmap, fast_only=fast_only
            )

        await self._run(erase)

    async def discard(self, offset: int, length: int) -> None:
        """Whole clusters read as zeros afterwards (version 2 with a backing file: stay)."""
        self._check_writable()
        await self._run(self._eraser.discard, offset, length)

    async def flush(self) -> None:
        """Data and metadata; raises OSError."""
        if self.read_only:
            return
        if self._damaged:
            raise OSError(EIO, os.strerror(EIO))
        if self._committer.is_idle and not self._committer.is_dirty:
            await self._metadata.data.flush()
        else:
            await self._committer.flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Extents of this layer for a prefix of the range."""
        quarantine = self._metadata.quarantine
        epoch = quarantine.enter()
        try:
            return await self._reader.map(offset, length)
        except DamageError as damage:
            self._on_damage(damage)
            raise
        finally:
            if quarantine.leave(epoch):
                self._committer.kick()

    async def map_zeroes(self, offset: int, length: int) -> list[Extent]:
        """For a range that ``map`` calls ZERO: with the host clusters that are kept for it."""
        return await self._reader.map_zeroes(offset, length)

    # -- a job's copies

    async def populate(self, offset: int, data: Buffer) -> None:
        """See ``BlockDriver.populate``."""
        self._check_writable()
        await self._run(self._populator.populate, offset, data)

    async def populate_zeroes(self, offset: int, length: int) -> None:
        """See ``BlockDriver.populate_zeroes``."""
        self._check_writable()
        await self._run(self._populator.populate_zeroes, offset, length)

    async def populate_from(
        self, offset: int, length: int, source: HostFile, source_offset: int
    ) -> None:
        """See ``BlockDriver.populate_from``."""
        self._check_writable()
        await self._run(self._populator.populate_from, offset, length, source, source_offset)

    async def populate_packed(self, offset: int, length: int, packed: Packed) -> None:
        """See ``BlockDriver.populate_packed``."""
        self._check_writable()
        await self._run(self._populator.populate_packed, offset, length, packed)

    @property
    def gathers(self) -> bool:
        """See ``BlockDriver.gathers``."""
        return self._gatherer.target() is not None

    async def populate_many(self, sources: Sequence[Source]) -> None:
        """See ``BlockDriver.populate_many``."""
        self._check_writable()
        await self._run(self._gatherer.populate, sources)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """See ``BlockDriver.write_compressed``; not in a data file, and never beside a cipher."""
        self._check_writable()
        if self._metadata.has_data_file or self._cipher is not None:
            raise OSError(ENOTSUP, os.strerror(ENOTSUP))
        await self._run(self._packer.write, offset, memoryview(data))

    # -- running what changes entries

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
        if self._damaged:
            raise OSError(EIO, os.strerror(EIO))

    async def _run(self, function: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run to its end, whatever becomes of the caller."""
        task = asyncio.get_running_loop().create_task(self._guarded(function, args))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        await asyncio.shield(task)

    async def _guarded(
        self, function: Callable[..., Coroutine[Any, Any, None]], args: tuple[Any, ...]
    ) -> None:
        try:
            await function(*args)
        except DamageError as damage:
            self._on_damage(damage)
            raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if the caller is gone

    async def _settle(self) -> None:
        """Wait for the tasks of this image."""
        while self._tasks or self._begun:
            if self._tasks:
                await asyncio.wait(self._tasks)
            else:
                await self._begun_ended()

    def _on_damage(self, damage: DamageError) -> None:
        """Metadata cannot be, or is not known: tell, and take no more writes."""
        if self._damaged:
            return
        if self.inactive:  # what is known of it is old, or another process is writing it
            return
        self._damaged = self._committer.damaged = True
        fatal = not (self.read_only or isinstance(damage, UnsettledError))
        self._environment.publisher.publish(
            BlockImageCorrupted(
                device="",
                node_name=self._environment.node_name or None,
                msg=damage.message,
                offset=damage.offset,
                size=damage.size,
                fatal=fatal,
            )
        )
        if fatal:
            task = asyncio.get_running_loop().create_task(self._mark_corrupt())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def _mark_corrupt(self) -> None:
        with contextlib.suppress(OSError):  # the image stays read-only here in any case
            await self._committer.mark_corrupt()

    # -- management

    async def close(self) -> None:
        """Write everything back; raises OSError when that fails, and is closed all the same."""
        if self._closed:
            return
        self._closed = True
        self.below.reset()
        await self._settle()
        try:
            if not self.read_only:
                await self._write_back()
        finally:
            await self._settle()
            await self._committer.end()

    async def _write_back(self, *, data: bool = True) -> None:
        """Bitmaps, metadata until nothing is left to do, and ``data``; raises OSError."""
        try:
            await self._store_bitmaps()
        finally:
            await self._committer.close()
        if data and not self._damaged:
            if self._metadata.has_data_file:
                await self._metadata.data.flush()
            await self.children["file"].flush()

    async def set_read_only(self, read_only: bool) -> None:
        """Read-only: everything is written back first. Raises BlockError."""
        if read_only == self.read_only:
            return
        if not read_only:
            await self._begin_writing()
            return
        await self._end_writing(data=True)

    async def seal(self) -> None:
        """As ``set_read_only``; metadata that is held back yet is written, and durable after it."""
        if not self.read_only:
            await self._end_writing(data=False)

    async def _end_writing(self, *, data: bool) -> None:
        await self._settle()
        try:
            await self._write_back(data=data)
        except OSError as error:
            raise BlockError.from_os_error("Could not flush the image", error) from error
        self.read_only = True
        await self._committer.end()

    async def change_backing_file(
        self, backing_file: str | None, backing_format: str | None
    ) -> None:
        """Commit all that makes the new link true, then rewrite it. Raises BlockError, OSError."""
        if self.read_only:
            raise BlockError("Block node is read-only", errno=EPERM)
        await self._run(self._change_backing_file, backing_file, backing_format)

    async def _change_backing_file(
        self, backing_file: str | None, backing_format: str | None
    ) -> None:
        name = backing_file.encode("utf-8", "surrogateescape") if backing_file else None
        relink(self._metadata.header, name, backing_format)  # refused before anything is done
        await self.flush()

        def rewrite() -> Rewrite:
            return relink(self._metadata.header, name, backing_format)

        await self._committer.rewrite_header(rewrite)
