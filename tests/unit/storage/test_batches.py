"""Writes that a worker makes by the batch."""

import asyncio
import os
import random
from errno import EIO, ENOSPC

import pytest

from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage import batches, hostcalls
from liveblockd.storage.batches import WriteBatches
from tests.support.workers import SeededWorkers


async def until(true):
    for _ in range(5000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError


@pytest.fixture
def fd(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_adjacent_writes_are_one_call_in_the_order_given(fd, monkeypatch):
    calls, pwritev = [], os.pwritev

    def counted(fd, buffers, offset):
        calls.append((offset, len(buffers)))
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", counted)
    assert hostcalls.write_batch(fd, [(0, b"aa"), (2, b"bb"), (0, b"c"), (9, b"d")]) is None
    assert calls == [(0, 2), (0, 1), (9, 1)]
    assert os.pread(fd, 99, 0) == b"cabb\0\0\0\0\0d"


def test_each_write_has_its_own_error(fd, monkeypatch):
    pwrite = os.pwrite

    def full(fd, data, offset):
        if offset == 4:
            raise OSError(ENOSPC, "full")
        return pwrite(fd, data[:1], offset)  # short, too

    monkeypatch.setattr(os, "pwritev", lambda *_: 1)
    monkeypatch.setattr(os, "pwrite", full)
    errors = hostcalls.write_batch(fd, [(0, b"abcd"), (4, b"efgh"), (8, b"ijkl")])
    assert [e and e.errno for e in errors] == [None, ENOSPC, None]
    assert os.pread(fd, 99, 0) == b"abcd\0\0\0\0ijkl"


async def test_a_round_is_one_job_and_more_wait_their_turn(fd):
    workers = SeededWorkers(1, automatic=False)
    writes = WriteBatches(workers.group(), fd)
    ended = []
    for number in range(5):
        writes.add(number, b"%d" % number, lambda e, n=number: ended.append((n, e)))
    await asyncio.sleep(0)
    assert len(workers.queued) == 1 and writes.writes == 5 and writes and not ended
    for number in range(5, 8):  # another job, and what comes then waits for one of the two
        writes.add(number, b"%d" % number, lambda e, n=number: ended.append((n, e)))
        await asyncio.sleep(0)
    assert len(workers.queued) == batches.MAX_JOBS and writes.writes == 6
    await until(lambda: not workers.step() and not writes)
    assert sorted(ended) == [(n, None) for n in range(8)] and not writes
    assert os.pread(fd, 99, 0) == b"01234567"
    assert writes.jobs == 3


async def test_a_defect_of_one_end_and_a_pool_that_is_gone(fd, caplog):
    workers = WorkerPool(1)
    writes = WriteBatches(workers.group(), fd)
    ended = []

    def broken(_):
        raise ValueError("defect")

    writes.add(0, b"a", broken)
    writes.add(1, b"b", ended.append)
    await until(lambda: not writes)
    assert ended == [None] and "defect" in caplog.text
    workers.close()
    writes.add(2, b"c", ended.append)
    await asyncio.sleep(0)
    assert ended[1].errno == EIO and not writes


async def test_overlapping_batches_never_mix_within_a_write(fd):
    rng = random.Random(7)
    workers = WorkerPool(4)
    writes = WriteBatches(workers.group(), fd)
    left = 0

    def done(error):
        nonlocal left
        assert error is None
        left -= 1

    for byte in range(1, 200):
        left += 1
        writes.add(rng.randrange(4) * 4096, bytes([byte]) * 4096, done)
        if rng.random() < 0.3:
            await asyncio.sleep(0)
    await until(lambda: not left)
    data = os.pread(fd, 4 * 4096, 0)
    assert all(len(set(data[at : at + 4096])) == 1 for at in range(0, len(data), 4096))
    workers.close()
