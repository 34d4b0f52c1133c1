import asyncio
import hashlib
import os
import threading
import time
from queue import SimpleQueue

import pytest

from liveblockd.runtime import workers
from liveblockd.runtime.demand import Arrivals, Demand
from liveblockd.runtime.workers import WorkerPool
from tests.support.patience import until
from tests.support.workers import InlineWorkers, SeededWorkers


@pytest.fixture
async def pool():
    pool = WorkerPool(2)
    yield pool
    await pool.idle()
    pool.close()


def boom():
    raise OSError(28, "No space left on device")


async def test_results_and_errors_come_through(pool):
    assert await pool.run(lambda a, b: a + b, 2, 3) == 5
    with pytest.raises(OSError, match="No space") as caught:
        await pool.run(boom)
    assert caught.value.errno == 28


async def test_a_stop_iteration_does_not_hang_the_waiter(pool):
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(pool.run(next, iter(())), 30)


async def test_runs_off_the_loop_and_starts_threads_lazily(pool):
    assert pool._threads == []
    assert await pool.run(threading.get_ident) != threading.get_ident()
    assert len(pool._threads) == 1
    gate = threading.Event()
    jobs = [pool.submit(gate.wait, 5) for _ in range(6)]
    assert len(pool._threads) == 2
    gate.set()
    await asyncio.gather(*jobs)


async def test_many_completions_share_a_wake_up(pool, monkeypatch):
    loop = asyncio.get_running_loop()
    await pool.run(int)
    wakes = []
    real = loop.call_soon_threadsafe

    def counting(*args, **kwargs):
        wakes.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
    jobs = [pool.submit(int, i) for i in range(200)]
    while len(pool._done) < 200:
        time.sleep(0.001)  # noqa: ASYNC251 - the loop is kept busy: nothing is handed out
    assert await asyncio.gather(*jobs) == list(range(200))
    assert len(wakes) <= 2


async def test_a_cancelled_waiter_learns_of_it_when_the_job_has_ended(pool):
    gate, ended = threading.Event(), []

    def job():
        gate.wait(5)
        ended.append(True)

    task = asyncio.create_task(pool.run(job))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done() and not ended
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_a_queued_job_runs_although_its_waiter_is_cancelled(pool):
    gate, ran = threading.Event(), []
    blockers = [pool.submit(gate.wait, 5) for _ in range(2)]
    task = asyncio.create_task(pool.run(ran.append, 1))
    await asyncio.sleep(0)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ran == [1]
    await asyncio.gather(*blockers)


async def test_the_error_of_an_unwanted_job_is_not_logged(pool, caplog):
    gate = threading.Event()

    def job():
        gate.wait(5)
        boom()

    task = asyncio.create_task(pool.run(job))
    await asyncio.sleep(0)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await asyncio.sleep(0)
    assert "never retrieved" not in caplog.text


async def test_idle_of_a_group_does_not_wait_for_others(pool):
    gate = threading.Event()
    other = pool.submit(gate.wait, 5)
    group = pool.group()
    job = group.submit(int)
    await asyncio.wait_for(group.idle(), 30)
    assert job.done() and not other.done() and group.count == 0
    assert pool.outstanding == 1
    gate.set()
    await asyncio.wait_for(pool.idle(), 30)
    assert other.done()


def threads():
    """Those of this process, by number."""
    return set(os.listdir("/proc/self/task"))


async def test_the_loop_does_not_wait_for_a_new_thread(pool, monkeypatch):
    """Until it runs a busy machine takes its time."""
    begun = []
    start = workers._thread.start_new_thread
    monkeypatch.setattr(workers._thread, "start_new_thread", lambda *what: begun.append(what))
    job = pool.submit(int)
    assert len(begun) == 1 and not job.done()
    start(*begun[0])
    assert await asyncio.wait_for(job, 30) == 0


async def test_close_joins_and_hands_out_what_is_left():
    others = threads()
    pool = WorkerPool(1)
    jobs = [pool.submit(int, i) for i in range(10)]
    pool.close()
    assert [job.result() for job in jobs] == list(range(10))
    deadline = time.monotonic() + 30
    # The kernel's own part of its end comes later.
    while threads() - others and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert not threads() - others
    with pytest.raises(RuntimeError):
        pool.submit(int)
    pool.close()


