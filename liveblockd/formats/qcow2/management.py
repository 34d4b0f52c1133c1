"""What management does with an image, beside the requests of guests: the methods of ``Qcow2``.

Size, internal snapshots, persistent bitmaps, preallocation, amend. Each is a task of the engine,
which goes on when its caller is cancelled.

Runs on: the event loop. Invariants: those of ``snapshot_store``, ``bitmap_store``, ``resize``,
``amend``; who calls ``create_snapshot`` and the like has drained the node.
Errors: ``BlockError``; OSError.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from errno import EIO, ENOTSUP
from typing import TYPE_CHECKING, Any, cast

from liveblockd.errors import BlockError
from liveblockd.formats.luks import LuksHeader, parse_luks
from liveblockd.formats.luks_slots import LuksAmendment, amend_luks
from liveblockd.formats.qcow2.amend import Amendment, Progress, amend
from liveblockd.formats.qcow2.encrypted import crypto_header_place
from liveblockd.formats.qcow2.live_check import LiveCheck
from liveblockd.formats.qcow2.opening import Opened, open_image
from liveblockd.formats.qcow2.options import CHANGEABLE, Qcow2Options, cache_sizes
from liveblockd.formats.qcow2.preallocate import Preallocation, preallocate
from liveblockd.formats.qcow2.resize import resize
from liveblockd.formats.qcow2.snapshot_store import Ranges, SnapshotStore, Taken
from liveblockd.formats.qcow2.tables import DamageError
from liveblockd.storage.driver import BlockIO, Quiesced, StoredBitmap
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment

if TYPE_CHECKING:
    from liveblockd.formats.qcow2.bitmap_store import BitmapStore
    from liveblockd.formats.qcow2.commit import Committer
    from liveblockd.formats.qcow2.cow import Writer
    from liveblockd.formats.qcow2.image import Qcow2
    from liveblockd.formats.qcow2.metadata import Metadata
    from liveblockd.formats.qcow2.zeroes import Eraser


class Management:
    """A part of the class ``Qcow2``."""

    if TYPE_CHECKING:
        children: dict[str, BlockIO]
        bitmap_source: Callable[[], Sequence[StoredBitmap]] | None
        _metadata: Metadata
        _committer: Committer
        _writer: Writer
        _eraser: Eraser
        _snapshots: SnapshotStore
        _bitmaps: BitmapStore
        _unmap_snapshots: bool
        _lazy_refcounts: bool | None
        _damaged: bool
        _luks: LuksHeader | None
        _environment: Environment
        _amending: asyncio.Lock
        _options: Qcow2Options
        read_only: bool

        def _assemble(self, opened: Opened) -> None: ...

        #: by ``live_check``
        being_checked: bool
        #: what is read is not the disk
        _shows_snapshot: bool

        def _check_writable(self) -> None: ...
        async def _settle(self) -> None: ...
        async def _run(
            self, function: Callable[..., Coroutine[Any, Any, None]], *args: Any
        ) -> None: ...

    # -- options

    changeable = CHANGEABLE

    def change_options(self, options: BlockdevOptions, environment: Environment) -> None:
        """See ``BlockDriver``."""
        del environment
        assert isinstance(options, Qcow2Options)
        metadata = self._metadata
        sizes = cache_sizes(options, metadata.geometry, metadata.header.size)
        if options.lazy_refcounts and metadata.header.version < 3:
            raise BlockError(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
            )
        metadata.limit_cache(sizes.l2_tables, sizes.refcount_blocks)
        unmap = options.pass_discard_request
        self._eraser.configure(
            unmap_requests=options.unmaps if unmap is None else unmap,
            keep_on_discard=bool(options.discard_no_unref),
        )
        self._unmap_snapshots = options.pass_discard_snapshot is not False
        self._lazy_refcounts = options.lazy_refcounts
        self._options = options

    # -- size

    async def truncate(self, length: int) -> None:
        """Grow or shrink the virtual disk; durable on return. Raises BlockError, OSError."""
        self._check_writable()
        await self._run(resize, self._metadata, self._committer, self._writer, self._eraser, length)

    async def preallocate(self, mode: Preallocation, offset: int, length: int) -> None:
        """Give what has no clusters yet in a range of the disk its own; durable on return.

        For a disk that is new or just grown, with no request of a guest in flight.
        """
        self._check_writable()
        await self._settle()
        await self._run(preallocate, self._metadata, self._committer, mode, offset, length)

    async def amend(self, amendment: Amendment, progress: Progress | None = None) -> None:
        """Change what the header says of the image, and what follows; for a disk without users.

        ``progress`` is told (done, total). Durable on return; close and open the image after it.
        """
        self._check_writable()
        await self._settle()
        if amendment.size is not None:
            amendment.check_size(self._metadata.header)

        async def run() -> None:
            if self._bitmaps.entries and amendment.version == 2:
                raise BlockError("Cannot downgrade an image with persistent bitmaps")
            if amendment.version == 2:
                self._snapshots.check_downgrade()
            await amend(self._metadata, self._committer, self._snapshots, amendment, progress)

        await self._run(run)
        if amendment.size is not None and amendment.size != self._writer.disk_size:
            await self.truncate(amendment.size)

    async def amend_encryption(
        self, passphrase: bytes, amendment: LuksAmendment, *, force: bool = False
    ) -> None:
        """Add or erase a passphrase; guests go on. Durable on return.

        No task of the engine: deriving a key takes seconds, for which nobody should have to wait.
        Raises BlockError, OSError.
        """
        self._check_writable()
        file = self.children["file"]
        async with self._amending:
            place, length = crypto_header_place(self._metadata.header, file.length)
            try:
                await amend_luks(
                    file, self._environment.workers, passphrase, amendment,
                    base=place, length=length, force=force,
                )  # fmt: skip
            finally:
                self._luks = parse_luks(bytes(await file.read(place, length)))

    def live_check(self, quiesced: Quiesced, *, fix_leaks: bool = False) -> LiveCheck:
        """See ``BlockDriver``."""
        image = cast("Qcow2", self)
        if self._shows_snapshot:  # its tables would be counted as those of the disk
            raise BlockError(
                "The image shows one of its internal snapshots and cannot be checked", errno=ENOTSUP
            )
        if fix_leaks:
            self._check_writable()
        return LiveCheck(image, quiesced, fix_leaks=fix_leaks)

    # -- internal snapshots

    async def create_snapshot(self, name: str, *, date_nsec: int, vm_clock_nsec: int = 0) -> None:
        """See ``BlockDriver``."""
        if self._metadata.has_data_file:
            raise BlockError("Operation not supported", errno=ENOTSUP)
        taken = Taken(date_nsec, vm_clock_nsec)
        await self._on_snapshots("create snapshot", lambda: self._snapshots.create(name, taken))

    async def load_snapshot(self, snapshot_id: str) -> None:
        """Show the disk as a snapshot has it, from now on; for an image opened read-only.

        Raises BlockError.
        """
        assert self.read_only
        await self._settle()
        self._assemble(
            await open_image(self._options, self.children, read_only=True, snapshot_id=snapshot_id)
        )
        self._shows_snapshot = True

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """See ``BlockDriver``."""
        snapshot = self._snapshots.find(snapshot_id)
        await self._on_snapshots("delete snapshot", lambda: self._snapshots.delete(snapshot))

    async def apply_snapshot(self, snapshot_id: str) -> None:
        """See ``BlockDriver``."""
        snapshot = self._snapshots.find(snapshot_id)
        await self._on_snapshots("apply snapshot", lambda: self._snapshots.apply(snapshot))
        self._writer.disk_size = self._metadata.header.size

    async def _on_snapshots(
        self, what: str, operation: Callable[[], Coroutine[Any, Any, Ranges]]
    ) -> None:
        self._check_writable()

        async def run() -> None:
            try:
                freed = await operation()
            except DamageError as damage:
                # Found before anything was changed, and perhaps in a snapshot only: the disk
                # goes on.
                raise BlockError(f"Could not {what}: {damage.message}", errno=EIO) from damage
            if self._unmap_snapshots:
                with contextlib.suppress(OSError):  # a wish only
                    for offset, length in freed:
                        await self.children["file"].discard(offset, length)

        await self._settle()
        await self._run(run)

    async def make_empty(self) -> None:
        """Hold nothing any more, so that the backing file shows; for a disk without users.

        Internal snapshots and bitmaps stay. Durable on return. Raises BlockError, OSError.
        """
        await self._on_snapshots("empty the image", self._snapshots.empty)

    # -- persistent dirty bitmaps

    def stored_bitmaps(self) -> Sequence[StoredBitmap]:
        """See ``BlockDriver``."""
        return self._bitmaps.loaded

    def check_new_bitmap(self, name: str, granularity: int, others: int) -> None:
        """See ``BlockDriver``."""
        self._bitmaps.check_new(name, granularity, others)

    async def remove_bitmap(self, name: str) -> None:
        """See ``BlockDriver``."""
        self._check_writable()
        await self._run(self._bitmaps.remove, name)

    async def _store_bitmaps(self) -> None:
        """What the graph has tracked; without it the marks stay that they were in use."""
        if self.bitmap_source is not None and not self._damaged:
            await self._run(self._bitmaps.store, self.bitmap_source())
