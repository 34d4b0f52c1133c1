"""Equal jobs at once get equal shares of the workers, of whatever kinds they are.

A model: pieces are as large as the jobs choose them by what the ones before took; two workers take
what was queued first.
"""

import heapq
from collections import deque
from types import SimpleNamespace

import pytest

from liveblockd.jobs.backup import MOST_CHUNK, Backup
from liveblockd.jobs.chunk_size import ChunkSize
from liveblockd.jobs.copying import FIRST_CHUNK, CopyJob
from liveblockd.jobs.mirror import MirrorCore
from liveblockd.runtime.demand import Demand

MIB = 1 << 20
#: of each job
SIZE = 512 * MIB
WORKERS = 2
#: of the most favoured job's progress, among jobs of one kind and of several: pieces grow and
#: shrink by halves, each kind within limits of its own
FAIR, FAIR_AMONG_OTHERS = 0.8, 0.4

KINDS = ("copy", "mirror", "backup")


class Copying:
    """A job of a kind (``copy``: stream, commit) among ``count`` of them."""

    def __init__(self, kind, count):
        self.kind = kind
        self.done = 0
        parallel = (MirrorCore if kind == "mirror" else CopyJob).parallel
        self.share = max(1, parallel // count)
        workers = SimpleNamespace(demand=Demand(WORKERS))
        self.sizes = ChunkSize()
        self.job = SimpleNamespace(
            graph=SimpleNamespace(environment=SimpleNamespace(workers=workers)),
            scheduler=SimpleNamespace(crowding=lambda _: max(1.0, count / parallel)),
            _copy_chunk=FIRST_CHUNK,
            _most_chunk=MOST_CHUNK,
            _served=False,
        )

    @property
    def piece(self):
        return self.sizes.size if self.kind == "mirror" else self.job._copy_chunk

    def took(self, length, seconds, worked):
        self.done += length
        if self.kind == "mirror":
            self.sizes.took(length, worked)
        else:
            adapt = (Backup if self.kind == "backup" else CopyJob)._adapt
            adapt(self.job, length, seconds, worked)


async def progress(kinds, rate):
    """How far each job has come when the first one is done; ``rate`` in bytes per second."""
    jobs = [Copying(kind, len(kinds)) for kind in kinds]
    now, number = 0.0, 0
    queue = deque((job, 0.0, job.piece) for job in jobs for _ in range(job.share))
    ends = []
    while all(job.done < SIZE for job in jobs):
        while queue and len(ends) < WORKERS:
            job, since, length = queue.popleft()
            number += 1
            heapq.heappush(ends, (now + length / rate, number, now, job, since, length))
        now, _, began, job, since, length = heapq.heappop(ends)
        job.took(length, now - since, now - began)
        queue.append((job, now, job.piece))
    most = max(job.done for job in jobs)
    return [job.done / most for job in jobs]


@pytest.mark.parametrize("rate", [50 * MIB, 300 * MIB, 1000 * MIB, 3000 * MIB])
@pytest.mark.parametrize("kinds", [*((kind,) * 6 for kind in KINDS), KINDS * 2, KINDS * 4])
async def test_equal_jobs(kinds, rate):
    found = await progress(kinds, rate)
    fair = FAIR if len(set(kinds)) == 1 else FAIR_AMONG_OTHERS
    assert min(found) >= fair, dict(enumerate(zip(kinds, found, strict=True)))
