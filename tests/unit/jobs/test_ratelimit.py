"""Speed against wall-clock arithmetic done by hand."""

import random

import pytest

from liveblockd.jobs.ratelimit import SLICE, RateLimit

KIB = 1024
MIB = 1024 * 1024


def test_no_limit_never_waits():
    limit = RateLimit(0)
    for i in range(100):
        limit.account(i * 0.001, 100 * MIB)
        assert limit.delay(i * 0.001) <= 0


def test_one_chunk_always_starts_and_is_paid_afterwards():
    limit = RateLimit(64 * KIB)
    assert limit.delay(5.0) <= 0
    limit.account(5.0, 512 * KIB)
    assert limit.delay(5.0) == pytest.approx(8.0, abs=SLICE)
    assert limit.delay(12.0) == pytest.approx(1.0, abs=SLICE)
    assert limit.delay(13.2) <= 0


def test_a_crawl_is_a_crawl():
    limit = RateLimit(1)
    limit.account(0.0, 512 * KIB)
    assert limit.delay(3600.0) > 500_000


def test_idle_time_is_not_saved_up():
    limit = RateLimit(MIB)
    limit.account(0.0, MIB)
    limit.account(100.0, MIB)
    assert limit.delay(100.0) == pytest.approx(1.0, abs=SLICE)


@pytest.mark.parametrize("seed", range(5))
def test_average_speed(seed):
    rng = random.Random(seed)
    speed = rng.randrange(MIB, 200 * MIB)
    limit, now, total = RateLimit(speed), 0.0, 0
    while now < 20:
        chunk = rng.choice((64 * KIB, 512 * KIB, 2 * MIB))
        limit.account(now, chunk)
        total += chunk
        now += max(limit.delay(now), rng.random() * 0.0005)
    assert total / now == pytest.approx(speed, rel=0.15), seed


def test_faster_pays_what_is_owed_at_the_new_speed():
    limit = RateLimit(64 * KIB)
    limit.account(0.0, 512 * KIB)
    limit.set_speed(512 * KIB, 0.5)
    assert limit.delay(0.5) == pytest.approx(0.5, abs=SLICE)
    limit.set_speed(0, 0.6)
    assert limit.delay(0.6) <= 0


def test_slower_does_not_reprice_what_is_owed():
    limit = RateLimit(100 * MIB)
    limit.account(0.0, 20 * MIB)
    limit.set_speed(KIB, 0.05)
    assert 0 < limit.delay(0.05) <= 0.2
    assert limit.delay(0.3) <= 0
    limit.account(0.3, 512 * KIB)
    assert limit.delay(0.3) == pytest.approx(512, abs=SLICE)


def test_a_limit_set_on_a_free_job_owes_nothing():
    limit = RateLimit(0)
    limit.account(0.0, 1000 * MIB)
    limit.set_speed(KIB, 0.01)
    assert limit.delay(0.01) <= 0
