"""``liveblockctl image snapshot`` and ``amend`` beside qemu-img, on the same images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance.test_imagetool import ours, qemu, qemu_io
from tests.support.qcow2_images import check, needs

pytestmark = needs("qemu-img", "qemu-io")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu("create", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -P 1 0 1M", "write -z 2M 64k")
    return path


def content(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    assert qemu("convert", "-O", "raw", path, raw)[0] == 0
    return raw.read_bytes()


def test_snapshots(image: Path) -> None:
    first = content(image)
    assert ours("snapshot", "-c", "one", image) == (0, "", "")
    qemu_io(image, "write -P 2 0 1M")
    assert qemu("snapshot", "-c", "two", image)[0] == 0
    second = content(image)
    listed = ours("snapshot", "-l", image)
    wanted = qemu("snapshot", "-l", image)
    # The clock that QEMU makes up for its own snapshots may be too wide for its column.
    assert [line[:44] for line in listed[1].splitlines()] == [
        line[:44] for line in wanted[1].splitlines()
    ]
    assert ours("snapshot", "-a", "one", image) == (0, "", "")
    assert content(image) == first
    assert check(image) == {}
    assert ours("snapshot", "-a", "2", image)[0] == 0
    assert content(image) == second
    for name in ("one", "two"):
        assert ours("snapshot", "-d", name, image) == (0, "", "")
        assert check(image) == {}
    assert content(image) == second
    assert ours("snapshot", image) == qemu("snapshot", image) == (0, "", "")
    assert ours("snapshot", "-d", "x", image) == qemu("snapshot", "-d", "x", image)


def test_a_snapshot_is_deleted_by_its_name_alone(image: Path) -> None:
    for name in ("2", "x"):  # the first one has the name that is the id of the second one
        assert ours("snapshot", "-c", name, image)[0] == 0
    assert ours("snapshot", "-d", "2", image) == (0, "", "")
    assert [line.split()[:2] for line in ours("snapshot", "-l", image)[1].splitlines()[2:]] == [
        ["2", "x"]
    ]
    assert ours("snapshot", "-d", "2", image) == qemu("snapshot", "-d", "2", image)


def test_snapshots_of_another_size_stay_in_version_3(image: Path) -> None:
    assert ours("snapshot", "-c", "small", image)[0] == 0
    assert ours("resize", image, "8M")[0] == 0
    refused = ours("amend", "-o", "compat=v2", image)
    assert refused == qemu("amend", "-o", "compat=v2", image)
    assert refused[0] == 1
    assert ours("snapshot", "-a", "small", image)[0] == 0
    assert ours("amend", "-o", "compat=v2", image)[0] == 0
    assert check(image) == {}


@pytest.mark.parametrize(
    "option",
    [
        "compat=0.10", "lazy_refcounts=on", "refcount_bits=64", "size=8M", "compat=foo",
        "compat=0.10,refcount_bits=64", "refcount_bits=3", "cluster_size=512",
    ],
)  # fmt: skip
def test_amend(image: Path, option: str) -> None:
    twin = image.with_name("twin.qcow2")
    twin.write_bytes(image.read_bytes())
    status, _, error = ours("amend", "-o", option, image)
    wanted = qemu("amend", "-o", option, twin)
    assert status == wanted[0]
    assert error.splitlines()[:1] == wanted[2].splitlines()[:1]
    assert check(image) == {}
    assert content(image) == content(twin)
    keys = ("compat", "refcount-bits", "lazy-refcounts")
    seen, expected = (json.loads(qemu("info", "--output=json", path)[1]) for path in (image, twin))
    assert seen["virtual-size"] == expected["virtual-size"]
    data, other = seen["format-specific"]["data"], expected["format-specific"]["data"]
    assert [data.get(k) for k in keys] == [other.get(k) for k in keys]


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_create_with_preallocation(tmp_path: Path, mode: str) -> None:
    path, twin = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    option = f"preallocation={mode}"
    assert ours("create", "-q", "-f", "qcow2", "-o", option, path, "5M")[0] == 0
    qemu("create", "-q", "-f", "qcow2", "-o", option, twin, "5M")
    assert check(path) == {}
    used, wanted = (p.stat().st_blocks * 512 for p in (path, twin))
    assert abs(used - wanted) < 1 << 20
    runs = json.loads(qemu("map", "--output=json", path)[1])
    assert sum(r["length"] for r in runs if "offset" in r) == 5 << 20
