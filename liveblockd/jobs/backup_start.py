"""How a backup comes to run: what it is asked for, what it must not disturb, what it takes.

Specification: qapi/block-core.json (blockdev-backup). Runs on the event loop, under ``graph.lock``.

A backup's instant is ``create_backup``: several of them within one ``graph.drained`` of all their
sources are of one instant (``transaction``).

Invariant: a start that fails leaves graph and bitmaps as they were. Errors: BlockError, in QEMU's
words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.graph.before_write import BeforeWrite
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.graph.copy_before_write import CopyBeforeWrite, cluster_size, driver_of
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Edge, Node, Operation
from liveblockd.graph.snapshot_access import SnapshotAccess
from liveblockd.jobs.backup import (
    BLOCKER,
    Backup,
    BackupParameters,
    BitmapSyncMode,
)
from liveblockd.jobs.mirror_job import MirrorSyncMode
from liveblockd.jobs.new_target import NewTarget, open_target, remove_target
from liveblockd.jobs.scheduler import Scheduler, Transaction
from liveblockd.jobs.starting import start_job
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import BlockDriver, Permission

_INT_MAX: Final = (1 << 31) - 1


async def start_backup(graph: Graph, scheduler: Scheduler, parameters: BackupParameters) -> Backup:
    """Check and start a backup; returns when it runs.

    A client that goes away meanwhile does not stop it halfway: then it runs.
    """
    return await start_job(scheduler, create_backup(graph, scheduler, parameters))


async def start_drive_backup(
    graph: Graph,
    scheduler: Scheduler,
    parameters: BackupParameters,
    new: NewTarget,
    console: Callable[[str], None],
) -> Backup:
    """The same for drive-backup."""
    work = create_drive_backup(graph, scheduler, parameters, new, console)
    return await start_job(scheduler, work)


async def create_drive_backup(
    graph: Graph,
    scheduler: Scheduler,
    parameters: BackupParameters,
    new: NewTarget,
    console: Callable[[str], None],
    transaction: Transaction | None = None,
) -> Backup:
    """The same to an image that is opened for it, and made; ``console`` takes what QEMU prints.

    With sync=none the source is the backing file of the target, with sync=top the source's is.
    """
    async with graph.lock:
        source = graph.lookup(parameters.device, parameters.device)
        if any(reason != BLOCKER for reason in source.op_blockers):
            source.check_operation(Operation.BACKUP_SOURCE)
        none = parameters.sync is MirrorSyncMode.NONE
        below = chain.layer_below(source)
        if parameters.sync is MirrorSyncMode.TOP and below is None:
            parameters = replace(parameters, sync=MirrorSyncMode.FULL)
        backing = None
        if none:
            backing = source
        elif parameters.sync is MirrorSyncMode.TOP:
            backing = below
        opened = await open_target(
            graph, source, new, backing=backing, open_backing=not none, console=console
        )
        try:
            # Nobody else can see it, so that it can be named before it has a backing node.
            if none:
                await surgery.replace_backing(graph, opened.node, source)
            named = replace(parameters, target=opened.node.name)
            return await create_backup(graph, scheduler, named, transaction)
        except BaseException:
            await graph.unref(opened.node)
            if opened.made:
                await remove_target(graph, new)
            raise


async def create_backup(
    graph: Graph,
    scheduler: Scheduler,
    parameters: BackupParameters,
    transaction: Transaction | None = None,
) -> Backup:
    """A backup as of now, whose job does not run yet: ``scheduler.start`` or ``discard`` it."""
    async with graph.lock:
        source = graph.lookup(parameters.device, parameters.device)
        target = graph.lookup(parameters.target, parameters.target)
        parameters, bitmap = _check_bitmap(source, parameters)
        _check_nodes(source, target, parameters)
        _check_performance(parameters)
        if bitmap is not None and parameters.bitmap_mode is not BitmapSyncMode.NEVER:
            bitmap.check(read_only=source.read_only)
        if source.length != target.length:
            raise BlockError("Source and target image have different sizes")
        scheduler.check_id(parameters.job_id)
        job = Backup(parameters, graph, source, target, _core(parameters, source, target))
        try:
            await _take(job, bitmap)
            scheduler.create(job, transaction)
            try:
                job.user = await JobUser.attach(
                    graph, _filter_of(job), Permission.CONSISTENT_READ, Permission.ALL
                )
            except BaseException:
                scheduler.refuse(job)
                raise
        except BaseException:
            await _give_back(job)
            raise
    return job


async def _give_back(job: Backup) -> None:
    await job.release()
    await job.held.unblock()


def _filter_of(job: Backup) -> Node:
    assert job.filter is not None
    return job.filter


def _check_bitmap(
    source: Node, parameters: BackupParameters
) -> tuple[BackupParameters, DirtyBitmap | None]:
    """The bitmap that is asked for; sync=incremental is a way to say bitmap and on-success."""
    sync, mode = parameters.sync, parameters.bitmap_mode
    incremental = sync is MirrorSyncMode.INCREMENTAL
    if (incremental or sync is MirrorSyncMode.BITMAP) and parameters.bitmap is None:
        raise BlockError(f"must provide a valid bitmap name for '{sync}' sync mode")
    if incremental:
        if mode not in (None, BitmapSyncMode.ON_SUCCESS):
            raise BlockError(
                f"Bitmap sync mode must be '{BitmapSyncMode.ON_SUCCESS}' when using sync mode "
                f"'{sync}'"
            )
        sync, mode = MirrorSyncMode.BITMAP, BitmapSyncMode.ON_SUCCESS
    if parameters.bitmap is None:
        if mode is not None:
            raise BlockError("Cannot specify bitmap sync mode without a bitmap")
        return parameters, None
    bitmap = source.find_bitmap(parameters.bitmap)
    if bitmap is None:
        raise BlockError(f"Bitmap '{parameters.bitmap}' could not be found")
    if mode is None:
        raise BlockError("Bitmap sync mode must be given when providing a bitmap")
    bitmap.check()
    if sync is MirrorSyncMode.NONE:
        raise BlockError(f"sync mode '{sync}' does not produce meaningful bitmap outputs")
    if mode is BitmapSyncMode.NEVER and sync is not MirrorSyncMode.BITMAP:
        raise BlockError(
            f"Bitmap sync mode '{mode}' has no meaningful effect when combined with sync mode "
            f"'{sync}'"
        )
    return replace(parameters, sync=sync, bitmap_mode=mode), bitmap


def _check_nodes(source: Node, target: Node, parameters: BackupParameters) -> None:
    # A filter above the source is the source: what is kept would be kept from being kept.
    if source in chain.stacked(target):
        raise BlockError("Source and target cannot be the same")
    if parameters.compress:
        driver = target.driver
        if type(driver).write_compressed is BlockDriver.write_compressed:
            raise BlockError(f"Compression is not supported for this drive {target.name}")
    # Several backups of one disk do not disturb each other.
    if any(reason != BLOCKER for reason in source.op_blockers):
        source.check_operation(Operation.BACKUP_SOURCE)
    target.check_operation(Operation.BACKUP_TARGET)


def _check_performance(parameters: BackupParameters) -> None:
    if not 1 <= parameters.max_workers <= _INT_MAX:
        raise BlockError(f"max-workers must be between 1 and {_INT_MAX}")
    if parameters.max_chunk < 0:
        raise BlockError("max-chunk must be zero (which means no limit) or positive")


def _core(parameters: BackupParameters, source: Node, target: Node) -> BeforeWrite:
    """With nothing to do yet."""
    size = cluster_size(driver_of(target), parameters.min_cluster_size)
    if 0 < parameters.max_chunk < size:
        raise BlockError(
            f"Required max-chunk ({parameters.max_chunk}) is less than backup cluster size ({size})"
        )
    return BeforeWrite(DirtyBitmap(source.length, size))


async def _take(job: Backup, bitmap: DirtyBitmap | None) -> None:
    """From here on the guests' old data are kept, and their writes recorded apart."""
    source = job.source
    # Between these two there is no request: nothing is written that neither of them sees.
    async with job.graph.drained(source):
        if (name := job.parameters.filter_node_name) is not None:
            try:
                job.graph.check_new_name(name)
            except BlockError as error:
                raise BlockError(f"Could not create node: {error.message}") from error
        with surgery.replacing():
            job.filter = await surgery.insert_driver(
                job.graph,
                source,
                lambda node: CopyBeforeWrite(
                    {"file": node, "target": job.target}, job.core, read_only=source.read_only
                ),
                name,
                beside={"target": job.target},
                keep=_staying(source),
            )
        job.begin(bitmap)
    for node in (job.filter, source, job.target):
        job.held.block(node)


def _staying(source: Node) -> list[Edge]:
    """Who reads the past of ``source`` itself goes on doing so."""
    return [
        edge
        for edge in source.parents
        if isinstance(edge.parent, Node) and edge.parent.driver_class is SnapshotAccess
    ]
