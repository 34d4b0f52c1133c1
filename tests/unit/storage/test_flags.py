"""Arrays of flags, beside the plain way to ask them."""

import itertools

import numpy as np
import pytest

from liveblockd.storage.flags import first_true, run_length, runs_of


@pytest.mark.parametrize("length", [0, 1, 7, 500, 4096])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_as_a_list_says(length, share):
    rng = np.random.default_rng(length)
    for _ in range(5):
        flags = rng.random(length) < share
        plain = flags.tolist()
        assert first_true(flags) == (plain.index(True) if True in plain else -1)
        assert run_length(flags) == (plain.index(False) if False in plain else length)
        every_other = flags[::2]  # not contiguous
        plain = every_other.tolist()
        assert first_true(every_other) == (plain.index(True) if True in plain else -1)
        assert run_length(every_other) == (plain.index(False) if False in plain else len(plain))
        runs = runs_of(every_other)
        assert all(first < last for first, last in runs)
        assert all(end < first for (_, end), (first, _) in itertools.pairwise(runs))
        told = [number for first, last in runs for number in range(first, last)]
        assert told == [number for number, flag in enumerate(plain) if flag]
