"""External data files between QEMU and us: made there and used here, through the daemon as well."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_qcow2_subclusters import by_qemu, by_us, operations
from tests.support.daemon import DaemonProcess, QmpError
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import check, needs, open_qcow2, run

K = 1024
pytestmark = needs("qemu-img", "qemu-io")


def content(path: Path) -> bytes:
    raw = path.with_suffix(".content")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


@pytest.mark.parametrize("seed", range(12))
async def test_twins(tmp_path: Path, seed: int) -> None:
    """QEMU prepares an image; we and QEMU go on with the same requests, each with a copy."""
    rng = random.Random(seed)
    raw, extended = seed % 2 == 1, seed % 3 == 2
    cluster = rng.choice((16, 64)) * K
    size = rng.randrange(100, 700) * K + 512
    theirs, ours = tmp_path / "t.qcow2", tmp_path / "o.qcow2"
    data, our_data = tmp_path / "t.raw", tmp_path / "o.raw"
    options = f"data_file={data},cluster_size={cluster}"
    options += ",data_file_raw=on" if raw else ""
    options += ",extended_l2=on" if extended else ""
    below: list[str | Path] = []
    base = rng.randbytes(size // 2 // 512 * 512)
    if not raw and seed % 4 == 0:
        (tmp_path / "base.raw").write_bytes(base)
        below = ["-b", tmp_path / "base.raw", "-F", "raw"]
    run("qemu-img", "create", "-f", "qcow2", "-o", options, *below, theirs, str(size))
    by_qemu(theirs, operations(rng, size, cluster, 8))
    if raw:
        assert data.read_bytes()[:size] == content(theirs), "QEMU"
    shutil.copy(theirs, ours)
    shutil.copy(data, our_data)

    backing = MemoryDriver.of(base, read_only=True) if below else None
    file = MemoryDriver.of(ours.read_bytes())
    guest = MemoryDriver.of(our_data.read_bytes())
    image = await open_qcow2(file, backing, data_file=guest, discard="unmap")
    assert bytes(await image.read(0, size)) == content(theirs)
    wanted = operations(rng, size, cluster, 24)
    by_qemu(theirs, wanted)
    await by_us(image, wanted)
    expected = content(theirs)
    assert bytes(await image.read(0, size)) == expected
    await image.close()
    # Ours under the name that the header has
    theirs.write_bytes(file.content())
    data.write_bytes(guest.content())
    assert check(theirs) == {}
    assert content(theirs) == expected
    if raw:
        assert data.read_bytes()[:size] == expected  # QEMU rounds its length up


def raw_read(path: Path, image_format: str) -> bytes:
    done = path.with_suffix(".content")
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", path, done)
    return done.read_bytes()


def make(tmp_path: Path) -> bytes:
    """base.raw <- mid.qcow2 with a data file <- top.qcow2 with another."""
    rng = random.Random(7)
    disk = bytearray(rng.randbytes(2048 * K))
    (tmp_path / "base.raw").write_bytes(disk)
    here = {"cwd": tmp_path, "check": True, "stdout": subprocess.DEVNULL, "timeout": 60}
    for name, below, kind in (("mid", "base.raw", "raw"), ("top", "mid.qcow2", "qcow2")):
        subprocess.run(
            ["qemu-img", "create", "-f", "qcow2", "-o", f"data_file={name}.data", "-b", below,
             "-F", kind, f"{name}.qcow2"], **here,
        )  # fmt: skip
    subprocess.run(["qemu-io", "-c", "write -P 1 0 300k", "mid.qcow2"], **here)
    subprocess.run(["qemu-io", "-c", "write -P 2 100k 9k", "top.qcow2"], **here)
    disk[: 300 * K] = b"\1" * 300 * K
    disk[100 * K : 109 * K] = b"\2" * 9 * K
    return bytes(disk)


def add(qmp, node: str, name: str, **more) -> None:
    file = {"driver": "file", "filename": name}
    qmp("blockdev-add", **{"driver": "qcow2", "node_name": node, "file": file, **more})


def stream(qmp, node: str, **more) -> None:
    qmp("block-stream", job_id="job", device=node, auto_dismiss=False, **more)
    qmp.wait("JOB_STATUS_CHANGE", id="job", status="concluded")
    job = next(j for j in qmp("query-jobs") if j["id"] == "job")
    assert "error" not in job, job
    qmp("job-dismiss", id="job")


@pytest.mark.parametrize("whole", [True, False])
def test_stream_from_and_into_data_files(tmp_path: Path, whole: bool) -> None:
    expected = make(tmp_path)
    directory = tmp_path / "elsewhere"  # the names in the headers are seen from the images
    directory.mkdir()
    with DaemonProcess(directory) as daemon:
        qmp = daemon.qmp()
        add(qmp, "top", str(tmp_path / "top.qcow2"))
        nodes = {n["node-name"]: n for n in qmp("query-named-block-nodes", flat=True)}
        assert any(n["file"] == str(tmp_path / "top.data") for n in nodes.values())
        info = nodes["top"]["image"]["format-specific"]["data"]
        assert info["data-file"] == "top.data" and info["data-file-raw"] is False
        stream(qmp, "top", **({} if whole else {"base": str(tmp_path / "base.raw")}))
        qmp("blockdev-del", node_name="top")
    here = {"cwd": tmp_path, "check": True, "timeout": 60, "capture_output": True}
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "top.qcow2", "out"], **here)
    assert (tmp_path / "out").read_bytes() == expected
    found = json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", "top.qcow2"], **here).stdout
    )
    assert found.get("backing-filename") == (None if whole else str(tmp_path / "base.raw"))
    subprocess.run(["qemu-img", "check", "top.qcow2"], **here)
    data = (tmp_path / "top.data").read_bytes()
    assert data[: 100 * K] == expected[: 100 * K]


def test_stream_from_a_data_file_into_a_plain_image(tmp_path: Path) -> None:
    expected = make(tmp_path)
    top = tmp_path / "top.qcow2"
    subprocess.run(["qemu-img", "create", "-f", "qcow2", "-b", top, "-F", "qcow2", "new.qcow2"],
                   cwd=tmp_path, check=True, timeout=60)  # fmt: skip
    with DaemonProcess(tmp_path) as daemon:
        qmp = daemon.qmp()
        add(qmp, "new", "new.qcow2")
        stream(qmp, "new")
        qmp("blockdev-del", node_name="new")
    raw = raw_read(tmp_path / "new.qcow2", "qcow2")
    assert raw == expected
    assert check(tmp_path / "new.qcow2") == {}


def test_data_file_by_option(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "mid.data").rename(tmp_path / "moved")
    with DaemonProcess(tmp_path) as daemon:
        qmp = daemon.qmp()
        with pytest.raises(QmpError, match=r"Could not open 'mid\.data': No such file"):
            add(qmp, "mid", "mid.qcow2", read_only=True)
        qmp("blockdev-add", driver="file", node_name="d", filename="moved")
        add(qmp, "mid", "mid.qcow2", data_file="d")
        with pytest.raises(QmpError, match=r"in use|used as 'data-file'"):
            qmp("blockdev-del", node_name="d")
        with pytest.raises(QmpError, match=r"lock|conflict"):
            qmp("blockdev-add", driver="file", node_name="e", filename="moved", read_only=False)
            add(qmp, "mid2", "top.qcow2", data_file="e", backing=None)
        qmp("blockdev-del", node_name="mid")
        with pytest.raises(QmpError, match="'data-file' can only be set for images with an"):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "p.qcow2", "1M"],
                           cwd=tmp_path, check=True, timeout=60)  # fmt: skip
            add(qmp, "p", "p.qcow2", data_file="d")
