"""The benchmark suite on tiny images, and that its checks refuse a wrong result."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fio, images
from benchmarks.registry import CannotRun, WrongResult

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("qemu-storage-daemon", "qemu-img", "qemu-io")
missing = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"missing: {', '.join(missing)}")


def test_a_run_measures_both_and_writes_the_page(tmp_path):
    only = "stream-dense-tmpfs,stream-sparse,query-block-jobs,memory-idle"
    try:
        fio.available()
        only += ",guest-latency"
    except CannotRun:
        pass  # the lines of guests are left out
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--scale", "0.002", "--pairs", "1", "--only", only,
         "--daemons", "uvloop", "--docs", str(tmp_path), "--directory", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "benchmarks" / "results.json").read_text())
    assert set(results["measures"]) == set(only.split(","))
    for name, measure in results["measures"].items():
        if "missing" in measure:
            continue  # too little tmpfs
        for kind in ("qsd", "uvloop"):
            (figures,) = measure["samples"][kind]
            assert all(value >= 0 for value in figures.values()), name
        if name.startswith("stream-"):
            (figures,) = measure["floor"]
            assert set(figures) <= set(measure["samples"]["qsd"][0]) and figures, name
    page = (tmp_path / "benchmarks.md").read_text()
    assert "dense block-stream, tmpfs, buffered" in page
    assert "not measured yet" in page, "lines that were not run are there, too"
    if "samples" in results["measures"]["stream-sparse"]:
        assert "What the machine allows" in page
    assert str(tmp_path) not in page


@pytest.fixture
def pair(tmp_path):
    base = tmp_path / "base.qcow2"
    images.dense(base, 16 * images.MIB)
    top = images.overlay(tmp_path / "top.qcow2", base)
    return base, top


def io(path, *commands):
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, capture_output=True)


def test_a_merged_image_that_differs_or_still_has_a_backing_file_is_refused(pair):
    base, top = pair
    with pytest.raises(WrongResult, match="backing file"):
        images.same(top, base)
    images.same(top, base, independent=False)
    io(top, "write -P 1 5M 512")
    with pytest.raises(WrongResult, match="compare"):
        images.same(top, base, independent=False)


def test_guest_blocks_are_counted_and_others_are_refused(pair, tmp_path):
    _base, top = pair
    io(top, f"write -P {images.GUEST} 1M 8k", f"write -P {images.GUEST} 9M 4k")
    assert images.guest_writes(top, tmp_path) == 3
    io(top, f"write -P {images.GUEST} 3M 512")  # torn: neither the guest's nor the base's
    with pytest.raises(WrongResult, match=str(3 << 20)):
        images.guest_writes(top, tmp_path)


def test_a_leak_is_a_wrong_result(tmp_path):
    image = tmp_path / "leaky.qcow2"
    images.dense(image, 16 * images.MIB)
    with image.open("r+b") as file:  # a second reference of the first cluster's L2 table
        file.seek(48)
        file.seek(int.from_bytes(file.read(8)))
        block = int.from_bytes(file.read(8))
        file.seek(block + 2 * 200)
        file.write(b"\0\2")
    with pytest.raises(WrongResult, match="check"):
        images.check(image)
