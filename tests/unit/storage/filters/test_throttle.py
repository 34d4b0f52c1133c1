import asyncio

import pytest

from liveblockd.errors import BlockError
from liveblockd.storage.filters.buckets import Buckets, Limits, Rate, check
from liveblockd.storage.filters.throttle import Throttle
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from tests.support.memory import MemoryDriver


def limits(iops_size=0, **rates):
    found = {
        kind.replace("_", "-"): rate if isinstance(rate, Rate) else Rate(rate)
        for kind, rate in rates.items()
    }
    return Limits(found, iops_size)


def done_in(buckets, seconds, length=512, is_write=False):
    """Requests that go in that time, one after the other as soon as each may."""
    now, count = 0.0, 0
    while now <= seconds:
        wait = buckets.wait(is_write, now)
        if wait:
            now += wait + 1e-9
            continue
        buckets.account(is_write, length)
        count += 1
    return count


# -- the pure core


def test_the_rate_is_kept_after_a_tenth_of_a_second_at_once():
    assert 1010 <= done_in(Buckets(limits(iops_total=100), 0.0), 10) <= 1012
    assert 2050 <= done_in(Buckets(limits(bps_total=1 << 20), 0.0), 1) <= 2257


def test_a_large_request_pays_afterwards():
    buckets = Buckets(limits(bps_total=1000), 0.0)
    assert buckets.wait(False, 0.0) == 0
    buckets.account(False, 5000)
    assert buckets.wait(False, 0.0) == pytest.approx(4.9)
    assert buckets.wait(True, 2.0) == pytest.approx(2.9)


def test_directions():
    buckets = Buckets(limits(iops_write=1), 0.0)
    buckets.account(True, 512)
    assert buckets.wait(True, 0.0) > 0.8 and buckets.wait(False, 0.0) == 0


def test_bursts():
    # 2000 of 100 a second for 60 s: the bucket takes 120000, and leaks meanwhile.
    rate = Rate(100, 2000, 60)
    assert done_in(Buckets(limits(iops_total=rate), 0.0), 1) < 2300
    assert 110_000 < done_in(Buckets(limits(iops_total=rate), 0.0), 60) < 121_000
    assert 126_000 < done_in(Buckets(limits(iops_total=rate), 0.0), 120) < 134_000
    once = Buckets(limits(iops_total=Rate(10, 500)), 0.0)
    assert 500 <= done_in(once, 0.001) <= 502


def test_large_requests_count_as_several():
    buckets = Buckets(limits(iops_total=10, iops_size=4096), 0.0)
    buckets.account(False, 4096 * 11)
    assert buckets.wait(False, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (limits(iops_total=1, iops_read=1), "cannot be used at the same time"),
        (limits(bps_total=Rate(1, 1), bps_write=Rate(0, 1)), "cannot be used at the same time"),
        (limits(4096, bps_total=5), "iops size requires"),
        (limits(iops_total=10**15 + 1), "must be within"),
        (limits(iops_total=-1), "must be within"),
        (limits(iops_total=Rate(1, 2, 0)), "cannot be 0"),
        (limits(iops_total=Rate(1, 0, 2)), "without burst rate"),
        (limits(iops_total=Rate(1, 10**9, 10**8)), "too high"),
        (limits(iops_total=Rate(0, 5)), "require corresponding"),
        (limits(iops_total=Rate(7, 5)), "cannot be lower"),
    ],
)
def test_what_does_not_go_together(given, message):
    with pytest.raises(BlockError, match=message):
        check(given)


# -- the group and the driver


def disks(count, **rates):
    group = ThrottleGroup(limits(**rates))
    images = [MemoryDriver.of(bytes(8192)) for _ in range(count)]
    return group, [Throttle({"file": image}, group, read_only=False) for image in images]


async def test_without_limits_it_is_not_there():
    _, (disk,) = disks(1)
    assert disk.read_nowait(0, 4) == bytes(4)
    disk.child.host_file = lambda: "descriptor"
    assert disk.host_file() == "descriptor"
    _, (disk,) = disks(1, iops_total=5)
    disk.child.host_file = lambda: "descriptor"
    assert disk.host_file() is None


async def test_requests_wait_in_order():
    _, (disk,) = disks(1, iops_write=50)
    begun = asyncio.get_running_loop().time()
    order = []

    async def write(number):
        await disk.write(0, bytes([number]))
        order.append(number)

    await asyncio.gather(*(write(n) for n in range(16)))
    took = asyncio.get_running_loop().time() - begun
    assert order == list(range(16)) and 0.15 < took < 20
    assert disk.write_nowait(0, b"x") is False  # the bucket is full
    assert bytes(disk.read_nowait(0, 1)) == b"\x0f"  # reads are not limited


async def test_disks_take_turns():
    group, (greedy, modest) = disks(2, iops_read=100)
    while group.passes(greedy._member, False):
        group.account(False, 1)
    order = []

    async def read(disk):
        await disk.read(0, 1)
        order.append(disk)

    tasks = [asyncio.ensure_future(read(greedy)) for _ in range(12)]
    await asyncio.sleep(0)
    tasks += [asyncio.ensure_future(read(modest)) for _ in range(3)]
    await asyncio.gather(*tasks)
    assert order.index(modest) <= 2
    assert [i for i, disk in enumerate(order) if disk is modest][-1] <= 7


async def test_a_cancelled_request_leaves_no_trace():
    group, (disk,) = disks(1, bps_read=1)
    await disk.read(0, 4096)  # an hour's worth
    waiting = asyncio.ensure_future(disk.read(0, 1))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not disk._member.waiting[False]
    group.configure(limits(bps_read=1 << 20))
    await asyncio.wait_for(disk.read(0, 1), 30)


async def test_drain_lets_go():
    group, (disk, other) = disks(2, bps_write=1)
    await disk.write(0, bytes(4096))
    waiting = [asyncio.ensure_future(d.write(0, b"x")) for d in (disk, disk, other)]
    await asyncio.sleep(0.01)
    disk.drain_begin()
    await asyncio.wait_for(asyncio.gather(*waiting[:2]), 30)
    assert not waiting[2].done() and disk.write_nowait(0, b"z") == disk.child.write_nowait(0, b"z")
    disk.drain_end()
    assert not disk.write_nowait(0, b"x")
    await other.close()  # nobody waits for a disk that is gone
    await asyncio.wait_for(waiting[2], 30)
    assert group.members == [disk._member]


async def test_new_limits_hold_for_those_who_wait():
    group, (disk,) = disks(1, bps_write=1)
    await disk.write(0, bytes(4096))
    waiting = asyncio.ensure_future(disk.write(0, b"x"))
    await asyncio.sleep(0.01)
    group.configure(limits())
    await asyncio.wait_for(waiting, 30)
