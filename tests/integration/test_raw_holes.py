"""A sparse raw file as backing: its holes are seen, and a stream copies none of them."""

import json
import os
import random

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import needs, run

pytestmark = needs("qemu-img", "nbdinfo")
MIB = 1 << 20
SIZE = 1 << 34


@pytest.fixture
def chain(tmp_path):
    """16 GiB of raw with 12 pieces of data, and an overlay."""
    path = tmp_path / "base.raw"
    chance = random.Random(9)
    written = {}
    with path.open("wb") as file:
        file.truncate(SIZE)
        for _ in range(12):
            at = chance.randrange(SIZE // MIB) * MIB
            written[at] = chance.randbytes(64 << 10)
            file.seek(at)
            file.write(written[at])
    with path.open("rb") as file:
        try:
            if os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0 and 0 not in written:
                pytest.skip("this file system tells of no holes")
        except OSError:
            pytest.skip("this file system tells of no holes")
    overlay = tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", overlay)
    return overlay, written


def test_block_status_shows_the_holes(chain, tmp_path):
    overlay, written = chain
    export = ("--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd",
              "--export", "type=nbd,id=e,node-name=disk",
              "--blockdev", f"driver=qcow2,node-name=disk,read-only=on,"
                            f"file.driver=file,file.filename={overlay}")  # fmt: skip
    with DaemonProcess(tmp_path, *export[4:], *export[:4]):
        uri = f"nbd+unix:///disk?socket={tmp_path}/nbd"
        extents = [line.split()[:3] for line in run("nbdinfo", "--map", uri).splitlines()]
    data = {int(start): int(length) for start, length, flags in extents if flags == "0"}
    assert sum(data.values()) == sum(len(piece) for piece in written.values())
    assert sorted(data) == sorted(written)


def test_a_stream_skips_the_holes(chain, tmp_path):
    overlay, written = chain
    with DaemonProcess(tmp_path) as daemon:
        qmp = daemon.qmp()
        file = {"driver": "file", "filename": str(overlay)}
        qmp("blockdev-add", driver="qcow2", node_name="disk", file=file)
        qmp("block-stream", job_id="merge", device="disk")
        event = qmp.wait("BLOCK_JOB_COMPLETED", device="merge")["data"]
        assert (event["len"], event["offset"]) == (SIZE, SIZE)
        qmp("blockdev-del", node_name="disk")
    # 12 pieces, each with an L2 table of its own at most, and the tables of the image
    assert os.stat(overlay).st_blocks * 512 < 12 * 2 * 65536 + 8 * 65536
    os.unlink(tmp_path / "base.raw")
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", overlay))
    with overlay.open("rb") as file:
        found = {
            extent["start"]: os.pread(file.fileno(), extent["length"], extent["offset"])
            for extent in extents
            if extent["data"]
        }
    assert found == written
