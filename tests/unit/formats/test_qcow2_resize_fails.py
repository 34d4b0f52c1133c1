"""A resize that fails leaves the old size, on the disk too after the next flush."""

from errno import EIO

import pytest

from liveblockd.formats.qcow2.header import parse
from tests.support.memory import fail_once
from tests.support.qcow2_images import new_qcow2, open_qcow2
from tests.support.qcow2_oracle import Oracle

SIZE = 64 << 10


@pytest.mark.parametrize("operation", ["write", "flush"])
@pytest.mark.parametrize("size", [SIZE // 2, SIZE * 4])
async def test_old_size_after_a_failure(operation: str, size: int) -> None:
    failures = 0
    for after in range(12):
        disk = await new_qcow2(size=SIZE, cluster_size=512)
        image = await open_qcow2(disk)
        await image.write(0, b"a" * SIZE)
        await image.flush()
        await image.write_zeroes(0, 512)  # an entry for the commit to change
        disk.hook = fail_once(operation, EIO, after=after)
        try:
            await image.truncate(size)
        except OSError:
            failures += 1
            assert image.length == SIZE
            await image.write(SIZE - 512, b"b" * 512)
            await image.flush()
            oracle = Oracle(disk.synced_content())
            assert parse(disk.synced_content()).size == SIZE, f"{operation} {after}"
            assert oracle.read()[-512:] == b"b" * 512
            assert not oracle.errors
        disk.hook = None
        await image.close()
        assert not Oracle(disk.content()).errors
    assert failures > 1
