"""Seeds of ``tests/simulation``: a few every time, two hundred when there is time."""

import asyncio
import shutil

import pytest

from tests.simulation.scenario import run_seed

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


# Seeds that noticed a copy published without compare-and-set are among the first.
@pytest.mark.parametrize("seed", [2, 33, 86, *range(1000, 1007)])
def test_a_few_seeds(seed, tmp_path):
    asyncio.run(run_seed(seed, str(tmp_path)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_seeds(tmp_path):
    for seed in range(200):
        directory = tmp_path / str(seed)
        directory.mkdir()
        asyncio.run(run_seed(seed, str(directory)))
        shutil.rmtree(directory)
