"""Changing the backing link: whatever sectors of a write are on disk, it is the old or the new."""

import itertools
import random
from errno import EIO

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.header import parse, relink
from liveblockd.formats.qcow2.newimage import NewImage, lay_out
from tests.support.memory import fail_once
from tests.support.qcow2_images import new_qcow2, open_qcow2

SECTOR = 512
LENGTHS = (1, 12, 100, 360, 376, 400, 508, 640, 850, 1000, 1023)


def torn(disk: bytes, offset: int, data: bytes) -> list[bytes]:
    """All that a write may leave: each sector is there or not."""
    sectors = range(0, len(data), SECTOR)
    found = []
    for kept in itertools.product((False, True), repeat=len(sectors)):
        new = bytearray(disk)
        for start, keep in zip(sectors, kept, strict=True):
            if keep:
                part = data[start : start + SECTOR]
                new[offset + start : offset + start + len(part)] = part
        found.append(bytes(new))
    return found


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", [512, 1024, 2048, 4096])
def test_old_or_new_link(cluster_size: int, version: int) -> None:
    done = 0
    for old_length, new_length in itertools.product(LENGTHS, (0, *LENGTHS)):
        rng = random.Random(f"{old_length} {new_length}")
        old = "".join(rng.choices("abcdef", k=old_length))
        new = "".join(rng.choices("uvwxyz", k=new_length)).encode() or None
        try:
            options = NewImage(
                1 << 20, cluster_size, version, backing_file=old, backing_format="qcow2"
            )
            disk = lay_out(options).header
            rewrite = relink(parse(disk), new, "raw" if new else None)
        except BlockError:
            # Never where there is plenty of room.
            assert cluster_size < 1024 or old_length + new_length > 700
            continue
        done += 1
        before = (old.encode(), "qcow2")
        for offset, data in rewrite.steps:
            for state in torn(disk, offset, data):
                header = parse(state)
                assert (header.backing_file, header.backing_format) in (
                    before,
                    (new, "raw" if new else None),
                ), (old_length, new_length, offset)
                assert header.size == 1 << 20
            disk = disk[:offset] + data + disk[offset + len(data) :]
        header = parse(disk)
        assert header.backing_file == new == rewrite.header.backing_file
        assert header == rewrite.header
    assert done > 20


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_header_writes_after_a_failed_step(failing: int) -> None:
    """What a failed change of the link leaves is what later writes of the header start from."""
    old, new = "o" * 120, "n" * 600
    disk = await new_qcow2(size=1 << 20, cluster_size=1024, backing_file=old, backing_format="raw")
    image = await open_qcow2(disk)
    steps = relink(parse(disk.content()), new.encode(), "raw").steps
    assert len(steps) == 3, "no longer the case that is meant"
    disk.hook = fail_once("write", EIO, offset=steps[failing][0], after=failing == 2)
    with pytest.raises(OSError, match="injected"):
        await image.change_backing_file(new, "raw")
    disk.hook = None
    assert image.backing_file == old
    await image.truncate(2 << 20)  # writes the first sector
    await image.close()
    header = parse(disk.content())
    assert (header.backing_name, header.backing_format, header.size) == (old, "raw", 2 << 20)
