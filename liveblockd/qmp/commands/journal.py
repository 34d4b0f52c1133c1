"""What the journal of jobs remembers, and the resuming of one that was under way.

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

import enum
from typing import Any

from liveblockd.errors import BlockError
from liveblockd.jobs.history import JobRecord
from liveblockd.jobs.journal import Journal
from liveblockd.jobs.resuming import resume
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class LiveblockJobResult(enum.StrEnum):
    """How far a job has come: ``interrupted`` by the end of a daemon, and not resumed."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class LiveblockJobRecord(QapiModel):
    """A job of this daemon or one before it; file names, and seconds since 1970."""

    id: str
    type_: str
    result: LiveblockJobResult
    images: list[str]
    base: str | None = None
    began: int
    ended: int | None = None
    error: str | None = None


class LiveblockResumeJob(QapiModel):
    """Arguments of x-liveblock-resume-job."""

    id: str


def find_journal(context: Context) -> Journal:
    """The journal; BlockError without one."""
    found = context.parts.get("journal")
    if not isinstance(found, Journal):
        raise BlockError("There is no journal of jobs: see --jobs")
    return found


def _info(context: Context, record: JobRecord) -> LiveblockJobRecord:
    if record.result is not None:
        result = LiveblockJobResult(record.result)
    elif context.scheduler.find(record.id) is not None:
        result = LiveblockJobResult.RUNNING
    else:
        result = LiveblockJobResult.INTERRUPTED
    return LiveblockJobRecord(
        id=record.id,
        type_=record.type,
        result=result,
        images=[image.file for image in record.images],
        base=None if record.base is None else record.base.file,
        began=int(record.began),
        ended=None if record.ended is None else int(record.ended),
        error=record.error,
    )


@command(
    "x-liveblock-query-job-journal",
    returns=list[LiveblockJobRecord],
    query=True,
    features=("unstable",),
)
async def x_liveblock_query_job_journal(
    context: Context, _arguments: Any
) -> list[LiveblockJobRecord]:
    """The jobs that are remembered, the newest first."""
    records = find_journal(context).history.jobs.values()
    return [_info(context, record) for record in reversed(records)]


@command("x-liveblock-resume-job", args=LiveblockResumeJob, features=("unstable",))
async def x_liveblock_resume_job(context: Context, arguments: LiveblockResumeJob) -> None:
    """Let a stream or commit go on that a daemon before this one was at when it ended."""
    journal = find_journal(context)
    record = journal.history.jobs.get(arguments.id)
    if record is None or _info(context, record).result is not LiveblockJobResult.INTERRUPTED:
        raise BlockError(f"No job '{arguments.id}' was interrupted")
    await resume(context.graph, context.scheduler, record, journal)
