"""What every test shares: how differences of disks are reported, and what the collector sees.

Where ``CI`` is set, pytest writes the whole difference of two unequal values. Of two images that is
minutes of work for a page that nobody reads, and tests which expect a comparison to fail ran out of
time there and nowhere else.
"""

from __future__ import annotations

import gc
import itertools
import os

for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)

_done = itertools.count(1)


def pytest_collection_finish() -> None:
    """Keep thousands of tests out of the collector's way: it looks through all that there is."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Every test that is done leaves a report behind, and some tests collect often."""
    if next(_done) % 200 == 0:
        pytest_collection_finish()
