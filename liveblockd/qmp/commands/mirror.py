"""blockdev-mirror (qapi/block-core.json).

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from liveblockd.jobs.job import BlockdevOnError
from liveblockd.jobs.mirror import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
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


@command("blockdev-mirror", args=BlockdevMirror, aliases=("blockdev_mirror",))
async def blockdev_mirror(context: Context, arguments: BlockdevMirror) -> None:
    """Copy ``device`` to the node ``target``; a job does it, and keeps them in step.

    Without ``job-id`` the job is called as the drive; a node has no name to lend.
    """
    job_id = arguments.job_id
    if job_id is None:
        job_id = arguments.device if arguments.device in context.graph.drives else ""
    report, true = BlockdevOnError.REPORT, True
    options = MirrorOptions(
        speed=arguments.speed or 0,
        on_source_error=arguments.on_source_error or report,
        on_target_error=arguments.on_target_error or report,
        copy_mode=arguments.copy_mode or MirrorCopyMode.BACKGROUND,
        auto_finalize=true if arguments.auto_finalize is None else arguments.auto_finalize,
        auto_dismiss=true if arguments.auto_dismiss is None else arguments.auto_dismiss,
    )
    parameters = MirrorParameters(
        job_id=job_id,
        device=arguments.device,
        target=arguments.target,
        sync=arguments.sync,
        replaces=arguments.replaces,
        filter_node_name=arguments.filter_node_name,
        target_is_zero=bool(arguments.target_is_zero),
        granularity=arguments.granularity,
        buf_size=arguments.buf_size,
        options=options,
    )
    await start_mirror(context.graph, context.scheduler, parameters)
