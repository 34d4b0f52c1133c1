"""x-liveblock-check: the check of an image in use, and what it found.

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

from typing import Any

from liveblockd.events import CheckCompleted
from liveblockd.jobs.check import CheckFix, CheckParameters, start_check
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command

#: reports that are kept
_KEPT = 64


class LiveblockCheck(QapiModel):
    """Arguments of x-liveblock-check; ``node``: of a node or a drive; ``speed`` in bytes/s."""

    job_id: str
    node: str
    fix: CheckFix = CheckFix.NONE
    speed: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


class QueryCheck(QapiModel):
    """Arguments of x-liveblock-query-check: only the report of this job, or of this node."""

    job_id: str | None = None
    node: str | None = None


class LiveblockCheckReport(QapiModel):
    """What a check found; offsets are bytes."""

    id: str
    node_name: str
    check_errors: int
    corruptions: int
    leaks: int
    leaks_fixed: int
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    messages: list[str]


def _reports(context: Context) -> list[CheckCompleted]:
    found: list[CheckCompleted] = context.parts.setdefault("checks", [])
    del found[:-_KEPT]
    return found


@command("x-liveblock-check", args=LiveblockCheck, features=("unstable",))
async def x_liveblock_check(context: Context, arguments: LiveblockCheck) -> None:
    """Check an image while it is used; a job does it."""
    parameters = CheckParameters(
        job_id=arguments.job_id,
        node=arguments.node,
        fix=arguments.fix,
        speed=arguments.speed,
        auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )
    await start_check(context.graph, context.scheduler, parameters, _reports(context))


@command(
    "x-liveblock-query-check",
    args=QueryCheck,
    returns=list[LiveblockCheckReport],
    query=True,
    features=("unstable",),
)
async def x_liveblock_query_check(context: Context, arguments: QueryCheck) -> list[dict[str, Any]]:
    """What the last checks found, the newest first."""
    return [
        report.data() | {"messages": list(report.messages)}
        for report in reversed(_reports(context))
        if arguments.job_id in (None, report.id) and arguments.node in (None, report.node_name)
    ]
