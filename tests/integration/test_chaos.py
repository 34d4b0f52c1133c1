"""Seeds of ``tests/simulation/chaos``: fifty every time, a thousand when there is time."""

import asyncio
import shutil

import pytest

from tests.simulation.chaos import run_seed

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


def run(seeds, directory):
    for seed in seeds:
        place = directory / str(seed)
        place.mkdir()
        asyncio.run(run_seed(seed, str(place)))
        shutil.rmtree(place)


@pytest.mark.parametrize("first", range(0, 50, 5))
def test_fifty_seeds(first, tmp_path):
    run(range(first, first + 5), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_seeds(tmp_path):
    run(range(1000, 2000), tmp_path)
