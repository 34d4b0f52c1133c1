"""Known defects, put into the engine for a while: what finds none of them finds nothing.

``with planted("skip-first-flush"): ...``; each stands for a mistake that is easily made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

from liveblockd.formats.qcow2 import cow
from liveblockd.formats.qcow2.allocator import BlockNeeded
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.jobs.stream import Stream
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
            await self._release_one(item)
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


#: by name; each is caught by the tests
MUTANTS: dict[str, Callable[[ExitStack], None]] = {
    "skip-first-flush": _skip_first_flush,
    "publish-before-data": _publish_before_data,
    "header-before-commit": _header_before_commit,
    "reuse-at-once": _reuse_at_once,
    "reuse-before-commit": _reuse_before_commit,
    "skip-last-flush": _skip_last_flush,
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have the defect for a while; None: none."""
    with ExitStack() as stack:
        if name is not None:
            MUTANTS[name](stack)
        yield
