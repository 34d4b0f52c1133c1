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


@pytest.mark.parametrize("others", [(), (1,), (3 * MIB,), (1, 100 * MIB)])
def test_a_speed_that_is_told_again_and_again(others):
    """Clients that look after it do so at each of their rounds: it is no more bytes for that."""
    speed, told, moved = 10 * MIB, 0.0, 0
    limit = RateLimit(speed)
    for millisecond in range(3000):
        now = millisecond / 1000
        if now >= told:
            told += 0.01
            for other in others:
                limit.set_speed(other, now)
            limit.set_speed(speed, now)
        while limit.delay(now) <= 0:
            limit.account(now, 64 * KIB)
            moved += 64 * KIB
    assert moved / 3 == pytest.approx(speed, rel=0.05)


@pytest.mark.parametrize("seed", range(20))
def test_speeds_in_any_order(seed):
    """What moves in the time of a speed is what it allows, but for a slice of the fastest."""
    rng = random.Random(seed)
    limit, now = RateLimit(rng.choice((0, MIB))), 0.0
    for _ in range(40):
        speed = rng.choice((0, 1, 1000, 64 * KIB, MIB, 50 * MIB))
        limit.set_speed(speed, now)
        end, moved = now + rng.choice((0.01, 0.15, 1.0, 3.0)), 0
        begun = now
        while now < end:
            if limit.delay(now) <= 0:
                limit.account(now, 64 * KIB)
                moved += 64 * KIB
            if not speed:
                assert limit.delay(now) <= 0, seed
                break
            now += 0.001
        if speed:
            allowed = speed * (now - begun)
            assert moved <= allowed + speed * SLICE + 128 * KIB, seed
            if allowed > MIB:
                assert moved >= allowed - speed * SLICE * 2.1 - 128 * KIB, (seed, moved / allowed)
        now += rng.choice((0, 0.2))
