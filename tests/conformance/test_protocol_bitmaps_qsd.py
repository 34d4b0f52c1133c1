"""Bitmaps of the nodes below formats: what the format writes there, and as far as its file grows.

Where the clusters of a format lie is its own affair, so the bitmap is compared with the file: all
that differs from what it was is dirty, of both daemons.
"""

import json

import pytest

from tests.conformance.test_against_qsd import run
from tests.conformance.test_random_requests_qsd import directories
from tests.support.in_step import InStep

__all__ = ["directories"]

KIB, MIB = 1 << 10, 1 << 20
GRANULARITY = 4 * KIB
NBD = "nbd+unix:///{}?socket=nbd.sock"
CONTEXT = "qemu:dirty-bitmap:b"


def options():
    found = []
    for name in ("top", "mid", "base"):
        found += ["--blockdev", f"driver=file,node-name={name}-file,filename={name}.qcow2"]
    for name, backing in (("base", ""), ("mid", ",backing=base"), ("top", ",backing=mid")):
        found += ["--blockdev", f"driver=qcow2,node-name={name},file={name}-file{backing}"]
    return found


def dirty(peer, node):
    """Granules, by the block status of an export that begins for it, and the length of the node."""
    peer.do("block-dirty-bitmap-disable", node=node, name="b")
    peer.do("block-export-add", type="nbd", id="look", node_name=node, name="look", bitmaps=["b"])
    assert "return" in peer.log[-1], peer.log[-1]
    command = ("nbdinfo", "--json", f"--map={CONTEXT}", NBD.format("look"))
    extents = json.loads(run(peer.directory, *command))
    peer.do("block-export-del", id="look")
    peer.until("BLOCK_EXPORT_DELETED", id="look")
    found = set()
    for extent in extents:
        if extent["type"]:
            first, last = extent["offset"], extent["offset"] + extent["length"]
            found |= set(range(first // GRANULARITY, -(-last // GRANULARITY)))
    return found, sum(extent["length"] for extent in extents)


def changed(before, after):
    size = max(len(before), len(after))
    before, after = before.ljust(size, b"\0"), after.ljust(size, b"\0")
    return {
        start // GRANULARITY
        for start in range(0, size, GRANULARITY)
        if before[start : start + GRANULARITY] != after[start : start + GRANULARITY]
    }


@pytest.mark.parametrize("work", ["guest", "stream", "commit"])
def test_what_a_format_writes_is_in_the_bitmap_of_its_file(directories, work):
    file = "base" if work == "commit" else "top"
    with InStep(*directories, *options()) as both:
        for peer in both.peers:
            path = peer.directory / f"{file}.qcow2"
            before = path.read_bytes()
            peer.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
            for node in ("top", "base"):
                peer.do("block-dirty-bitmap-add", node=f"{node}-file", name="b",
                        granularity=GRANULARITY)  # fmt: skip
            if work == "guest":
                peer.do("block-export-add", type="nbd", id="g", node_name="top", writable=True)
                run(peer.directory, "qemu-io", "-f", "raw", "-c", "write -P 9 1M 32k",
                    "-c", "write -P 8 1900k 100k", "-c", "write -P 7 5k 3k", "-c", "flush",
                    NBD.format("top"))  # fmt: skip
                peer.do("block-export-del", id="g")
                peer.until("BLOCK_EXPORT_DELETED", id="g")
            elif work == "stream":
                peer.do("block-stream", job_id="j", device="top")
                peer.until("JOB_STATUS_CHANGE", id="j", status="null")
            else:
                peer.do("block-commit", job_id="j", device="top")
                peer.until("BLOCK_JOB_READY", device="j")
                peer.do("job-complete", id="j")
                peer.until("JOB_STATUS_CHANGE", id="j", status="null")
            for node in ("top", "mid", "base"):  # the format would make it longer still
                peer.do("blockdev-del", node_name=node)
            found, length = dirty(peer, f"{file}-file")
            differs = changed(before, path.read_bytes())
            assert differs and differs <= found, (peer.directory.name, sorted(differs - found))
            assert length == path.stat().st_size, "it grows with the file"
