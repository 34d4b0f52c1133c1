"""A job that was asked to end while its requests hang: nothing holds those up for ever.

A cancelled job ends when nothing of it is in flight. That takes a moment, unless a filter lets
its requests wait (``throttle``), or a server does not answer. So by and by filters let them go, as
for a drain; reads are waited for no longer; and a server that has the target, and says nothing, is
left. Nobody wants the target of a backup or mirror that was cancelled by force, and its node can be
opened again; an image that guests use is never given up, whatever hangs.

Runs on the event loop, in a task that the ``Scheduler`` ends with the job. Raises nothing.
"""

from __future__ import annotations

from typing import Final

from liveblockd.jobs.job import Job

#: seconds for which filters may go on holding requests
HELD: Final = 0.05
#: seconds that requests have to end by themselves
PATIENCE: Final = 1.0
#: seconds for which a server may say nothing
SILENCE: Final = 2.0
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
