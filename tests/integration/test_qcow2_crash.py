"""A writer that is killed: what it flushed is there, and the image is sound."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.qcow2_images import check, needs, run

pytestmark = needs("qemu-img")

WRITER = """
import asyncio, sys, random
from pathlib import Path
from tests.conformance.test_qcow2_qemu import Host

async def main(path, seed):
    host = Host()
    image = await host.qcow2(Path(path), autosync=0.02)
    rng = random.Random(seed)
    number = 0
    while True:
        number += 1
        offset = rng.randrange(0, 1000) * 4096
        await image.write(offset, number.to_bytes(4, "little") * 1024)
        if rng.random() < 0.2:
            await image.discard(rng.randrange(0, 1000) * 4096 + (1 << 23), 1 << 17)
        if number % 7 == 0:
            await image.flush()
            print(number, flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.parametrize("seed", range(3))
def test_sigkill(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "16M")
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(seed)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}, cwd=root,
    )  # fmt: skip
    assert process.stdout is not None
    flushed = 0
    stop = 200 + random.Random(seed).randrange(300)
    try:
        while flushed < stop:
            line = process.stdout.readline()
            assert line, "the writer died by itself"
            flushed = int(line)
    finally:
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=30)[0]
    flushed = int(rest.split()[-1]) if rest.split() and rest.endswith("\n") else flushed
    report = check(path)
    assert not report.get("corruptions") and not report.get("check-errors"), report
    raw = tmp_path / "a.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    data = raw.read_bytes()
    rng = random.Random(seed)
    last: dict[int, int] = {}
    for number in range(1, flushed + 1):
        last[rng.randrange(0, 1000) * 4096] = number
        if rng.random() < 0.2:
            rng.randrange(0, 1000)
    for offset, number in last.items():
        held = int.from_bytes(data[offset : offset + 4], "little")
        assert data[offset : offset + 4096] == held.to_bytes(4, "little") * 1024
        assert held >= number, f"seed {seed}: offset {offset:#x}"
