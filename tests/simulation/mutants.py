"""Known defects, put into the engine for a while: what finds none of them finds nothing.

``with planted("skip-first-flush"): ...``; each stands for a mistake that is easily made.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

from liveblockd.formats import ciphers
from liveblockd.formats.qcow2 import amend, cow, packing
from liveblockd.formats.qcow2.allocator import BlockNeeded
from liveblockd.formats.qcow2.bitmap_store import BitmapStore
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.snapshot_store import SnapshotStore
from liveblockd.formats.qcow2.subclusters import summaries
from liveblockd.formats.qcow2.switch import Switch
from liveblockd.formats.qcow2.zeroes import Eraser
from liveblockd.graph import backend
from liveblockd.jobs.commit import Commit
from liveblockd.jobs.commit_active import CommitActive
from liveblockd.jobs.stream import Stream
from liveblockd.storage.driver import BlockDriver
from tests.simulation.copy_mutants import COPY_MUTANTS, COPY_PLANS, LIVE_MUTANTS
from tests.simulation.disks import SimulatedDisk


def _disk(file: Any) -> SimulatedDisk | None:
    driver = getattr(file, "driver", file)
    return driver if isinstance(driver, SimulatedDisk) else None


def _skip_first_flush(stack: ExitStack) -> None:
    """A commit writes entries of L2 tables without waiting for data and refcounts."""
    commit = Committer._commit

    async def mutated(self: Committer) -> None:
        if (disk := _disk(self.metadata.file)) is not None:
            disk.medium.skip_flushes = 1
        await commit(self)

    stack.enter_context(mock.patch.object(Committer, "_commit", mutated))


def _publish_before_data(stack: ExitStack) -> None:
    """The entry of a new cluster is published while its data is still on its way."""
    write_bytes = cow.write_bytes
    tasks: set[asyncio.Task[None]] = set()

    async def mutated(file: Any, offset: int, data: Any) -> None:
        disk = _disk(file)
        if disk is None or disk.medium.machine.quiet:
            await write_bytes(file, offset, data)
            return
        # Readers see it in the page cache, but the write is not under way yet.
        content, medium = bytes(data), disk.medium
        medium.store(offset, content)

        async def later() -> None:
            await medium.machine.delay()
            await medium.machine.delay()
            medium.end("end", medium.begin("write", offset, content))

        task = asyncio.get_running_loop().create_task(later())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    stack.enter_context(mock.patch.object(cow, "write_bytes", mutated))


def _header_before_commit(stack: ExitStack) -> None:
    """The backing file is dropped, and the job completed, before what was copied is durable."""
    flush = Qcow2.flush
    prepare = Stream.prepare
    preparing: set[Qcow2] = set()

    async def mutated(self: Stream) -> None:
        assert isinstance(self.top.driver, Qcow2)
        preparing.add(self.top.driver)
        try:
            await prepare(self)
        finally:
            preparing.discard(self.top.driver)

    async def unless_preparing(self: Qcow2) -> None:
        if self not in preparing:
            await flush(self)

    stack.enter_context(mock.patch.object(Stream, "prepare", mutated))
    stack.enter_context(mock.patch.object(Qcow2, "flush", unless_preparing))


def _link_before_base(stack: ExitStack) -> None:
    """A header leads to the base of a commit before that is durable."""

    prepare = Commit.prepare

    async def mutated(self: Commit) -> None:
        self.base.flush = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
        await prepare(self)

    stack.enter_context(mock.patch.object(Commit, "prepare", mutated))


def _switch_before_base(stack: ExitStack) -> None:
    """Guests go on with the base of a commit before that is durable."""
    take = CommitActive.take

    async def mutated(self: CommitActive) -> None:
        await take(self)
        self.target.flush = lambda: asyncio.sleep(0)  # type: ignore[method-assign]

    stack.enter_context(mock.patch.object(CommitActive, "take", mutated))


def _commit_without_the_rest(stack: ExitStack) -> None:
    """What guests write while the active image is committed does not reach the base."""

    async def mutated(self: CommitActive) -> None:
        self.chunks.bitmap.reset(0, self.source.length)

    stack.enter_context(mock.patch.object(CommitActive, "_copy_rest", mutated))


def _closed_without_flush(stack: ExitStack) -> None:
    """What a guest has not flushed itself is not durable when a raw image, or a file, is closed."""

    async def mutated(self: BlockDriver) -> None:
        del self

    stack.enter_context(mock.patch.object(BlockDriver, "close", mutated))


def _reuse_at_once(stack: ExitStack) -> None:
    """Clusters are free as soon as memory no longer refers to them."""

    def mutated(self: Metadata, ranges: list[tuple[int, int]], *, unmap: bool) -> None:
        for host_offset, clusters in ranges:
            with suppress(BlockNeeded):
                self.refcounts.decrement(host_offset >> self.geometry.cluster_bits, clusters)

    stack.enter_context(mock.patch.object(Metadata, "_free_ranges", mutated))


def _reuse_before_commit(stack: ExitStack) -> None:
    """The refcounts of freed clusters fall before the entries that referred to them are gone."""
    commit = Committer._commit

    async def mutated(self: Committer) -> None:
        quarantine = self.metadata.quarantine
        freed, quarantine._freed = quarantine._freed, []
        for item in freed:
            await self._releaser.release_all(deque((item,)))
        await commit(self)

    stack.enter_context(mock.patch.object(Committer, "_commit", mutated))


def _skip_last_flush(stack: ExitStack) -> None:
    """A flush returns before the entries of L2 and L1 tables are durable."""
    flush = SimulatedDisk.flush
    commit = Committer._commit

    async def mutated(self: Committer) -> None:
        disk = _disk(self.metadata.file)
        if disk is None:
            await commit(self)
            return
        count = 0

        async def counted() -> None:
            nonlocal count
            count += 1
            if count == 1:
                await flush(disk)

        metadata_file = self.metadata.children["file"]
        with mock.patch.object(metadata_file, "flush", counted):
            await commit(self)

    stack.enter_context(mock.patch.object(Committer, "_commit", mutated))


def _bitmaps_stay_behind(stack: ExitStack) -> None:
    """What only the bitmap of an extended entry says is not written back."""
    publish_words = Metadata.publish_words

    def mutated(self: Metadata, table: Any, first: int, words: Any, bitmaps: Any) -> None:
        if (table.entries[first : first + len(words)] == summaries(words, bitmaps)).all():
            table.bitmaps[first : first + len(bitmaps)] = bitmaps
        else:
            publish_words(self, table, first, words, bitmaps)

    stack.enter_context(mock.patch.object(Metadata, "publish_words", mutated))


def _data_file_not_flushed(stack: ExitStack) -> None:
    """Entries reach the disk before the data in the external file."""

    async def mutated(self: Committer) -> None:
        return

    stack.enter_context(mock.patch.object(Committer, "_sync_data", mutated))


def _raw_file_without_zeros(stack: ExitStack) -> None:
    """Zeros are in the tables only: who reads the raw data file does not see them."""
    change = Eraser._change_data_file

    async def mutated(self: Eraser, *args: Any, **options: Any) -> None:
        raw, self._metadata.raw_data_file = self._metadata.raw_data_file, False
        try:
            await change(self, *args, **options)
        finally:
            self._metadata.raw_data_file = raw

    stack.enter_context(mock.patch.object(Eraser, "_change_data_file", mutated))


def _data_file_discarded_early(stack: ExitStack) -> None:
    """The data file is discarded while entries on the disk still refer to it."""
    write_zeroes = SimulatedDisk.write_zeroes

    async def mutated(self: SimulatedDisk, offset: int, length: int, **options: Any) -> None:
        if options.get("fast_only"):
            await self.discard(offset, length)
        else:
            await write_zeroes(self, offset, length, **options)

    stack.enter_context(mock.patch.object(SimulatedDisk, "write_zeroes", mutated))


def _tweak_by_another_sector(stack: ExitStack) -> None:
    """The engine reads what it wrote; nobody else does."""
    for name in ("encrypt", "decrypt"):
        whole = getattr(ciphers.Xts, name)

        def mutated(self: Any, sector: int, data: Any, whole: Any = whole) -> Any:
            return whole(self, sector + 1, data)

        stack.enter_context(mock.patch.object(ciphers.Xts, name, mutated))


def _packed_before_data(stack: ExitStack) -> None:
    """The entry of compressed data is there, the data is not yet."""
    _publish_before_data(stack)
    stack.enter_context(mock.patch.object(packing, "write_bytes", cow.write_bytes))


def _snapshot_of_the_disk(stack: ExitStack) -> None:
    """A snapshot has the tables that the disk has, though memory is further on."""
    create, close = SnapshotStore.create, Committer.close

    async def mutated(self: SnapshotStore, *args: Any) -> Any:
        async def nothing(_: Committer) -> None:
            return

        with mock.patch.object(Committer, "close", nothing):
            before = dict(self._metadata.dirty_tables)
            self._metadata.dirty_tables.clear()
            self._metadata.pending_fields.clear()
            result = await create(self, *args)
            self._metadata.dirty_tables.update(before)
        await close(self._committer)
        return result

    stack.enter_context(mock.patch.object(SnapshotStore, "create", mutated))


def _switch_not_flushed(stack: ExitStack) -> None:
    """The header names new tables that may not be on the disk yet."""
    commit = Switch.commit

    async def mutated(self: Switch, *args: Any, **fields: Any) -> Any:
        if (disk := _disk(self._metadata.file)) is not None:
            disk.medium.skip_flushes = 1
        return await commit(self, *args, **fields)

    stack.enter_context(mock.patch.object(Switch, "commit", mutated))


def _apply_keeps_clusters_of_nobody(stack: ExitStack) -> None:
    """What the disk had and the snapshot has not is given up, what both have too."""
    drop = SnapshotStore._drop_tree
    apply = SnapshotStore.apply

    async def mutated(self: SnapshotStore, snapshot: Any) -> Any:
        async def twice(store: SnapshotStore, switch: Switch, l1: Any) -> None:
            await drop(store, switch, l1)
            with suppress(OSError):
                await drop(store, switch, l1)

        with mock.patch.object(SnapshotStore, "_drop_tree", twice):
            return await apply(self, snapshot)

    stack.enter_context(mock.patch.object(SnapshotStore, "apply", mutated))


def _bitmaps_not_in_use(stack: ExitStack) -> None:
    """Stored bitmaps are not marked when writing begins."""

    async def mutated(self: BitmapStore) -> None:
        return

    stack.enter_context(mock.patch.object(BitmapStore, "mark_in_use", mutated))


def _zeroes_in_version_2(stack: ExitStack) -> None:
    """A downgrade leaves zero clusters where there are none in that version."""

    async def mutated(self: amend._Expansion) -> None:
        return

    stack.enter_context(mock.patch.object(amend._Expansion, "run", mutated))


def _zeroes_in_clear(stack: ExitStack) -> None:
    """A downgrade writes the zeros of an encrypted image past the cipher."""

    async def mutated(self: Switch) -> int:
        host_offset = await self._allocate(1)
        await self._metadata.file.write(host_offset, bytes(self.geometry.cluster_size))
        return host_offset

    stack.enter_context(mock.patch.object(Switch, "write_data", mutated))


def _zeroes_by_first_byte(stack: ExitStack) -> None:
    """detect-zeroes takes for zeros what only begins so."""
    stack.enter_context(mock.patch.object(backend, "is_zero", lambda data: not data[0]))


def _only_first_drive_flushed(stack: ExitStack) -> None:
    """What is flushed are the disks of one drive only."""
    flush = SimulatedDisk.flush

    async def mutated(self: SimulatedDisk) -> None:
        if not self.medium.machine.drive:
            await flush(self)

    stack.enter_context(mock.patch.object(SimulatedDisk, "flush", mutated))


#: by name; each is caught by the tests
MUTANTS: dict[str, Callable[[ExitStack], None]] = {
    "skip-first-flush": _skip_first_flush,
    "publish-before-data": _publish_before_data,
    "header-before-commit": _header_before_commit,
    "link-before-base": _link_before_base,
    "switch-before-base": _switch_before_base,
    "commit-without-the-rest": _commit_without_the_rest,
    "closed-without-flush": _closed_without_flush,
    "reuse-at-once": _reuse_at_once,
    "reuse-before-commit": _reuse_before_commit,
    "skip-last-flush": _skip_last_flush,
    "bitmaps-stay-behind": _bitmaps_stay_behind,
    "data-file-not-flushed": _data_file_not_flushed,
    "raw-file-without-zeros": _raw_file_without_zeros,
    "data-file-discarded-early": _data_file_discarded_early,
    "tweak-by-another-sector": _tweak_by_another_sector,
    "packed-before-data": _packed_before_data,
    "snapshot-of-the-disk": _snapshot_of_the_disk,
    "switch-not-flushed": _switch_not_flushed,
    "apply-gives-up-too-much": _apply_keeps_clusters_of_nobody,
    "bitmaps-not-in-use": _bitmaps_not_in_use,
    "zeroes-in-version-2": _zeroes_in_version_2,
    "zeroes-in-clear": _zeroes_in_clear,
    "zeroes-by-first-byte": _zeroes_by_first_byte,
    "only-first-drive-flushed": _only_first_drive_flushed,
    **COPY_MUTANTS,
}
#: members of ``machine.Plan`` for defects of something that few machines have
PLANS: dict[str, dict[str, Any]] = {
    **COPY_PLANS,
    "link-before-base": {"depth": 4, "steps": ("commit",)},
    "switch-before-base": {"depth": 2, "steps": ("commit_active",), "bitmap": False},
    "commit-without-the-rest": {"depth": 2, "steps": ("commit_active",), "bitmap": False},
    "only-first-drive-flushed": {"drives": 2, "depth": 1, "steps": ("rest",), "faults": False},
    "closed-without-flush": {
        "steps": ("mirror", "restart", "mirror", "restart"),
        "faults": False,
        "bitmap": False,
        "depth": 2,
    },
    "bitmaps-stay-behind": {"kind": "extended_l2"},
    "data-file-not-flushed": {"kind": "data_file"},
    "raw-file-without-zeros": {"kind": "data_file_raw", "depth": 1, "steps": ("rest",)},
    "data-file-discarded-early": {"kind": "data_file"},
    "tweak-by-another-sector": {"kind": "encrypt"},
    "snapshot-of-the-disk": {"depth": 1, "steps": ("internal", "internal")},
    "switch-not-flushed": {"steps": ("internal", "internal_gone", "amend")},
    "apply-gives-up-too-much": {"depth": 1, "steps": ("internal_apply", "rest")},
    "bitmaps-not-in-use": {"bitmap": True, "steps": ("rest", "restart", "rest")},
    "zeroes-in-version-2": {"cluster_size": 4096, "steps": ("amend", "amend", "amend")},
    "zeroes-in-clear": {
        "kind": "encrypt",
        "cluster_size": 4096,
        "depth": 2,
        "steps": ("amend", "amend", "amend"),
    },
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have the defect for a while; None: none."""
    with ExitStack() as stack:
        if name is not None:
            (MUTANTS | LIVE_MUTANTS)[name](stack)
        yield
