"""Pieces that somebody may wait for are small while guests are served, and only then."""

from types import SimpleNamespace

from liveblockd.jobs.backup import Backup
from liveblockd.jobs.chunk_size import ChunkSize
from liveblockd.jobs.host_copy import guest_is_served
from liveblockd.jobs.mirror import MirrorCore
from liveblockd.runtime.demand import Demand

MIB = 1 << 20


def graph_with(demand):
    workers = SimpleNamespace(demand=demand)
    return SimpleNamespace(environment=SimpleNamespace(workers=workers))


async def test_a_guest_is_served_for_a_moment_after_its_request():
    demand = Demand(2)
    graph = graph_with(demand)
    assert not guest_is_served(graph)
    demand.guests.requests += 1
    assert guest_is_served(graph) and guest_is_served(graph)


async def test_chunks_of_a_mirror():
    demand = Demand(2)
    job = SimpleNamespace(
        speed=0,
        graph=graph_with(demand),
        options=SimpleNamespace(granularity=65536, buf_size=16 * MIB),
        parallel=4,
        _chunk_size=ChunkSize(),
    )
    assert MirrorCore._chunk(job) == 4 * MIB
    job._chunk_size.took(4 * MIB, 0.005)
    assert MirrorCore._chunk(job) == 8 * MIB
    demand.guests.requests += 1
    assert MirrorCore._chunk(job) == 2 * MIB
    job.options.buf_size = 4 * MIB
    assert MirrorCore._chunk(job) == MIB
    job.speed = 1
    assert MirrorCore._chunk(job) == 65536
    job.speed = 100 * MIB
    assert MirrorCore._chunk(job) == MIB // 2


def test_a_chunk_takes_some_milliseconds():
    chunk = ChunkSize()
    for expected in (8, 16, 32, 32):
        chunk.took(chunk.size, 0.01)
        assert chunk.size == expected * MIB
    chunk.took(MIB, 0.001)  # a short one tells little
    chunk.took(32 * MIB, 0.03)
    assert chunk.size == 32 * MIB
    for expected in (16, 8, 4, 2, 2):
        chunk.took(chunk.size, 0.1)
        assert chunk.size == expected * MIB
    chunk.took(MIB, 0.001)
    assert chunk.size == 2 * MIB


async def test_chunks_of_a_backup():
    demand = Demand(2)
    job = SimpleNamespace(
        graph=graph_with(demand), _copy_chunk=2 * MIB, _most_chunk=64 * MIB, _served=False,
        scheduler=SimpleNamespace(crowding=lambda job: 1.0),
    )  # fmt: skip
    for expected in (4, 8, 16):  # four milliseconds each
        Backup._adapt(job, job._copy_chunk, 0.004, 0)
        assert job._copy_chunk == expected * MIB
    Backup._adapt(job, job._copy_chunk, 0.015, 0)
    assert job._copy_chunk == 16 * MIB
    Backup._adapt(job, job._copy_chunk, 0.1, 0.015)  # most of it for a worker
    assert job._copy_chunk == 16 * MIB
    demand.guests.requests += 1
    Backup._adapt(job, 16 * MIB, 0.003, 0)
    assert job._copy_chunk == 2 * MIB  # at once
    Backup._adapt(job, 2 * MIB, 0.003, 0)
    assert job._copy_chunk == 2 * MIB
    Backup._adapt(job, 2 * MIB, 0.005, 0)
    assert job._copy_chunk == MIB
    Backup._adapt(job, MIB, 0.0005, 0)
    assert job._copy_chunk == 2 * MIB