async def test_nothing_of_a_job_stays_alive_in_the_thread(pool):
    import gc
    import weakref

    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    await pool.run(lambda _: None, thing)
    del thing
    gc.collect()
    await until(lambda: gone() is None)


async def test_inline_double():
    pool = InlineWorkers()
    group = pool.group()
    job = group.submit(int, 7)
    assert job.done() and await job == 7
    await asyncio.wait_for(group.idle(), 30)
    with pytest.raises(OSError):
        await pool.run(boom)


@pytest.mark.parametrize("seed", [1, 2])
async def test_seeded_double_repeats_its_order(seed):
    async def order():
        pool, seen = SeededWorkers(seed), []
        await asyncio.gather(*(pool.run(seen.append, i) for i in range(20)))
        await asyncio.wait_for(pool.idle(), 30)
        return seen

    first = await order()
    assert first == await order()
    assert first != sorted(first)


async def test_a_request_does_not_queue_behind_copies(pool):
    gate = threading.Event()
    copies = [pool.copies.submit(gate.wait, 20) for _ in range(10)]
    try:
        assert await asyncio.wait_for(pool.run(lambda: "answer"), 30) == "answer"
        assert not any(copy.done() for copy in copies)
        assert pool.outstanding == 10
        idle = asyncio.ensure_future(pool.idle())
        await asyncio.sleep(0)
        assert not idle.done()
    finally:
        gate.set()
    await asyncio.wait_for(idle, 30)
    assert all(copy.result() for copy in copies)


async def test_copies_end_with_the_pool(pool):
    done = []
    pool.copies.submit(done.append, 1)
    pool.close()
    assert done == [1]
    with pytest.raises(RuntimeError):
        pool.copies.submit(done.append, 2)


