"""Jobs on chains with filters between their images: the disk reads as before, the filters stay."""

import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess

SIZE = 4 << 20
CLUSTER = 1 << 16


def run(directory, *command):
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def images(tmp_path):
    """base <- mid <- top, with bytes of its own in each; ``all.raw`` is what a guest reads."""
    for name in ("qemu-img", "qemu-io"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    below = []
    for number, name in enumerate(("base", "mid", "top"), 1):
        run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", *below, f"{name}.qcow2", str(SIZE))
        write = f"write -P {number} {(number - 1) * 5 * CLUSTER} {10 * CLUSTER}"
        run(tmp_path, "qemu-io", "-f", "qcow2", "-c", write, f"{name}.qcow2")
        below = ["-b", f"{name}.qcow2", "-F", "qcow2"]
    run(tmp_path, "qemu-img", "convert", "-O", "raw", "top.qcow2", "all.raw")
    return tmp_path


def image(name, backing):
    return {
        "driver": "qcow2", "node-name": name, "backing": backing,
        "file": {"driver": "file", "filename": f"{name}.qcow2"},
    }  # fmt: skip


def throttle(name, file):
    return {"driver": "throttle", "node-name": name, "throttle-group": "g", "file": file}


def chain():
    """top on a throttle on mid on a throttle on base, and a copy-on-read above all."""
    below = throttle("t-base", image("base", None))
    middle = throttle("t-mid", image("mid", below))
    return {"driver": "copy-on-read", "node-name": "cor", "file": image("top", middle)}


def start(directory):
    return DaemonProcess(directory, "--object", "throttle-group,id=g,x-iops-total=500")


@pytest.mark.parametrize("base", [None, "base", "t-base"])
def test_stream(images, base):
    with start(images) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", **chain())
        below = {} if base is None else {"base_node": base}
        qmp("block-stream", job_id="s", device="cor", **below)
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
        nodes = {n["node-name"]: n for n in qmp("query-named-block-nodes", flat=True)}
        children = {c["child"]: c["node-name"] for c in nodes["top"]["children"]}
        # QEMU lets the chain go on below what was copied, whatever filters are there.
        assert children.get("backing") == (None if base is None else "t-base")
        assert nodes["cor"]["children"][0]["node-name"] == "top"
    run(images, "qemu-img", "check", "-q", "top.qcow2")
    assert "identical" in run(images, "qemu-img", "compare", "top.qcow2", "all.raw")


def test_commit(images):
    with start(images) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", **chain())
        qmp("block-commit", job_id="c", device="cor", top_node="mid", base_node="base")
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
    for name in ("base", "top"):
        run(images, "qemu-img", "check", "-q", f"{name}.qcow2")
    assert "base.qcow2" in run(images, "qemu-img", "info", "top.qcow2")
    assert "identical" in run(images, "qemu-img", "compare", "top.qcow2", "all.raw")
