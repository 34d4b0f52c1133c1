"""Commands that look at jobs and steer them (qapi/job.json, qapi/block-core.json).

The ``block-job-*`` commands answer DeviceNotActive for a job they do not find, the ``job-*``
commands GenericError; ``block-job-cancel`` can be asked to be gentle, ``job-cancel`` never is.
A job that has told of its end, and leaves by itself, is gone for all of them, as QEMU's is then.

Runs on the event loop. Errors: BlockError.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any, ClassVar

from liveblockd.errors import BlockError, ErrorClass, JobNotFoundError
from liveblockd.jobs.job import BlockDeviceIoStatus, BlockJobType, Job, JobType
from liveblockd.jobs.mirror import MirrorCore
from liveblockd.jobs.mirror_options import MirrorCopyMode
from liveblockd.jobs.transitions import JobStatus, JobVerb, check_verb
from liveblockd.qapi import QapiModel
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class JobInfo(QapiModel):
    """One of query-jobs."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None


class BlockJobInfo(QapiModel):
    """One of query-block-jobs; lengths, offsets and speed in bytes."""

    qapi_tag: ClassVar[str] = "type"

    type: BlockJobType
    device: str
    len_: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: BlockDeviceIoStatus
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None

    @classmethod
    def qapi_variants(cls) -> Mapping[str, builtins.type[QapiModel]]:
        """What a type of job has besides."""
        return {"mirror": BlockJobInfoMirror}


class BlockJobInfoMirror(BlockJobInfo):
    """Of a mirror: whether guest writes reach the target before they are answered."""

    actively_synced: bool


class DeviceArgument(QapiModel):
    """A block job by ``device``, which is its id."""

    device: str


class IdArgument(QapiModel):
    """A job by ``id``."""

    id: str


class CancelArguments(QapiModel):
    """Arguments of block-job-cancel."""

    device: str
    force: bool = False


class SpeedArguments(QapiModel):
    """Arguments of block-job-set-speed; bytes per second, 0 for no limit."""

    device: str
    speed: int


class BlockJobChangeOptions(QapiModel):
    """Arguments of block-job-change."""

    qapi_tag: ClassVar[str] = "type"

    id: str
    type_: BlockJobType

    @classmethod
    def qapi_variants(cls) -> Mapping[str, builtins.type[QapiModel]]:
        """What a type of job has besides."""
        return {"mirror": BlockJobChangeOptionsMirror}


class BlockJobChangeOptionsMirror(BlockJobChangeOptions):
    """Of a mirror."""

    copy_mode: MirrorCopyMode


def block_job(context: Context, job_id: str) -> Job:
    """The block job ``job_id``; BlockError of class DeviceNotActive without one."""
    job = context.scheduler.find(job_id)
    if job is None or not job.is_block_job or job.leaving:
        raise JobNotFoundError(
            f"Block job '{job_id}' not found", error_class=ErrorClass.DEVICE_NOT_ACTIVE
        )
    return job


def any_job(context: Context, job_id: str) -> Job:
    """The job ``job_id``; BlockError without one."""
    job = context.scheduler.find(job_id)
    if job is None or job.leaving:
        raise JobNotFoundError("Job not found")
    return job


def block_job_info(job: Job) -> BlockJobInfo:
    """What query-block-jobs says of ``job``."""
    members: dict[str, Any] = {
        "type": BlockJobType(job.type),
        "device": job.id,
        "len_": job.length,
        "offset": job.offset,
        "busy": job.busy,
        "paused": job.pause_count > 0,
        "speed": job.speed,
        "io_status": job.io_status,
        "ready": job.ready,
        "status": job.status,
        "auto_finalize": job.auto_finalize,
        "auto_dismiss": job.auto_dismiss,
        "error": job.error.message if job.error is not None else None,
    }
    if job.type is JobType.MIRROR and isinstance(job, MirrorCore):
        return BlockJobInfoMirror(**members, actively_synced=job.actively_synced)
    return BlockJobInfo(**members)


def newest_first(context: Context) -> list[Job]:
    """The jobs that are there for clients, in the order in which they are shown."""
    return [job for job in reversed(context.scheduler.jobs.values()) if not job.leaving]


@command("query-block-jobs", returns=list[BlockJobInfo], query=True)
async def query_block_jobs(context: Context, _arguments: Any) -> list[BlockJobInfo]:
    """The block jobs."""
    return [block_job_info(job) for job in newest_first(context) if job.is_block_job]


@command("query-jobs", returns=list[JobInfo], query=True)
async def query_jobs(context: Context, _arguments: Any) -> list[JobInfo]:
    """All jobs."""
    return [
        JobInfo(
            id=job.id,
            type=job.type,
            status=job.status,
            current_progress=job.offset,
            total_progress=job.length,
            error=job.error.message if job.error is not None else None,
        )
        for job in newest_first(context)
    ]


