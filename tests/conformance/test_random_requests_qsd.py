"""Random requests to qemu-storage-daemon and to liveblockd in step: the same answers after each.

A seed is a walk of up to ``STEPS`` requests over a chain, two disks and two targets. A failure
prints the walk up to the request that was answered differently; ``WALKS=N`` in the environment
takes N seeds in place of the few of the quick suite, ``FIRST_WALK=S`` begins at S.
"""

import os
import random
from contextlib import suppress

import pytest

from tests.conformance.test_against_qsd import make_images
from tests.support.draw_requests import START, Draw
from tests.support.in_step import InStep, PartedWaysError, PeerEndedError, missing

STEPS = 40
FIRST = int(os.environ.get("FIRST_WALK", "1"))
BACKING = {"top": "mid", "mid": "base"}


@pytest.fixture
def directories(tmp_path, monkeypatch):
    """The same images for both."""
    if (name := missing()) is not None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    found = [make_images(tmp_path / name) for name in ("theirs", "ours")]
    for directory in found:
        (directory / "flat.raw").write_bytes(bytes(2 << 20))
    return found


def graph():
    """Every image with a named file node; a raw file on its own."""
    options = ["--object", "throttle-group,id=g9",
               "--blockdev", "driver=file,node-name=flat,filename=flat.raw"]  # fmt: skip
    for name, filename in START.items():
        file = f"driver=file,node-name={name}-file,filename={filename}"
        image = f"driver=qcow2,node-name={name},file={name}-file"
        if name in BACKING:
            image += f",backing={BACKING[name]}"
        options += ("--blockdev", file, "--blockdev", image)
    return options


@pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("WALKS", "4"))))
def test_walk(seed, directories):
    walk(Draw(random.Random(seed)), directories)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("WALKS", "2"))))
def test_walk_of_transactions(seed, directories):
    """Every third request is one."""
    walk(Draw(random.Random(f"transactions {seed}"), transaction=50), directories)


def walk(draw, directories):
    with InStep(*directories, *graph()) as both, suppress(PeerEndedError, PartedWaysError):
        both.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        both.do("block-export-add", type="nbd", id="x", node_name="top", writable=True)
        for _ in range(STEPS):
            name, given = draw.request()
            both.do(name, **given)
            both.look()
