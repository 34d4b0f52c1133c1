"""``make demo`` ends well, and says so only when it did."""

import random
import subprocess
import sys

import pytest

from liveblockd.demo import chain
from liveblockd.demo.guest import MismatchError


def test_demo():
    result = subprocess.run(
        [sys.executable, "-m", "liveblockd.demo", "--size-mib", "32", "--seed", "7"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[A] <- [D]" in result.stdout
    assert result.stdout.count("are what the guest wrote") == 2
    assert "All is well" in result.stdout


async def test_a_wrong_byte_is_noticed(tmp_path):
    model = await chain.build(tmp_path, 4 << 20, random.Random(1))
    assert chain.describe(tmp_path / "D.qcow2") == ["A", "B", "C", "D"]
    assert await chain.compare(tmp_path / "D.qcow2", model) == 4 << 20
    model[3_000_001] ^= 1
    with pytest.raises(MismatchError):
        await chain.compare(tmp_path / "D.qcow2", model)
