"""What a mirror has to copy: finer than its granularity, and never in more pieces than that."""

import random

import pytest

from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.jobs.chunks import Chunks, MirrorBitmap

KIB, MIB = 1024, 1024 * 1024
BLOCK = 64 * KIB


@pytest.mark.parametrize("seed", range(20))
def test_the_bitmap_against_a_plain_one(seed):
    rng = random.Random(seed)
    size = rng.choice([1, 4 * KIB, MIB + 512, 40 * MIB + 4 * KIB])
    block = rng.choice([512, 4 * KIB, BLOCK, MIB])
    bitmap = MirrorBitmap(size, block)
    plain = DirtyBitmap(size, bitmap.granularity)
    for _ in range(100):
        offset = rng.randrange(size)
        length = rng.choice([1, 4 * KIB, rng.randrange(size + 1)])
        match rng.randrange(3):
            case 0:
                for each in (bitmap, plain):
                    each.record(offset, length)
            case 1:
                for each in (bitmap, plain):
                    each.reset(offset, length)
            case _:
                bitmap.set_blocks(offset, length)
                low, high = offset // block * block, -(-(offset + length) // block) * block
                plain.set(low, high - low)
        assert bitmap.count == plain.count
        assert list(bitmap.runs()) == list(plain.runs())
    assert bitmap.to_qmp()["granularity"] == block


@pytest.mark.parametrize("seed", range(20))
def test_every_dirty_byte_is_claimed_and_no_block_twice(seed):
    rng = random.Random(seed)
    size = 8 * MIB + 512
    bitmap = MirrorBitmap(size, BLOCK)
    for _ in range(300):
        bitmap.record(rng.randrange(size), rng.choice([1, 4 * KIB, 100 * KIB]))
    dirty = list(bitmap.runs())
    chunks = Chunks(bitmap, bitmap.granularity)
    claimed = []
    while claim := chunks.take(512 * KIB):
        claimed.append((claim.start, claim.end))
        assert claim.end - claim.start <= 512 * KIB
        chunks.leave(claim)
    assert chunks.rest == 0
    for start, length in dirty:
        covered = sum(min(end, start + length) - max(low, start)
                      for low, end in claimed if low < start + length and start < end)  # fmt: skip
        assert covered == length
    # a copy may end within a block for its size alone
    starts = [low // BLOCK for low, end in claimed]
    full = sum(end - low == 512 * KIB for low, end in claimed)
    assert len(starts) - len(set(starts)) <= full


def test_small_writes_cost_what_they_are():
    bitmap = MirrorBitmap(64 * MIB, BLOCK)
    for number in range(1024):
        bitmap.record(number * BLOCK + 8 * KIB, 4 * KIB)
    chunks = Chunks(bitmap, bitmap.granularity)
    moved = pieces = 0
    while claim := chunks.take(512 * KIB):
        moved += claim.end - claim.start
        pieces += 1
        chunks.leave(claim)
    assert (moved, pieces) == (1024 * 4 * KIB, 1024)


def test_a_large_disk_does_not_cost_memory():
    assert MirrorBitmap(64 << 40, BLOCK).granularity == BLOCK
    assert len(MirrorBitmap(64 << 30, BLOCK).bits) <= MIB


def test_whole_blocks_where_the_target_needs_them():
    bitmap = MirrorBitmap(MIB, BLOCK, whole=True)
    bitmap.record(0, 1)
    assert bitmap.count * bitmap.granularity == BLOCK
