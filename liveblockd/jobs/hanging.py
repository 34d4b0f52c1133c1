"""A job that was asked to end while its requests hang: nothing holds those up for ever.

A cancelled job ends when nothing of it is in flight. That takes a moment, unless a filter lets
its requests wait (``throttle``), or a server does not answer. So by and by filters let them go, as
for a drain; reads are waited for no longer; and a server that has the target, and says nothing, is
cut off. Nobody wants the target of a backup or mirror that was cancelled by force, and its node can
be opened again; an image that guests use, as the base of a commit, is never given up.

What helps against everything else: the job is *left*. Its end is told, its id is free, and the
other jobs of its transaction end. What it has in flight goes on until it is answered or fails, and
for so long nothing that the job holds of the graph is given back (users, frozen links, blockers, a
filter, an image made writable). So nobody can write to those images whom a late request could
overtake, and who wants them is refused as before. Then the hooks of the job run, as they would
have. The same goes for a job that cannot give back its nodes because a guest's request hangs.

Runs on the event loop, in tasks that the ``Scheduler`` ends with the job. Raises nothing.
"""

from __future__ import annotations

from typing import Final

from liveblockd.jobs.job import Job
from liveblockd.jobs.transitions import JobStatus

#: seconds for which filters may go on holding requests
HELD: Final = 0.05
#: seconds that requests have to end by themselves
PATIENCE: Final = 1.0
#: seconds for which a server may say nothing
SILENCE: Final = 2.0
#: seconds after which the job is left
LEFT: Final = 3.0
#: the same where its end has been told, and what it wrote is being made durable
LEFT_TOLD: Final = 10.0
#: seconds between two looks
AGAIN: Final = 0.1


async def hurry(job: Job) -> None:
    """Let nothing hold up a job that was asked to end; goes on until it is cancelled."""
    clock = job.scheduler.clock
    await clock.sleep(HELD)
    with job.nothing_held():
        await clock.sleep(PATIENCE - HELD)
        while True:
            job.give_up_reads()
            job.cut_off(SILENCE)
            await clock.sleep(AGAIN)


async def lose_patience(job: Job) -> None:
    """Leave the job when it has not ended in time; goes on until then or until it is cancelled."""
    clock = job.scheduler.clock
    last = clock.monotonic() + LEFT_TOLD
    await clock.sleep(LEFT)
    while True:
        told = job.status is JobStatus.CONCLUDED
        if (not told or clock.monotonic() >= last) and job.scheduler.leave(job):
            return
        await clock.sleep(AGAIN)
