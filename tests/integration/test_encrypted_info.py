"""What encrypted images say of themselves, and legacy AES, beside qemu-img and qemu-io."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from liveblockd.qapi import parse
from liveblockd.qmp.block_info import BlockDeviceInfo
from tests.support import warm
from tests.support.daemon import DaemonProcess, QmpError
from tests.support.imagetool import ours, qemu
from tests.support.qcow2_images import needs, run

pytest.importorskip("cryptography")
pytestmark = needs("qemu-img", "qemu-io")
SECRET = "secret,id=s,data=swordfish"


def create(path: Path, form: str, options: str, size: str = "3M") -> None:
    """By qemu-img, but for LUKS: it measures the processor for seconds before it makes such a one.

    Images of LUKS that are its own are in ``test_qcow2_luks.py``.
    """
    words = ("create", "-q", "--object", SECRET, "-f", form, "-o", options, path, size)
    program = ours if form == "luks" or LUKS in options else qemu
    assert program(*words) == (0, "", "")


def info(program: list[str], path: Path) -> dict:
    done = warm.run([*program, "info", "-U", "--output=json", str(path)], timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    details = found["format-specific"]["data"]
    details = details.get("encrypt", details)
    if details.get("format") != "aes":
        details.setdefault("detached-header", False)  # not told before QEMU 9
    found.pop("children", None)
    return found


LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
QCOW2 = [
    f"{LUKS},encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha512",
    f"{LUKS},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    "encrypt.format=aes,encrypt.key-secret=s",
    "encrypt.format=aes,encrypt.key-secret=s,compat=0.10",
]


@pytest.mark.parametrize("options", QCOW2)
def test_info_is_that_of_qemu_img(tmp_path: Path, options: str) -> None:
    path = tmp_path / "i.qcow2"
    create(path, "qcow2", options)
    theirs = info(["qemu-img"], path)
    assert info([sys.executable, "-m", "liveblockd.ctl", "image"], path) == theirs
    if "luks" not in options:
        return
    with DaemonProcess(tmp_path, "--object", SECRET) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", driver="qcow2", node_name="disk", encrypt={"key-secret": "s"},
            file={"driver": "file", "filename": "i.qcow2"})  # fmt: skip
        node = qmp("query-named-block-nodes", flat=True)[0]
        encrypt = node["image"]["format-specific"]["data"]["encrypt"]
        assert encrypt == theirs["format-specific"]["data"]["encrypt"]
        assert parse(BlockDeviceInfo, node).encrypted
        del encrypt["uuid"]
        with pytest.raises(Exception, match="uuid' is missing"):
            parse(BlockDeviceInfo, node)


@pytest.mark.parametrize("more", ["", ",compat=0.10", ",cluster_size=4k"])
def test_legacy_aes(tmp_path: Path, more: str) -> None:
    path, base = tmp_path / "i.qcow2", tmp_path / "base"
    base.write_bytes(b"\x55" * (3 << 20))
    create(path, "qcow2", QCOW2[2] + f",backing_file={base},backing_fmt=raw" + more)
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    commands = ("write -P 1 1000k 70k", "write -P 2 0 3k", "write -P 3 2000k 300k")
    arguments = [a for c in commands for a in ("-c", c)]
    run("qemu-io", "--object", SECRET, *arguments, "--image-opts", image)
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "--object", SECRET, "--image-opts", image, "-O", "raw", raw)
    out = tmp_path / "out.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", out, "3M")
    members = {"driver": "qcow2", "file": {"driver": "file", "filename": "i.qcow2"}}
    encrypt = {"format": "aes", "key-secret": "s"}
    with DaemonProcess(tmp_path, "--object", SECRET) as daemon:
        qmp = daemon.qmp()
        with pytest.raises(QmpError, match="legacy AES encryption can only be opened read-only"):
            qmp("blockdev-add", node_name="aes", encrypt=encrypt, **members)
        with pytest.raises(QmpError, match=r"'encrypt\.key-secret' is required"):
            qmp("blockdev-add", node_name="aes", read_only=True, **members)
        with pytest.raises(QmpError, match="Header reported 'aes' encryption format"):
            qmp("blockdev-add", node_name="aes", read_only=True,
                encrypt={"format": "luks", "key-secret": "s"}, **members)  # fmt: skip
        qmp("blockdev-add", node_name="aes", read_only=True, encrypt=encrypt, **members)
        qmp("blockdev-add", driver="qcow2", node_name="out", backing="aes",
            file={"driver": "file", "filename": "out.qcow2"})  # fmt: skip
        qmp("block-stream", job_id="job", device="out", auto_dismiss=False)
        qmp.wait("JOB_STATUS_CHANGE", id="job", status="concluded")
        assert "error" not in qmp("query-jobs")[0]
    assert b"\x02" * 512 not in path.read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, out)


def test_luks_driver(tmp_path: Path) -> None:
    path, raw = tmp_path / "i.luks", tmp_path / "raw"
    create(path, "luks", "key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=plain64")
    assert info([sys.executable, "-m", "liveblockd.ctl", "image"], path) == info(["qemu-img"], path)
    image = f"driver=luks,file.filename={path},key-secret=s"
    run("qemu-io", "--object", SECRET, "-c", "write -P 1 0 3M", "-c", "write -P 2 100k 70k",
        "--image-opts", image)  # fmt: skip
    members = {"driver": "luks", "file": {"driver": "file", "filename": "i.luks"}}
    with DaemonProcess(tmp_path, "--object", SECRET, "--object", "secret,id=w,data=x") as daemon:
        qmp = daemon.qmp()
        with pytest.raises(QmpError, match="Parameter 'key-secret' is required for cipher"):
            qmp("blockdev-add", node_name="luks", **members)
        with pytest.raises(QmpError, match="Invalid password, cannot unlock any keyslot"):
            qmp("blockdev-add", node_name="luks", key_secret="w", **members)
        qmp("blockdev-add", node_name="luks", key_secret="s", **members)
        node = qmp("query-named-block-nodes", flat=True)[0]
        assert parse(BlockDeviceInfo, node).encrypted
        assert node["image"]["virtual-size"] == 3 << 20
        qmp("block_resize", node_name="luks", size=4 << 20)
        qmp("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        qmp("block-export-add", type="nbd", id="e", node_name="luks", name="d", writable=True)
        uri = f"nbd+unix:///d?socket={tmp_path / 'nbd.sock'}"
        run("qemu-io", "-f", "raw", "-c", "read -P 1 0 100k", "-c", "read -P 2 100k 70k",
            "-c", "write -P 3 1000k 300k", "-c", "write -P 4 777 2000", "-c", "write -z 5k 3000",
            "-c", "read -P 0 3M 1M", "-c", "discard 2M 64k", uri)  # fmt: skip
    run("qemu-img", "convert", "--object", SECRET, "--image-opts", image, "-O", "raw", raw)
    expected = bytearray(b"\1" * (3 << 20)) + bytes(1 << 20)
    for offset, value, length in (
        (100 << 10, 2, 70 << 10), (1000 << 10, 3, 300 << 10), (777, 4, 2000), (5 << 10, 0, 3000)
    ):  # fmt: skip
        expected[offset : offset + length] = bytes([value]) * length
    assert raw.read_bytes() == expected
