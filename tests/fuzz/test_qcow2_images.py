"""Hostile qcow2 images: they open or are refused, they answer or fail; nothing else happens."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.qcow2_exercise import exercise
from tests.fuzz.qcow2_mutations import mutate, seeds
from tests.support.qcow2_oracle import Oracle

CORPUS = sorted(Path(__file__).with_name("corpus").glob("*.bin"))


def is_sound(content: bytes) -> bool:
    """Whether a second reading of the format, which is slow, finds no corruption."""
    if len(content) < 104:
        return False
    l1_size, _, _, table_clusters, snapshots = struct.unpack_from(">IQQII", content, 36)
    if content[95] & 1:  # it does not know bitmaps
        return False
    if l1_size > 1024 or table_clusters > 16 or snapshots > 4:
        return False
    try:
        return not Oracle(content).errors
    except (struct.error, AssertionError, MemoryError, OverflowError, IndexError, UnicodeError):
        return False


@pytest.mark.parametrize("seed", seeds(), ids=lambda seed: seed.name)
def test_the_seeds_are_sound(seed):
    """A fuzzer whose seeds are refused tests nothing."""
    outcome = exercise(seed.content, read_only=False)
    if outcome.refused is not None:
        assert "Unsupported" in outcome.refused
        return
    assert (outcome.read_errors, outcome.corrupted) == (0, ())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**48), st.booleans())
def test_a_mutated_image(number, read_only):
    chance = random.Random(number)
    content = mutate(chance, chance.choice(seeds()))
    outcome = exercise(content, read_only=read_only, seed=number)
    if outcome.content is not None and is_sound(content):
        assert is_sound(outcome.content), "a sound image was made unsound"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.booleans())
def test_any_bytes_behind_the_magic(tail, read_only):
    exercise(b"QFI\xfb\0\0\0\x03" + tail, read_only=read_only)


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_an_image_that_once_went_wrong(path, read_only):
    for seed in range(3):
        exercise(path.read_bytes(), read_only=read_only, seed=seed)
