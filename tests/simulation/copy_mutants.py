"""Known defects of mirrors, backups and their bitmaps; a part of ``mutants``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any
from unittest import mock

from liveblockd.formats.qcow2.bitmaps import BitmapEntry
from liveblockd.graph.before_write import BeforeWrite
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.jobs import mirror
from liveblockd.jobs.backup import Backup
from liveblockd.jobs.copying import PieceFailedError
from liveblockd.jobs.job import Job
from liveblockd.jobs.mirror import MirrorCore
from liveblockd.jobs.mirror_job import Mirror
from liveblockd.jobs.scheduler import Scheduler, Transaction


def _mirror_not_flushed(stack: ExitStack) -> None:
    """Guests go over to a target that is not durable."""
    track, pivot = Mirror.track, Mirror.pivot

    async def mutated(self: Mirror) -> None:
        await track(self)
        self.target.flush = lambda: asyncio.sleep(0)  # type: ignore[method-assign]

    async def switch(self: Mirror) -> None:
        del self.target.flush
        await pivot(self)

    stack.enter_context(mock.patch.object(Mirror, "track", mutated))
    stack.enter_context(mock.patch.object(Mirror, "pivot", switch))


def _source_not_flushed(stack: ExitStack) -> None:
    """Guests go over to a target that stands on what is not durable, and flush only that."""
    copy_rest, pivot = Mirror._copy_rest, Mirror.pivot

    async def mutated(self: Mirror) -> None:
        await copy_rest(self)
        self.source.flush = lambda: asyncio.sleep(0)  # type: ignore[method-assign]

    async def switch(self: Mirror) -> None:
        del self.source.flush
        self.source.flush = self.source.driver.flush  # type: ignore[method-assign]
        await pivot(self)

    stack.enter_context(mock.patch.object(Mirror, "_copy_rest", mutated))
    stack.enter_context(mock.patch.object(Mirror, "pivot", switch))


def _failed_flush_unseen(stack: ExitStack) -> None:
    """A backup succeeds although its target could not be flushed."""
    prepare = Backup.prepare

    async def mutated(self: Backup) -> None:
        with suppress(OSError):
            await prepare(self)

    stack.enter_context(mock.patch.object(Backup, "prepare", mutated))


def _mirror_without_the_rest(stack: ExitStack) -> None:
    """What guests write while the mirror comes to its end does not reach the target."""

    async def mutated(self: Mirror) -> None:
        self.chunks.bitmap.reset(0, self.source.length)

    stack.enter_context(mock.patch.object(Mirror, "_copy_rest", mutated))


def _mirror_clean_after_copy(stack: ExitStack) -> None:
    """A chunk is called clean when its copy has ended: what was written meanwhile is forgotten."""
    copy = MirrorCore._copy

    async def mutated(self: MirrorCore, offset: int, length: int) -> None:
        await copy(self, offset, length)
        self.bitmap.reset(offset, length)

    stack.enter_context(mock.patch.object(MirrorCore, "_copy", mutated))


def _mirror_one_side_only(stack: ExitStack) -> None:
    """In copy mode write-blocking a write that the target did not get is not recorded."""

    async def mutated(self: MirrorCore, *_: Any) -> None:
        await asyncio.sleep(0)

    stack.enter_context(mock.patch.object(MirrorCore, "_store", mutated))


def _errors_unseen(stack: ExitStack) -> None:
    """A mirror does not notice that its target took nothing."""
    copy = MirrorCore._copy

    async def mutated(self: MirrorCore, offset: int, length: int) -> None:
        with suppress(PieceFailedError):
            await copy(self, offset, length)

    stack.enter_context(mock.patch.object(MirrorCore, "_copy", mutated))
    # What fails in a worker is done once more, and most faults are gone by then.
    stack.enter_context(mock.patch.object(mirror, "LEAST_COPY", 1 << 62))


def _write_before_backup(stack: ExitStack) -> None:
    """Guests overwrite what the backup does not have yet."""

    async def mutated(self: BeforeWrite, *_: Any) -> None:
        return

    stack.enter_context(mock.patch.object(BeforeWrite, "before", mutated))


def _backup_not_flushed(stack: ExitStack) -> None:
    """A backup is called complete before it is durable."""

    async def mutated(self: Backup) -> None:
        return

    stack.enter_context(mock.patch.object(Backup, "prepare", mutated))


def _bitmap_of_a_cancelled_backup(stack: ExitStack) -> None:
    """The bitmap of a backup that failed forgets what was to be copied."""
    thaw = DirtyBitmap.thaw

    def mutated(self: DirtyBitmap, *, keep: bool, undone: DirtyBitmap | None = None) -> None:
        del keep
        thaw(self, keep=False, undone=undone)

    stack.enter_context(mock.patch.object(DirtyBitmap, "thaw", mutated))


def _bitmap_without_successor(stack: ExitStack) -> None:
    """What is written while a backup runs is in no bitmap."""
    thaw = DirtyBitmap.thaw

    def mutated(self: DirtyBitmap, **options: Any) -> None:
        assert self.successor is not None
        self.successor.clear()
        thaw(self, **options)

    stack.enter_context(mock.patch.object(DirtyBitmap, "thaw", mutated))


def _group_of_one(stack: ExitStack) -> None:
    """Jobs of a group succeed each for itself."""
    create = Scheduler.create

    def mutated(self: Scheduler, job: Job, transaction: Transaction | None = None) -> None:
        del transaction
        create(self, job)

    stack.enter_context(mock.patch.object(Scheduler, "create", mutated))


#: those that no power cut shows
LIVE_MUTANTS: dict[str, Callable[[ExitStack], None]] = {"group-of-one": _group_of_one}


def _stale_bitmap_believed(stack: ExitStack) -> None:
    """A bitmap that was in use when the power went is taken for true."""
    stack.enter_context(mock.patch.object(BitmapEntry, "usable", property(lambda _: True)))


#: by name
COPY_MUTANTS: dict[str, Callable[[ExitStack], None]] = {
    "mirror-not-flushed": _mirror_not_flushed,
    "source-not-flushed": _source_not_flushed,
    "failed-flush-unseen": _failed_flush_unseen,
    "mirror-without-the-rest": _mirror_without_the_rest,
    "mirror-clean-after-copy": _mirror_clean_after_copy,
    "mirror-one-side-only": _mirror_one_side_only,
    "errors-unseen": _errors_unseen,
    "write-before-backup": _write_before_backup,
    "backup-not-flushed": _backup_not_flushed,
    "bitmap-of-a-cancelled-backup": _bitmap_of_a_cancelled_backup,
    "bitmap-without-successor": _bitmap_without_successor,
    "stale-bitmap-believed": _stale_bitmap_believed,
}
_MIRROR: dict[str, Any] = {"steps": ("mirror",), "faults": False, "bitmap": False, "depth": 2}
_BACKUP: dict[str, Any] = {"faults": False, "bitmap": False, "depth": 1, "large": False}
#: on a disk of which a guest does not write all again before the next one
_CHAIN: dict[str, Any] = {
    "size": 512 << 10,
    "cluster_size": 1024,
    "steps": ("backup", *["increment"] * 4),
}
#: as ``mutants.PLANS``
COPY_PLANS: dict[str, dict[str, Any]] = {
    "mirror-not-flushed": _MIRROR,
    "source-not-flushed": {**_MIRROR, "steps": ("mirror_none", "rest")},
    "failed-flush-unseen": {**_BACKUP, "steps": ("unflushable", "unflushable")},
    "mirror-without-the-rest": _MIRROR,
    "mirror-clean-after-copy": _MIRROR,
    "mirror-one-side-only": {**_MIRROR, "copy_mode": "write-blocking"},
    "errors-unseen": {**_MIRROR, "faults": True},
    "write-before-backup": {**_BACKUP, "steps": ("backup", "rest")},
    "backup-not-flushed": {**_BACKUP, "steps": ("backup", "rest")},
    "bitmap-of-a-cancelled-backup": {**_BACKUP, **_CHAIN},
    "bitmap-without-successor": {**_BACKUP, **_CHAIN},
    "stale-bitmap-believed": {"bitmap": True, "depth": 1, "steps": ("rest", "restart", "rest")},
}
#: the first seed of a defect that shows in few, or not in those before: of "errors-unseen" a fault
#: has to fall between a copy and the guest's next write there
FIRST_SEED = {
    "errors-unseen": 58,
    "zeroes-in-version-2": 17,
    "switch-not-flushed": 4,
    "skip-first-flush": 4,
    "failed-flush-unseen": 2,
    "write-before-backup": 3,
    "backup-not-flushed": 3,
    "bitmap-of-a-cancelled-backup": 3,
    "bitmap-without-successor": 3,
}
