"""blockdev-backup and drive-backup (qapi/block-core.json).

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from liveblockd.graph.before_write import OnCbwError
from liveblockd.graph.snapshot import NewImageMode
from liveblockd.jobs.backup import BackupParameters, BitmapSyncMode
from liveblockd.jobs.backup_start import start_backup, start_drive_backup
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.jobs.mirror_job import MirrorSyncMode
from liveblockd.jobs.new_target import NewTarget
from liveblockd.qapi import QapiModel, Size
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class BackupPerf(QapiModel):
    """How a backup is to work; bytes."""

    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: Size | None = None


class BackupCommon(QapiModel):
    """What all backups are asked for; ``speed`` in bytes per second."""

    job_id: str | None = None
    device: str
    sync: MirrorSyncMode
    speed: int = 0
    bitmap: str | None = None
    bitmap_mode: BitmapSyncMode | None = None
    compress: bool = False
    on_source_error: BlockdevOnError = BlockdevOnError.REPORT
    on_target_error: BlockdevOnError = BlockdevOnError.REPORT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_GUEST_WRITE
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None
    discard_source: bool = False
    x_perf: BackupPerf | None = None


class BlockdevBackup(BackupCommon):
    """Arguments of blockdev-backup."""

    target: str


def parameters_of(context: Context, arguments: BackupCommon, target: str) -> BackupParameters:
    """Without ``job-id`` the job is called as the drive; a node has no name to lend."""
    job_id = arguments.job_id
    if job_id is None:
        job_id = arguments.device if arguments.device in context.graph.drives else ""
    performance = arguments.x_perf or BackupPerf()
    return BackupParameters(
        job_id=job_id,
        device=arguments.device,
        target=target,
        sync=arguments.sync,
        speed=arguments.speed,
        bitmap=arguments.bitmap,
        bitmap_mode=arguments.bitmap_mode,
        compress=arguments.compress,
        on_source_error=arguments.on_source_error,
        on_target_error=arguments.on_target_error,
        on_cbw_error=arguments.on_cbw_error,
        filter_node_name=arguments.filter_node_name,
        discard_source=arguments.discard_source,
        max_workers=performance.max_workers,
        max_chunk=performance.max_chunk,
        min_cluster_size=performance.min_cluster_size or 0,
        auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )


@command("blockdev-backup", args=BlockdevBackup)
async def blockdev_backup(context: Context, arguments: BlockdevBackup) -> None:
    """Copy a node as it is now to another one; a job does it."""
    parameters = parameters_of(context, arguments, arguments.target)
    await start_backup(context.graph, context.scheduler, parameters)


class DriveBackup(BackupCommon):
    """Arguments of drive-backup; ``target`` is a file name."""

    target: str
    format: str | None = None  # default: that of the source
    mode: NewImageMode | None = None  # default: absolute-paths


def new_target(arguments: DriveBackup) -> NewTarget:
    """What is to be opened or made."""
    mode = arguments.mode or NewImageMode.ABSOLUTE_PATHS
    return NewTarget(arguments.target, arguments.format, mode)


@command("drive-backup", args=DriveBackup, features=("deprecated",))
async def drive_backup(context: Context, arguments: DriveBackup) -> None:
    """Copy a node as it is now to an image, which is made unless ``mode`` is existing."""
    await start_drive_backup(
        context.graph,
        context.scheduler,
        parameters_of(context, arguments, ""),
        new_target(arguments),
        context.console,
    )
