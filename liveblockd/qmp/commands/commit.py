"""block-commit (qapi/block-core.json).

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from liveblockd.jobs.commit import CommitParameters
from liveblockd.jobs.commit_start import start_commit
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class BlockCommit(QapiModel):
    """Arguments of block-commit; ``speed`` in bytes per second."""

    job_id: str | None = None
    device: str
    base_node: str | None = None
    base: str | None = None
    top_node: str | None = None
    top: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    speed: int = 0
    on_error: BlockdevOnError = BlockdevOnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


@command("block-commit", args=BlockCommit)
async def block_commit(context: Context, arguments: BlockCommit) -> None:
    """Copy what the images above ``base`` hold into it, and drop them; a job does it.

    Without ``job-id`` the job is called as the drive; a node has no name to lend.
    """
    given = arguments.model_dump()
    if arguments.job_id is None:
        given["job_id"] = arguments.device if arguments.device in context.graph.drives else ""
    await start_commit(context.graph, context.scheduler, CommitParameters(**given))
