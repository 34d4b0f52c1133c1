"""``liveblockctl image create`` with every option that qemu-img has, beside qemu-img."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.imagetool import ours, qemu, qemu_io
from tests.support.qcow2_images import needs

pytest.importorskip("cryptography", reason="the extra crypto is not installed")
pytestmark = needs("qemu-img", "qemu-io")

SECRET = "--object secret,id=s,data=geheim "
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=50"

COMMANDS = [
    "-o extended_l2=on n 1M", "-o extended_l2=on,cluster_size=4k n 1M",
    "-o extended_l2=on,compat=v2 n 1M", "-o extended_l2=foo n 1M",
    "-o compression_type=zstd n 1M", "-o compression_type=zstd,compat=v2 n 1M",
    "-o compression_type=foo n 1M",
    "-o data_file=d n 1M", "-o data_file=d,data_file_raw=on n 1M", "-o data_file_raw=on n 1M",
    "-o data_file=d,compat=v2 n 1M", "-o data_file=sub/d n 1M",
    "-o data_file=d,data_file_raw=on,backing_file=base,backing_fmt=raw n 1M",
    "-o data_file=d,preallocation=falloc n 1M", "-o data_file=d,preallocation=full n 1M",
    "-o preallocation=metadata n 3M", "-o preallocation=blah n 1M",
    "-o preallocation=full,backing_file=base,backing_fmt=raw n 1M",
    "-o preallocation=metadata,extended_l2=on,backing_file=base,backing_fmt=raw n 1M",
    "-o size=2M n", "-o size=2M n 1M", "-o cluster_size=foo n 1M", "-o refcount_bits=foo n 1M",
    "-o nocow=on n 1M", "-o extent_size_hint=1M n 1M", "-o lazy_refcounts=on n 1M",
    # Few, for qemu-img takes seconds to measure the processor.
    f"{SECRET}-o {LUKS},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,data_file=d n 1M",
    f"{SECRET}-o {LUKS},encrypt.cipher-alg=aes-128,encrypt.ivgen-alg=plain,"
    "encrypt.hash-alg=sha1,extended_l2=on n 1M",
    f"{SECRET}-o {LUKS},encrypt.cipher-alg=blah n 1M",
    f"{SECRET}-o {LUKS},encrypt.key-secret=other n 1M", f"{SECRET}-o encrypt.key-secret=s n 1M",
    f"{SECRET}-o encrypt.foo=s n 1M", f"{SECRET}-o encrypt.format=blah,encrypt.key-secret=s n 1M",
    "-o encrypt.format=luks n 1M",
    "--object secret,id=s -o encrypt.format=luks,encrypt.key-secret=s n 1M",
    "--object blah,id=s n 1M", "--object secret,data=x n 1M",
]  # fmt: skip


def described(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image, without what is a matter of chance."""
    info: dict[str, Any] = json.loads(qemu("info", "--output=json", path)[1])
    del info["actual-size"]
    if (encrypt := info["format-specific"]["data"].get("encrypt")) is not None:
        del encrypt["uuid"], encrypt["master-key-iters"]
        for slot in encrypt["slots"]:
            slot.pop("iters", None)
    return info


@pytest.mark.parametrize("command", COMMANDS)
def test_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    found = []
    for run in (ours, qemu):
        directory = tmp_path / run.__name__
        directory.mkdir()
        monkeypatch.chdir(directory)
        (directory / "base").write_bytes(bytes(1 << 20))
        status, out, err = run("create", "-f", "qcow2", *command.split())
        err = err.replace(
            "Either 'file' or 'data' must be provided", "Must provide 'file' or 'data'"
        )
        left = {p.name: p.stat().st_size for p in directory.iterdir()} if status == 0 else {}
        info = described(Path("n")) if status == 0 else {}
        if "luks" in command and status == 0:
            opts = ["--object", "secret,id=s,data=geheim", "--image-opts"]
            opened = "driver=qcow2,encrypt.key-secret=s,file.filename=n"
            assert qemu("check", *opts, opened)[0] == 0
        elif status == 0:
            assert qemu("check", "n")[0] == 0
            assert qemu("map", "--output=json", "n")[0] == 0
        left.pop("n", None)
        found.append((status, out, err.split(), left, info))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "options",
    ["", "cipher-alg=aes-192", "cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha512",
     "cipher-mode=cbc,ivgen-alg=plain,cipher-alg=aes-128"],
)  # fmt: skip
def test_qemu_reads_and_writes_what_was_encrypted_here(tmp_path: Path, options: str) -> None:
    path = tmp_path / "n"
    more = "".join(f",encrypt.{option}" for option in options.split(",") if option)
    words = (*SECRET.split(), "-q", "-f", "qcow2", "-o", LUKS + more, path, "1M")
    assert ours("create", *words) == (0, "", "")
    image = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"

    words = ("qemu-io", *SECRET.split(), "--image-opts", "-c", "write -P 7 64k 100k", image)
    subprocess.run(words, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert ours("convert", *SECRET.split(), "--image-opts", image, tmp_path / "raw")[0] == 0
    raw = (tmp_path / "raw").read_bytes()
    assert raw == bytes(64 << 10) + b"\7" * (100 << 10) + bytes((1 << 20) - (164 << 10))


def test_aes_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    words = ("-f", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s", tmp_path / "n", "1M")
    status, _, error = ours("create", *SECRET.split(), *words)
    assert status == 1 and "'aes' is not supported" in error
    assert not list(tmp_path.iterdir())


def test_an_image_whose_data_file_cannot_be_made_is_not_there(tmp_path: Path) -> None:
    words = ("-f", "qcow2", "-o", f"data_file={tmp_path}/no/d", tmp_path / "n", "1M")
    assert ours("create", *words)[0] == 1
    assert not list(tmp_path.iterdir())


def test_a_data_file_in_use_is_not_touched(tmp_path: Path) -> None:
    first = ("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/n", tmp_path / "n", "1M")
    assert ours(*first)[0] == 1
    qemu("create", "-f", "qcow2", tmp_path / "d", "1M")
    qemu_io(tmp_path / "d", "write 0 64k")

    fd = os.open(tmp_path / "d", os.O_RDWR)
    try:
        for byte in (101, 201):
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        before = (tmp_path / "d").read_bytes()
        second = ("-f", "qcow2", "-o", f"data_file={tmp_path}/d", tmp_path / "m", "1M")
        assert ours("create", "-q", *second)[0] == 1
        assert (tmp_path / "d").read_bytes() == before
        assert not (tmp_path / "m").exists()
    finally:
        os.close(fd)
