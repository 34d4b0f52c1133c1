"""The check of an open image beside ``qemu-img check``, on the same damaged images."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.check import CheckResult
from liveblockd.formats.qcow2.live_check import LiveCheck
from tests.conformance.test_qcow2_check import qemu_verdict
from tests.support.memory import MemoryDriver
from tests.support.qcow2_damage import DAMAGES, make, make_damaged
from tests.support.qcow2_images import needs, open_qcow2

pytestmark = needs("qemu-img", "qemu-io")

#: counted another way, or refcounts that are not read here; the image is found bad all the same
ROUGHLY = {
    "entry beyond the end", "L1 entry beyond the end", "refcount block unaligned",
    "refcount block reserved bits", "refcount block twice",
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("live") / "template.qcow2"
    make(path)
    return path


@contextlib.asynccontextmanager
async def quiet() -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize("name", DAMAGES)
async def test_damaged_images(tmp_path: Path, template: Path, name: str) -> None:
    path = tmp_path / "i.qcow2"
    make_damaged(path, template, name)
    _, expected = qemu_verdict(path)
    file = MemoryDriver.of(path.read_bytes(), read_only=True)
    try:
        image = await open_qcow2(file, read_only=True)
    except BlockError as error:
        pytest.skip(f"does not open: {error}")
    check = LiveCheck(image, quiet, fix_leaks=False)
    result: CheckResult = check.result
    try:
        async for _ in check.scan():
            pass
        result = check.result
    except OSError:
        result.check_errors += 1
    await image.close()
    for key in ("corruptions", "leaks"):
        found, wanted = getattr(result, key), expected.get(key, 0)
        if name in ROUGHLY:
            assert found or result.check_errors or not wanted
        else:
            assert found == wanted, (key, result.messages)