class Running:
    """Jobs that say how many of them run at once, by file."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now, self.most, self.order = {}, {}, []
        self.gate = threading.Event()
        self.gate.set()
        self.pair = threading.Barrier(2)

    def job(self, file, seconds=0.005):
        self.gate.wait(20)
        with self.lock:
            self.order.append(file)
            self.now[file] = self.now.get(file, 0) + 1
            self.most[file] = max(self.most.get(file, 0), self.now[file])
        time.sleep(seconds)
        with self.lock:
            self.now[file] -= 1
        return file

    def beside(self, file):
        """A job that ends only beside another one."""
        self.pair.wait(20)
        return self.job(file)


class Served(Demand):
    """Somebody is served for as long as the test says."""

    served = True

    def width(self, wanted, now):
        self.guests.requests += self.served
        return super().width(wanted, now)


@pytest.fixture
async def busy_pool():
    """A pool on two processors."""
    pool = WorkerPool(2, demand=Served(2))
    yield pool
    await pool.idle()
    pool.close()


async def test_copies_to_one_file_go_one_by_one_while_somebody_is_served(busy_pool):
    running, lane = Running(), busy_pool.lane()
    busy_pool.demand.served = False
    # nobody asks: as many as there are threads
    assert await asyncio.gather(*(lane.run(running.beside, "a") for _ in range(12))) == ["a"] * 12
    running = Running()
    busy_pool.demand.served = True
    await asyncio.gather(*(lane.run(running.job, "a") for _ in range(12)))
    assert running.most == {"a": 1}
    # and again, once that is over
    busy_pool.demand.served = False
    busy_pool.demand.guests = Arrivals()
    running = Running()
    await asyncio.gather(*(lane.run(running.beside, "a") for _ in range(12)))


class CountedQueue(SimpleQueue):
    puts = 0

    def put(self, job):
        self.puts += 1
        super().put(job)


async def test_copies_to_one_file_stay_on_one_thread_while_somebody_is_served(busy_pool):
    """No other one is woken up for the next."""
    lane = busy_pool.lane()
    queue = busy_pool.copies._queue = CountedQueue()
    found = await asyncio.gather(*(lane.run(threading.get_ident) for _ in range(50)))
    assert len(set(found)) == 1 and queue.puts == 1


async def test_copies_to_other_files_go_on_beside_them(busy_pool):
    running = Running()
    lanes = {name: busy_pool.lane() for name in "abcde"}
    names = [name for name in "abcde" for _ in range(6)]
    jobs = asyncio.gather(*(lanes[name].run(running.job, name) for name in names))
    running.gate.clear()
    while busy_pool.outstanding < len(names):  # noqa: ASYNC110
        await asyncio.sleep(0)
    running.gate.set()
    await jobs
    assert running.most == dict.fromkeys("abcde", 1)
    # there are fewer threads than files: after each copy it is the others' turn
    assert set(running.order[:7]) == set("abcde"), running.order


@pytest.mark.parametrize("served", [False, True])
async def test_copies_in_memory_are_no_more_than_processors(monkeypatch, served):
    """Of all files together; and while somebody is served no more than one of each on two."""
    monkeypatch.setattr(workers, "COPY_THREADS", 4)
    pool = WorkerPool(2, demand=Served(2))
    pool.demand.served = served
    lanes = {name: pool.lane(waits=False) for name in "abcde"}
    running = Running()
    jobs = (lane.run(running.job, "all") for lane in lanes.values() for _ in "1234")
    await asyncio.gather(*jobs)
    assert running.most["all"] <= 2 and len(running.order) == 20
    running = Running()  # two are beside each other, of one file only if nobody is served
    jobs = (lanes[name].run(running.beside, name) for name in ("ab" if served else "aa") * 3)
    await asyncio.gather(*jobs)
    running = Running()
    await asyncio.gather(*(lanes["a"].run(running.job, "a") for _ in range(6)))
    assert not served or running.most == {"a": 1}
    # others wait for no copy in memory, and the pool is idle when all are
    assert pool.copies is not pool.copies_in_memory
    pending = lanes["a"].submit(running.job, "a")
    assert pool.outstanding == 1
    await pool.idle()
    assert pending.done() and not pool.outstanding
    pool.close()
    with pytest.raises(RuntimeError):
        lanes["a"].submit(running.job, "a")


async def test_what_waits_in_a_lane_ends_with_the_pool(busy_pool):
    lane, done = busy_pool.lane(), []
    jobs = [asyncio.ensure_future(lane.run(done.append, number)) for number in range(20)]
    await asyncio.sleep(0)
    busy_pool.close()
    assert done == list(range(20))
    await asyncio.gather(*jobs)


async def test_a_lane_outlives_errors(busy_pool):
    lane = busy_pool.lane()
    results = await asyncio.gather(
        *(lane.run(boom if n % 2 else int) for n in range(10)), return_exceptions=True
    )
    assert [type(result) for result in results] == [int, OSError] * 5


def threads_of(pool):
    return len(pool._threads)


async def test_who_sleeps_keeps_nobody_from_work(pool):
    """As many as there are threads wait for a slow disk; others are as fast as ever, and so few."""
    slow = threading.Event()
    sleeping = [pool.submit(slow.wait, 60) for _ in range(6)]
    await asyncio.wait_for(pool.run(int), 30)
    for _ in range(20):
        began = time.monotonic()
        await asyncio.wait_for(pool.run(time.sleep, 0.001), 30)
        if time.monotonic() - began < 0.02:
            break
    else:
        raise AssertionError("each waits for a thread")
    assert 6 < threads_of(pool) <= 6 + 2
    slow.set()
    await asyncio.gather(*sleeping)
    async with asyncio.timeout(30):
        while threads_of(pool) > 2:  # who has stood in leaves after its next job
            await asyncio.gather(*(pool.run(time.sleep, 0.001) for _ in range(10)))
    assert await pool.run(lambda: 5) == 5


async def test_who_computes_is_not_joined_by_others(pool):
    def compute():
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2000)  # without the GIL

    computing = [pool.submit(compute) for _ in range(4)]
    await asyncio.gather(*computing)
    assert threads_of(pool) == 2


async def test_there_is_an_end_to_it(pool):
    slow = threading.Event()
    sleeping = [pool.submit(slow.wait, 60) for _ in range(40)]
    async with asyncio.timeout(30):
        while threads_of(pool) < 2 + workers.SPARE_THREADS:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert threads_of(pool) == 2 + workers.SPARE_THREADS
    slow.set()
    await asyncio.gather(*sleeping)


async def test_a_pool_is_closed_while_threads_leave():
    for seed in range(20):
        pool = WorkerPool(1)
        slow = threading.Event()
        sleeping = [pool.submit(slow.wait, 60) for _ in range(4)]
        async with asyncio.timeout(30):
            while threads_of(pool) < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        more = [pool.submit(time.sleep, 0.0001) for _ in range(seed)]
        slow.set()
        await asyncio.sleep(seed / 4000)
        pool.close()
        assert all(future.done() for future in (*sleeping, *more))
