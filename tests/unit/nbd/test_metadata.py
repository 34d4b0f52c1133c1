"""Extents of block status."""

import pytest

from liveblockd.nbd.constants import MAX_EXTENTS
from liveblockd.nbd.metadata import allocation_extents, clipped, depth_extents, merged

RUNS = [
    (4096, False, False, 1),
    (4096, False, False, 2),
    (8192, True, False, 1),
    (512, True, True, 0),
    (512, True, True, 0),
]


def test_contexts_see_different_extents():
    assert allocation_extents(RUNS) == [(8192, 0), (8192, 2), (1024, 3)]
    assert depth_extents(RUNS) == [(4096, 1), (4096, 2), (8192, 1), (1024, 0)]


def test_nothing():
    assert merged([]) == []


def test_too_many_are_left_off():
    runs = [(512, i % 2) for i in range(MAX_EXTENTS + 5)]
    assert merged(runs) == runs[:MAX_EXTENTS]


@pytest.mark.parametrize(
    ("length", "one", "expected"),
    [
        (100, False, [(100, 0)]),
        (8192, False, [(8192, 0)]),
        (8193, False, [(8192, 0), (1, 2)]),
        (10**9, False, [(8192, 0), (8192, 2), (1024, 3)]),
        (10**9, True, [(8192, 0)]),
    ],
)
def test_clipped(length, one, expected):
    assert clipped(allocation_extents(RUNS), length, one=one) == expected
