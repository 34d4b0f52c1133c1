"""What every test shares: how differences of disks are reported, what is kept of one run for the
next, and what the collector sees.

Where ``CI`` is set, pytest writes the whole difference of two unequal values. Of two images that is
minutes of work for a page that nobody reads, and tests which expect a comparison to fail ran out of
time there and nowhere else.

pytest rewrites the asserts of every module of tests, which takes each of its workers longer than
importing them. What it makes is kept, whatever ``PYTHONDONTWRITEBYTECODE`` says; when nothing is
kept yet every worker begins with a share of its own, and finds those of the others done.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import sys
from pathlib import Path

import pytest

for name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(name, None)

sys.dont_write_bytecode = False

TESTS = Path(__file__).parent

_done = itertools.count(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import the share of a worker; what cannot be imported is told of when it is collected."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None:
        return
    number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    paths = [path for path in sorted(TESTS.rglob("test_*.py")) if path.parent.name != "simulation"]
    for path in paths[number::count]:
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(TESTS.parent).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """Keep thousands of tests out of the collector's way: it looks through all that there is."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Every test that is done leaves a report behind, and some tests collect often."""
    if next(_done) % 200 == 0:
        pytest_collection_finish()