async def _set_up(context: Context, job_id: str) -> None:
    """Return when no command is about to set the job up.

    A cancel waits for no other command: one may be waiting for this very job, which hangs. A pause
    or another speed is there at once, too, while a transaction waits for a slow disk.
    """
    job = context.scheduler.find(job_id)
    if job is not None and job.status is JobStatus.CREATED:
        async with context.command_lock:
            pass


@command("block-job-set-speed", args=SpeedArguments, aliases=("block_job_set_speed",), query=True)
async def block_job_set_speed(context: Context, arguments: SpeedArguments) -> None:
    """Change the speed at once."""
    await _set_up(context, arguments.device)
    context.scheduler.set_speed(block_job(context, arguments.device), arguments.speed)


@command("block-job-cancel", args=CancelArguments, aliases=("block_job_cancel",), query=True)
async def block_job_cancel(context: Context, arguments: CancelArguments) -> None:
    """End a job; BLOCK_JOB_CANCELLED tells when it has ended."""
    await _set_up(context, arguments.device)
    job = block_job(context, arguments.device)
    if job.user_paused and not arguments.force:
        raise BlockError(f"The block job for device '{job.id}' is currently paused")
    context.scheduler.cancel(job, force=arguments.force)


@command(
    "block-job-pause",
    args=DeviceArgument,
    aliases=("block_job_pause",),
    features=("deprecated",),
    query=True,
)
async def block_job_pause(context: Context, arguments: DeviceArgument) -> None:
    """Let a job stand still."""
    await _set_up(context, arguments.device)
    context.scheduler.pause(block_job(context, arguments.device))


@command(
    "block-job-resume",
    args=DeviceArgument,
    aliases=("block_job_resume",),
    features=("deprecated",),
    query=True,
)
async def block_job_resume(context: Context, arguments: DeviceArgument) -> None:
    """Let it go on, also after an error stopped it."""
    await _set_up(context, arguments.device)
    context.scheduler.resume(block_job(context, arguments.device))


@command(
    "block-job-complete",
    args=DeviceArgument,
    aliases=("block_job_complete",),
    features=("deprecated",),
)
async def block_job_complete(context: Context, arguments: DeviceArgument) -> None:
    """Let a ready job switch over."""
    context.scheduler.complete(block_job(context, arguments.device))


@command("block-job-finalize", args=IdArgument, features=("deprecated",))
async def block_job_finalize(context: Context, arguments: IdArgument) -> None:
    """Let a pending job take effect."""
    await context.scheduler.finalize(block_job(context, arguments.id))


@command("block-job-dismiss", args=IdArgument, features=("deprecated",))
async def block_job_dismiss(context: Context, arguments: IdArgument) -> None:
    """Forget a concluded job."""
    await context.scheduler.dismiss(block_job(context, arguments.id))


@command("block-job-change", args=BlockJobChangeOptions)
async def block_job_change(context: Context, arguments: BlockJobChangeOptions) -> None:
    """Change an option of a job; only mirrors have one."""
    job = block_job(context, arguments.id)
    check_verb(job.id, job.status, JobVerb.CHANGE)
    if job.type is not JobType.MIRROR or not isinstance(job, MirrorCore):
        raise BlockError("Job type does not support change")
    if not isinstance(arguments, BlockJobChangeOptionsMirror):
        raise BlockError(f"Job '{job.id}' is a '{job.type}' job, not a '{arguments.type_}' job")
    job.change_copy_mode(arguments.copy_mode)


@command("job-pause", args=IdArgument, query=True)
async def job_pause(context: Context, arguments: IdArgument) -> None:
    """Let a job stand still."""
    await _set_up(context, arguments.id)
    context.scheduler.pause(any_job(context, arguments.id))


@command("job-resume", args=IdArgument, query=True)
async def job_resume(context: Context, arguments: IdArgument) -> None:
    """Let it go on."""
    await _set_up(context, arguments.id)
    context.scheduler.resume(any_job(context, arguments.id))


@command("job-cancel", args=IdArgument, query=True)
async def job_cancel(context: Context, arguments: IdArgument) -> None:
    """End a job whatever it does, paused or ready too."""
    await _set_up(context, arguments.id)
    context.scheduler.cancel(any_job(context, arguments.id), force=True)


@command("job-complete", args=IdArgument)
async def job_complete(context: Context, arguments: IdArgument) -> None:
    """Let a ready job switch over."""
    context.scheduler.complete(any_job(context, arguments.id))


@command("job-finalize", args=IdArgument)
async def job_finalize(context: Context, arguments: IdArgument) -> None:
    """Let a pending job take effect."""
    await context.scheduler.finalize(any_job(context, arguments.id))


@command("job-dismiss", args=IdArgument)
async def job_dismiss(context: Context, arguments: IdArgument) -> None:
    """Forget a concluded job."""
    await context.scheduler.dismiss(any_job(context, arguments.id))
