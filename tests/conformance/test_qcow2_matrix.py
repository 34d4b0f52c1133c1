"""QEMU's tools and this engine on twins of images of every kind: see ``tests.support.matrix``.

``python -m tests.support.matrix --pairwise 1 --rounds 2 --seed N --keep`` runs combination N of the
quick test again (a failure says which); ``make matrix`` runs hundreds.
"""

from __future__ import annotations

import functools
import random

import pytest

from tests.support.matrix import run
from tests.support.matrix_draw import DIMENSIONS, Combination, pairs, pairwise, possible_pairs
from tests.support.qcow2_images import needs

SEED = 1
GROUPS = 12
combinations = functools.lru_cache(pairwise)


def test_every_two_values_that_may_go_together_do() -> None:
    found = set().union(*(pairs(c) for c in combinations(SEED)))
    assert possible_pairs(random.Random(99)) <= found
    assert all(c.possible for c in combinations(SEED))
    for name, values in DIMENSIONS.items():
        assert {getattr(c, name) for c in combinations(SEED)} == set(values), name


def test_what_is_impossible() -> None:
    assert Combination().possible
    assert not Combination(version=2, extended_l2=True).possible
    assert not Combination(data_file="raw", depth=1).possible


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("group", range(GROUPS))
def test_pairwise(group: int) -> None:
    pytest.importorskip("cryptography")
    chosen = combinations(SEED)
    for number in range(group, len(chosen), GROUPS):
        run(number, chosen[number], rounds=2, again=f"--pairwise {SEED}")


@pytest.mark.slow
@needs("qemu-img", "qemu-io")
@pytest.mark.timeout(1800)
def test_many() -> None:
    pytest.importorskip("cryptography")
    for seed in range(300):
        run(seed, None, rounds=4)
