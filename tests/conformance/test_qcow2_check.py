"""The same verdict as ``qemu-img check`` on sound and on damaged images, and as good a repair."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.check import CheckResult, Fix
from liveblockd.formats.qcow2.checking import check_image
from tests.support.memory import MemoryDriver
from tests.support.qcow2_damage import DAMAGES, Image, make, make_damaged
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")

COUNTS = (
    "corruptions", "leaks", "check-errors", "image-end-offset", "total-clusters",
    "allocated-clusters", "fragmented-clusters", "compressed-clusters", "leaks-fixed",
    "corruptions-fixed",
)  # fmt: skip
MODES = {Fix.NONE: (), Fix.LEAKS: ("-r", "leaks"), Fix.ALL: ("-r", "all")}

#: where our repair does more, or puts things elsewhere; the verdict without repair is always equal
BETTER = {
    "refcount block unaligned": "QEMU gives up over the refcounts it cannot read",
    "refcount block reserved bits": "QEMU gives up on its own new table",
    "L1 entry into the header": "QEMU gives up when a table would be written into the header",
}
ELSEWHERE = {
    "entry into a refcount block", "refcount block missing", "refcount block is data",
    "refcount block beyond the end", "snapshots, refcount block missing",
}  # fmt: skip

Verdict = tuple[int, dict[str, int]]


def qemu_verdict(path: Path, fix: Fix = Fix.NONE) -> Verdict:
    command = ["qemu-img", "check", "-f", "qcow2", "--output=json", *MODES[fix], str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    report = json.loads(done.stdout) if done.stdout else {}
    return done.returncode, {key: report[key] for key in COUNTS if report.get(key)}


def verdict_of(result: CheckResult) -> Verdict:
    status = 2 if result.corruptions else 3 if result.leaks else 0
    counts = {key: getattr(result, key.replace("-", "_")) for key in COUNTS}
    return 1 if result.check_errors else status, {k: v for k, v in counts.items() if v}


def our_verdict(path: Path, fix: Fix = Fix.NONE) -> Verdict:
    """As qemu-img: what is left is counted by a second check."""
    disk = MemoryDriver.of(path.read_bytes())

    async def run() -> CheckResult:
        result = await check_image(disk, fix=fix)
        if result.leaks_fixed or result.corruptions_fixed:
            again = await check_image(disk)
            again.leaks_fixed = result.leaks_fixed
            again.corruptions_fixed = result.corruptions_fixed
            return again
        return result

    try:
        return verdict_of(asyncio.run(run()))
    except (OSError, BlockError):
        return 1, {}
    finally:
        assert fix or disk.content() == path.read_bytes(), "a check has written"
        path.write_bytes(disk.content())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("check") / "template.qcow2"
    make(path)
    yield path


def contents(path: Path) -> bytes | None:
    """What a reader sees; None where QEMU refuses to read."""
    raw = path.with_suffix(".out")
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return raw.read_bytes() if done.returncode == 0 else None


@pytest.mark.parametrize("name", DAMAGES)
def test_same_verdict_and_repair(tmp_path: Path, template: Path, name: str) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for fix in Fix:
        make_damaged(ours, template, name)
        theirs.write_bytes(ours.read_bytes())
        before = contents(ours)
        expected, found = qemu_verdict(theirs, fix), our_verdict(ours, fix)
        if fix is Fix.NONE:
            assert found == expected
            continue
        if fix is Fix.ALL and name in BETTER:
            assert expected == (1, {})
            assert found[0] in (0, 2)
        else:
            if fix is Fix.ALL and name in ELSEWHERE:
                expected[1]["image-end-offset"] = found[1]["image-end-offset"]
                if name == "refcount block beyond the end":  # QEMU counts it twice
                    expected[1]["corruptions-fixed"] -= 1
            assert found == expected, fix
        left = qemu_verdict(ours)
        if found[1]:  # what we say is left is what QEMU finds
            keys = ("corruptions", "leaks")
            assert [left[1].get(k) for k in keys] == [found[1].get(k) for k in keys]
        if before is not None and name != "entry into its L2 table":  # which was data then
            assert contents(ours) == before


FORMS: list[tuple[str, ...]] = [
    ("-o", "compat=0.10"),
    ("-o", "refcount_bits=1"),
    ("-o", "refcount_bits=8"),
    ("-o", "refcount_bits=64"),
    ("-o", "cluster_size=512"),
    ("-o", "cluster_size=64k"),
    ("-o", "cluster_size=2M"),
    ("-o", "extended_l2=on,cluster_size=64k"),
    ("-o", "lazy_refcounts=on"),
]


@pytest.mark.parametrize("options", FORMS, ids=lambda o: o[1])
def test_every_form_of_image(tmp_path: Path, options: tuple[str, ...]) -> None:
    image = make(tmp_path / "image.qcow2", *options)
    assert our_verdict(image.path) == qemu_verdict(image.path)
    block = image.refblock()
    image.put(block + 16, ">Q", image.get(block + 16, ">Q") ^ 0x0101_0101_0101_0101)
    assert our_verdict(image.path) == qemu_verdict(image.path)
    image.put(image.reftable, ">Q", 0)
    assert our_verdict(image.path) == qemu_verdict(image.path)
    before = contents(image.path)
    status, counts = our_verdict(image.path, Fix.ALL)
    assert status == 0 and counts["corruptions-fixed"]
    assert qemu_verdict(image.path)[0] == 0
    assert contents(image.path) == before


def test_external_data_file(tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    image = make(tmp_path / "image.qcow2", "-o", f"data_file={data}")
    assert our_verdict(image.path) == qemu_verdict(image.path)
    image.set_entry(3, image.entry(3) & ~(1 << 63))
    assert our_verdict(image.path) == qemu_verdict(image.path)


def test_marks_are_cleared_by_a_repair_alone(tmp_path: Path, template: Path) -> None:
    image = make_damaged(tmp_path / "image.qcow2", template, "dirty")
    image.set_incompatible(3)
    our_verdict(image.path)
    assert image.get(72, ">Q") == 3
    our_verdict(image.path, Fix.LEAKS)
    assert image.get(72, ">Q") == 0


def test_marks_stay_on_what_is_not_sound(tmp_path: Path, template: Path) -> None:
    image = make_damaged(tmp_path / "image.qcow2", template, "unaligned entry")
    image.set_incompatible(2)
    our_verdict(image.path, Fix.ALL)
    assert image.get(72, ">Q") == 2


def spread_over_blocks(path: Path) -> Image:
    """64-bit refcounts in clusters of 512 bytes: a block describes 32 KiB of the file."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o"]
    command += ["cluster_size=512,refcount_bits=64", str(path), "4M"]
    subprocess.run(command, check=True)
    io: list[Any] = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 3M", str(path)]
    subprocess.run(io, check=True, stdout=subprocess.DEVNULL)
    return Image(path)


def test_many_blocks_are_rebuilt(tmp_path: Path) -> None:
    image = spread_over_blocks(tmp_path / "image.qcow2")
    assert our_verdict(image.path) == qemu_verdict(image.path)
    for index in range(0, 60, 3):
        image.put(image.reftable + index * 8, ">Q", 0)
    assert our_verdict(image.path) == qemu_verdict(image.path)
    assert our_verdict(image.path, Fix.ALL)[0] == 0
    assert qemu_verdict(image.path)[0] == 0
    assert contents(image.path) == b"\7" * (3 << 20) + bytes(1 << 20)
