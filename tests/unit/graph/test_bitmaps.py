"""Dirty bitmaps against a plain set of granules."""

import random

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph.bitmaps import DirtyBitmap, check_granularity, default_granularity

SEEDS = range(40)


def granules(bitmap):
    return {n for n in range(bitmap.length) if bitmap.is_dirty(n * bitmap.granularity)}


def joined(numbers, granularity, size):
    found = []
    for number in sorted(numbers):
        start, end = number * granularity, min((number + 1) * granularity, size)
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, end - start))
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_marks_as_a_set_does(seed):
    rng = random.Random(seed)
    size = rng.choice((1, 511, 4096 * 8 * 64, 700_001, rng.randrange(1, 300_000_000)))
    granularity = 1 << rng.randrange(9, 17)
    bitmap = DirtyBitmap(size, granularity, name="b")
    model = set()
    for _ in range(30):
        offset = rng.randrange(size)
        length = rng.randrange(rng.choice((1, 600, 70_000, size))) + 1
        end = min(offset + length, size)
        if rng.random() < 0.6:
            bitmap.record(offset, length)
            model |= set(range(offset // granularity, (end - 1) // granularity + 1))
        elif rng.random() < 0.8:
            bitmap.reset(offset, length)
            last = bitmap.length if end == size else end // granularity
            model -= set(range(-(-offset // granularity), last))
        else:
            size = rng.randrange(1, size * 2)
            bitmap.resize(size)
            model = {n for n in model if n * granularity < size}
        assert bitmap.count == len(model)
    assert list(bitmap.runs()) == joined(model, granularity, size), seed
    if size > 1:
        low = rng.randrange(size)
        part = list(bitmap.runs(low, rng.randrange(1, size)))
        assert all(any(a <= o and o + n <= a + m for a, m in bitmap.runs()) for o, n in part)
    stored = DirtyBitmap(size, granularity)
    stored.load([(0, bitmap.dump())])
    assert list(stored.runs()) == list(bitmap.runs())
    assert stored.sha256() == bitmap.sha256()


def test_runs_across_the_steps_of_the_search():
    bitmap = DirtyBitmap(1 << 30, 512)
    bitmap.set(0, 1 << 30)
    assert list(bitmap.runs()) == [(0, 1 << 30)]
    bitmap.reset(512 * 65536, 512)
    assert list(bitmap.runs()) == [(0, 512 * 65536), (512 * 65537, (1 << 30) - 512 * 65537)]


@pytest.mark.parametrize("seed", SEEDS)
def test_merge(seed):
    rng = random.Random(seed)
    size = rng.randrange(1, 4_000_000)
    one = DirtyBitmap(size, 1 << rng.randrange(9, 18))
    two = DirtyBitmap(size, 1 << rng.randrange(9, 18))
    for bitmap in (one, two):
        for _ in range(8):
            bitmap.set(rng.randrange(size), rng.randrange(1, 40_000))
    expected = granules(one)
    for offset, length in two.runs():
        last = (offset + length - 1) // one.granularity
        expected |= set(range(offset // one.granularity, last + 1))
    one.merge(two)
    assert granules(one) == expected, seed


def test_a_part_of_a_granule_stays_dirty():
    bitmap = DirtyBitmap(1 << 20, 65536)
    bitmap.set(0, 65536)
    bitmap.reset(0, 65535)
    assert bitmap.count == 1
    bitmap.set((1 << 20) - 1, 1)
    assert bitmap.count == 2


def test_disabled_records_nothing():
    bitmap = DirtyBitmap(1 << 20, 65536)
    bitmap.enabled = False
    bitmap.record(0, 100)
    assert bitmap.count == 0


def test_bits_that_an_image_has_beyond_the_end_are_dropped():
    bitmap = DirtyBitmap(5 * 512, 512)
    bitmap.load([(0, b"\xff" * 64)])
    assert bitmap.count == 5
    assert list(bitmap.runs()) == [(0, 5 * 512)]


def test_digest_is_that_of_qemu():
    # qemu-storage-daemon 7.2: 10 MiB, clean, granularity 64 KiB
    assert DirtyBitmap(10 << 20, 65536).sha256() == (
        "9d908ecfb6b256def8b49a7c504e6c889c4b0e41fe6ce3e01863dd7b61a20aa0"
    )


@pytest.mark.parametrize("granularity", [0, 256, 1000, 513])
def test_granularities_that_cannot_be(granularity):
    with pytest.raises(BlockError, match="power of 2 and at least 512"):
        check_granularity(granularity)


def test_default_granularity():
    assert default_granularity(None) == 65536
    assert default_granularity(512) == 4096
    assert default_granularity(2 << 20) == 65536


def test_what_may_be_used():
    bitmap = DirtyBitmap(1, 512, name="b")
    bitmap.check()
    bitmap.inconsistent = bitmap.persistent = True
    with pytest.raises(BlockError, match="Bitmap 'b' is inconsistent and cannot be used"):
        bitmap.check()
    bitmap.check(allow_inconsistent=True)
    with pytest.raises(BlockError, match="readonly"):
        bitmap.check(read_only=True, allow_inconsistent=True)
    bitmap.busy = True
    with pytest.raises(BlockError, match="currently in use by another operation"):
        bitmap.check(allow_inconsistent=True)
