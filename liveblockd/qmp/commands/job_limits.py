"""How many jobs may copy at once, and which of them wait for that.

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from typing import Any

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class LiveblockJobLimits(QapiModel):
    """Arguments of x-liveblock-set-job-limits; ``max_concurrent`` 0: no limit."""

    max_concurrent: int


class LiveblockJobLimitsInfo(LiveblockJobLimits):
    """What holds, and the ids of the jobs that wait for their turn, who is next first."""

    waiting: list[str]


def set_max_concurrent(context: Context, limit: int) -> None:
    """Let at most ``limit`` jobs copy at once from now on; BlockError if it is negative."""
    if limit < 0:
        raise BlockError("Parameter 'max-concurrent' expects a non-negative value")
    context.scheduler.turns.limit = limit


@command("x-liveblock-set-job-limits", args=LiveblockJobLimits, features=("unstable",))
async def x_liveblock_set_job_limits(context: Context, arguments: LiveblockJobLimits) -> None:
    """Change it at once: the youngest jobs beyond the limit stop after what they are at."""
    set_max_concurrent(context, arguments.max_concurrent)


@command(
    "x-liveblock-query-job-limits",
    returns=LiveblockJobLimitsInfo,
    query=True,
    features=("unstable",),
)
async def x_liveblock_query_job_limits(context: Context, _arguments: Any) -> LiveblockJobLimitsInfo:
    """The limit, and who waits."""
    turns = context.scheduler.turns
    waiting = [job.id for job in turns.waiting()]
    return LiveblockJobLimitsInfo(max_concurrent=turns.limit, waiting=waiting)
