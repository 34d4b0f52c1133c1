"""block-stream (qapi/block-core.json).

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from liveblockd.jobs.job import BlockdevOnError
from liveblockd.jobs.stream import StreamParameters
from liveblockd.jobs.stream_start import start_stream
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class BlockStream(QapiModel):
    """Arguments of block-stream; ``speed`` in bytes per second."""

    job_id: str | None = None
    device: str
    base: str | None = None
    base_node: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    bottom: str | None = None
    speed: int = 0
    on_error: BlockdevOnError = BlockdevOnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@command("block-stream", args=BlockStream, aliases=("block_stream",))
async def block_stream(context: Context, arguments: BlockStream) -> None:
    """Copy data from the backing files into ``device``; a job does it.

    Without ``job-id`` the job is called as the drive; a node has no name to lend.
    """
    job_id = arguments.job_id
    if job_id is None:
        job_id = arguments.device if arguments.device in context.graph.drives else ""
    parameters = StreamParameters(
        job_id=job_id,
        device=arguments.device,
        base=arguments.base,
        base_node=arguments.base_node,
        bottom=arguments.bottom,
        backing_file=arguments.backing_file,
        backing_mask_protocol=arguments.backing_mask_protocol,
        speed=arguments.speed,
        on_error=arguments.on_error,
        filter_node_name=arguments.filter_node_name,
        auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )
    await start_stream(context.graph, context.scheduler, parameters)
