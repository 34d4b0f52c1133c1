"""blockdev-mirror and drive-mirror (qapi/block-core.json).

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from liveblockd.graph.snapshot import NewImageMode
from liveblockd.jobs.drive_mirror import DriveMirrorParameters, start_drive_mirror
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_start import start_mirror
from liveblockd.qapi import QapiModel, UInt32
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class BlockdevMirror(QapiModel):
    """Arguments of blockdev-mirror; ``speed`` in bytes per second, sizes in bytes."""

    job_id: str | None = None
    device: str
    target: str
    replaces: str | None = None
    sync: MirrorSyncMode
    speed: int | None = None
    granularity: UInt32 | None = None
    buf_size: int | None = None
    on_source_error: BlockdevOnError | None = None
    on_target_error: BlockdevOnError | None = None
    filter_node_name: str | None = None
    copy_mode: MirrorCopyMode | None = None
    auto_finalize: bool | None = None
    auto_dismiss: bool | None = None
    target_is_zero: bool | None = None


class DriveMirror(QapiModel):
    """Arguments of drive-mirror; ``speed`` in bytes per second, sizes in bytes."""

    job_id: str | None = None
    device: str
    target: str
    format: str | None = None  # default: that of the source, or what is found
    node_name: str | None = None
    replaces: str | None = None
    sync: MirrorSyncMode
    mode: NewImageMode | None = None  # default: absolute-paths
    speed: int | None = None
    granularity: UInt32 | None = None
    buf_size: int | None = None
    on_source_error: BlockdevOnError | None = None
    on_target_error: BlockdevOnError | None = None
    unmap: bool | None = None  # default: true
    copy_mode: MirrorCopyMode | None = None
    auto_finalize: bool | None = None
    auto_dismiss: bool | None = None


def _job_id(context: Context, arguments: BlockdevMirror | DriveMirror) -> str:
    """Without ``job-id`` the job is called as the drive; a node has no name to lend."""
    if arguments.job_id is not None:
        return arguments.job_id
    return arguments.device if arguments.device in context.graph.drives else ""


def _options(arguments: BlockdevMirror | DriveMirror, *, unmap: bool) -> MirrorOptions:
    return MirrorOptions(
        speed=arguments.speed or 0,
        on_source_error=arguments.on_source_error or BlockdevOnError.REPORT,
        on_target_error=arguments.on_target_error or BlockdevOnError.REPORT,
        unmap=unmap,
        copy_mode=arguments.copy_mode or MirrorCopyMode.BACKGROUND,
        auto_finalize=arguments.auto_finalize is not False,
        auto_dismiss=arguments.auto_dismiss is not False,
    )


@command("blockdev-mirror", args=BlockdevMirror, aliases=("blockdev_mirror",))
async def blockdev_mirror(context: Context, arguments: BlockdevMirror) -> None:
    """Copy ``device`` to the node ``target``; a job does it, and keeps them in step."""
    parameters = MirrorParameters(
        job_id=_job_id(context, arguments),
        device=arguments.device,
        target=arguments.target,
        sync=arguments.sync,
        replaces=arguments.replaces,
        filter_node_name=arguments.filter_node_name,
        target_is_zero=bool(arguments.target_is_zero),
        granularity=arguments.granularity,
        buf_size=arguments.buf_size,
        options=_options(arguments, unmap=True),
    )
    await start_mirror(context.graph, context.scheduler, parameters)


@command("drive-mirror", args=DriveMirror, aliases=("drive_mirror",))
async def drive_mirror(context: Context, arguments: DriveMirror) -> None:
    """Copy ``device`` to the image ``target``, which is created first."""
    mirror = MirrorParameters(
        job_id=_job_id(context, arguments),
        device=arguments.device,
        target=arguments.target,
        sync=arguments.sync,
        replaces=arguments.replaces,
        granularity=arguments.granularity,
        buf_size=arguments.buf_size,
        options=_options(arguments, unmap=arguments.unmap is not False),
    )
    parameters = DriveMirrorParameters(
        mirror,
        image_format=arguments.format,
        node_name=arguments.node_name,
        mode=arguments.mode or NewImageMode.ABSOLUTE_PATHS,
    )
    await start_drive_mirror(context.graph, context.scheduler, parameters, context.console)
