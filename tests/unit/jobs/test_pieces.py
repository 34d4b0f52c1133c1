"""The planner against a list of single bytes (in units, so that borders are met often)."""

import random

import pytest

from liveblockd.jobs.pieces import Planner, Run, split
from liveblockd.storage.driver import ExtentKind

NOTHING, ZERO, DATA, READ = (
    ExtentKind.UNALLOCATED,
    ExtentKind.ZERO,
    ExtentKind.DATA,
    ExtentKind.COMPRESSED,
)


def plan(runs, start, end, cluster_size, **options):
    planner = Planner(start, end, cluster_size, **options)
    pieces = [piece for run in runs for piece in planner.feed(run)]
    return pieces + list(planner.finish())


def chain(start, *runs):
    """Runs one after the other: (length, kind[, layer, host_offset])."""
    for length, *rest in runs:
        yield Run(start, length, *rest)
        start += length


def test_whole_clusters_are_copied_where_they_lie():
    runs = chain(0, (64, NOTHING), (128, DATA, "a", 1000), (64, ZERO))
    assert plan(runs, 0, 256, 64) == [Run(64, 128, DATA, "a", 1000), Run(192, 64, ZERO)]


def test_a_cluster_with_a_border_is_read():
    runs = chain(0, (80, NOTHING), (120, DATA, "a", 1000), (56, ZERO))
    assert plan(runs, 0, 256, 64) == [
        Run(64, 64, READ),
        Run(128, 64, DATA, "a", 1048),
        Run(192, 64, READ),
    ]


def test_runs_that_lie_behind_each_other_are_one():
    runs = chain(0, (16, DATA, "a", 0), (48, DATA, "a", 16), (32, ZERO), (32, ZERO))
    assert plan(runs, 0, 128, 64) == [Run(0, 64, DATA, "a", 0), Run(64, 64, ZERO)]


def test_not_the_same_layer_or_place():
    runs = chain(0, (64, DATA, "a", 0), (64, DATA, "b", 64), (64, DATA, "b", 256))
    assert len(plan(runs, 0, 192, 64)) == 3


def test_small_copies_are_read_together():
    runs = list(chain(0, (64, DATA, "a", 0), (64, DATA, "b", 64), (256, DATA, "b", 512)))
    assert plan(runs, 0, 384, 64, least_copy=128) == [
        Run(0, 128, READ),
        Run(128, 256, DATA, "b", 512),
    ]


def test_last_cluster_is_short():
    assert plan(chain(0, (100, DATA, "a", 0)), 0, 100, 64) == [Run(0, 100, DATA, "a", 0)]
    assert plan(chain(0, (70, NOTHING), (30, DATA, "a", 0)), 0, 100, 64) == [Run(64, 36, READ)]
    assert plan(chain(0, (70, NOTHING), (30, NOTHING)), 0, 100, 64) == []


def test_a_huge_hole_is_one_step():
    assert plan(chain(0, (1 << 60, NOTHING)), 0, 1 << 60, 4096) == []


def test_split():
    assert list(split(Run(64, 150, DATA, "a", 7), 64)) == [
        Run(64, 64, DATA, "a", 7),
        Run(128, 64, DATA, "a", 71),
        Run(192, 22, DATA, "a", 135),
    ]


@pytest.mark.parametrize("seed", range(300))
def test_against_bytes(seed):
    rng = random.Random(seed)
    cluster = rng.choice((1, 2, 4, 8, 16))
    start = rng.randrange(4) * cluster
    length = rng.randrange(1, 120)
    end = start + length
    kinds, places, runs = [], [], []
    while len(kinds) < length:
        n = min(rng.choice((1, 2, 3, 5, 8, 16, 33)), length - len(kinds))
        kind, layer, host = rng.choice((NOTHING, ZERO, DATA, READ)), rng.choice("ab"), -1
        if kind is DATA:
            host = 1000 + start + len(kinds) if rng.random() < 0.6 else rng.randrange(999)
        runs.append(Run(start + len(kinds), n, kind, layer if kind is DATA else None, host))
        places += [(layer, host + i) for i in range(n)]
        kinds += [kind] * n
    least = rng.choice((0, 2 * cluster))
    pieces = plan(runs, start, end, cluster, least_copy=least)
    covered = [None] * length
    position = start
    for piece in pieces:
        assert piece.offset >= position and piece.length > 0, seed
        assert piece.offset % cluster == 0 and (piece.end % cluster == 0 or piece.end == end), seed
        position = piece.end
        for i in range(piece.offset - start, piece.end - start):
            covered[i] = piece
            if piece.kind is DATA:
                assert piece.length >= least, seed
                place = (piece.layer, piece.host_offset + i + start - piece.offset)
                assert kinds[i] is DATA and places[i] == place, seed
            elif piece.kind is ZERO:
                assert kinds[i] is ZERO, seed
    for i in range(length):
        first = (start + i) // cluster * cluster - start
        held = any(k is not NOTHING for k in kinds[first : first + cluster])
        assert (covered[i] is not None) == held, (seed, i)
