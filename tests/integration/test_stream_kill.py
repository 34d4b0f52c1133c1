"""SIGKILL at any time: nothing that was flushed, and nothing of the base, is lost.

The child streams or commits under writes (``tests/simulation/victim.py``); it is killed at a random
time, or the moment it has announced BLOCK_JOB_COMPLETED. Then qemu-img may find leaks, no error,
and every sector reads as the last flushed write, or one after it, left it; without any, as the
chain had it.
"""

import asyncio
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.simulation import images
from tests.simulation.bench import Bench
from tests.simulation.victim import SECTOR, pattern
from tests.support.warm import begin

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
ROOT = Path(__file__).resolve().parents[2]


async def build(seed, directory):
    bench = Bench()
    made = await images.make_chain(bench, random.Random(seed), directory, "disk")
    await bench.close()
    return made


def lines_until_killed(child, rng):
    """What the child told before its death."""
    at_completed = rng.random() < 0.5
    deadline = None
    told = b""
    limit = time.monotonic() + 30
    while True:
        assert time.monotonic() < limit, "the child hangs"
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            break
        left = 0.5 if deadline is None else deadline - now
        if select.select([child.stdout], [], [], left)[0]:
            part = os.read(child.stdout.fileno(), 65536)
            if not part:
                break
            told += part
            if at_completed and b"completed\n" in told:
                break
        if deadline is None and b"ready\n" in told:
            deadline = time.monotonic() + (5 if at_completed else rng.random() * 0.3)
    child.send_signal(signal.SIGKILL)
    told += child.stdout.read()
    child.wait(10)
    assert child.returncode == -signal.SIGKILL, child.returncode
    assert b"error" not in told, [line for line in told.split(b"\n") if b"error" in line]
    return told.decode().split("\n")[:-1]


def check_sectors(before, after, lines):
    """Returns how many writes and completions there were."""
    writes, flushed, completed = [], 0, 0
    for line in lines:
        match line.split():
            case ["w", _, offset, length]:
                writes.append((int(offset), int(length)))
            case ["f", count]:
                flushed = max(flushed, int(count))
            case ["completed"]:
                completed += 1
    allowed = {}
    for index, (offset, length) in enumerate(writes):
        for sector in range(offset, offset + length):
            if index < flushed:
                allowed[sector] = [index]
            else:
                allowed.setdefault(sector, [None]).append(index)
    assert len(after) == len(before)
    for start in range(0, len(before), SECTOR):
        got = after[start : start + SECTOR]
        options = allowed.get(start // SECTOR, [None])
        wanted = [
            before[start : start + SECTOR] if index is None else pattern(index, SECTOR)
            for index in options
        ]
        assert got in wanted, (
            f"sector {start // SECTOR} reads {got[:8].hex()}, not one of writes {options} "
            f"({[w[:8].hex() for w in wanted]}); {flushed} of {len(writes)} flushed"
        )
    return len(writes), completed


def kill_once(seed, directory, mode):
    rng = random.Random(seed)
    paths, contents = asyncio.run(build(seed, directory))
    child = begin(
        [sys.executable, "-m", "tests.simulation.victim", paths[-1], str(seed), mode],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=None,
    )
    try:
        lines = lines_until_killed(child, rng)
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()
    for path in paths:
        images.check(path, leaks=True)
    active = [paths[-1], *(line.split()[1] for line in lines if line.startswith("active "))][-1]
    result = check_sectors(contents[-1], images.content(active), lines)
    if mode == "stream":
        for path, was in zip(paths[:-1], contents[:-1], strict=True):
            assert images.content(path) == was, f"{path} below the top has changed"
    return result


def many(seeds, tmp_path, mode):
    writes = completed = 0
    for seed in seeds:
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            some = kill_once(seed, str(directory), mode)
        except BaseException:
            sys.stdout.write(f"seed {seed} failed\n")
            raise
        writes, completed = writes + some[0], completed + some[1]
        shutil.rmtree(directory)
    assert writes > 10 * len(seeds), "the child was killed before it did anything"
    assert completed, "no job was completed"


@pytest.mark.parametrize("mode", ["stream", "commit"])
def test_killed_a_few_times(tmp_path, mode):
    many(range(6), tmp_path, mode)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["stream", "commit"])
def test_killed_very_often(tmp_path, mode):
    many(range(1000, 1200), tmp_path, mode)
