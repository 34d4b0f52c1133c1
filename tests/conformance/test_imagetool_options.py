"""``--image-opts`` and ``--object secret`` in every command, beside qemu-img."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.imagetool import Answer, ours, qemu, qemu_io
from tests.support.qcow2_images import needs

pytest.importorskip("cryptography", reason="the extra crypto is not installed")
pytestmark = needs("qemu-img", "qemu-io")

SECRET = ("--object", "secret,id=s,data=geheim")
E = "driver=qcow2,encrypt.key-secret=s,file.filename=e.qcow2"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """p.qcow2 plain, e.qcow2 the same encrypted, o.qcow2 above it; not to be changed."""
    path = tmp_path_factory.mktemp("images")
    before = Path.cwd()
    os.chdir(path)
    qemu("create", "-f", "qcow2", "p.qcow2", "1M")
    qemu_io("p.qcow2", "write -P 3 0 64k", "write -P 4 512k 1k")
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
    # not by qemu-img, which measures the processor for seconds, or not, if it is busy
    ours("convert", *SECRET, "-O", "qcow2", "-o", luks, "p.qcow2", "e.qcow2")
    below = 'json:{"driver":"qcow2","encrypt.key-secret":"s","file.filename":"e.qcow2"}'
    qemu("create", *SECRET, "-f", "qcow2", "-b", below, "-F", "qcow2", "o.qcow2")
    qemu_io_o = ("write -P 9 128k 64k",)
    qemu("create", "-f", "qcow2", "-o", "data_file=d", "x.qcow2", "1M")
    qemu_io("x.qcow2", *qemu_io_o)
    (path / "secret").write_bytes(b"geheim")
    yield path
    os.chdir(before)


COMMANDS = [
    f"info --image-opts {E}", "info e.qcow2", "info o.qcow2",
    "info --image-opts driver=qcow2,file.filename=nope", "info --image-opts driver=qcow2",
    "info --image-opts driver=qcow2,foo=1,file.filename=p.qcow2", "info --image-opts p.qcow2",
    "info --image-opts driver=blah,file.filename=p.qcow2", f"info -f qcow2 --image-opts {E}",
    "info --image-opts file.filename=p.qcow2", "info --image-opts driver=file,filename=p.qcow2",
    "info --image-opts driver=raw,file.filename=p.qcow2",
    "info --image-opts driver=qcow2,file.driver=file,file.filename=o.qcow2",
    "info --object secret,id=s,data=bad --image-opts " + E,
    f"map --image-opts {E}", f"map --image-opts {E} --output=json", "map e.qcow2",
    f"check --image-opts {E}", f"check --image-opts {E} --output=json",
    f"compare --image-opts {E} driver=qcow2,file.filename=p.qcow2", "compare e.qcow2 e.qcow2",
    f"compare --image-opts driver=raw,file.filename=secret {E}",
    f"compare -f qcow2 --image-opts {E} {E}", f"compare -F qcow2 --image-opts {E} {E}",
    f"snapshot --image-opts -l {E}", "info --backing-chain o.qcow2", "map o.qcow2 --output=json",
    "compare o.qcow2 p.qcow2", "info --image-opts driver=qcow2,file.filename=x.qcow2",
    "map --output=json --image-opts driver=qcow2,file.filename=x.qcow2,data-file.driver=file,"
    "data-file.filename=d",
]  # fmt: skip


def told(answer: Answer) -> Any:
    """An answer in which json: names and JSON are compared as values, not letter by letter."""
    status, out, err = answer
    names = []

    def name(match: re.Match[str]) -> str:
        names.append(flat(json.loads(match[1].replace('\\"', '"'))))
        return "json:"

    out = re.sub(r'json:(\{.*\})(?="?,?$)', name, out, flags=re.MULTILINE)
    out = out.replace("        detached header: false\n", "")  # not told before QEMU 9
    text: Any = sorted(out.splitlines()) if "Format specific" in out else out
    return status, json.loads(out) if out[:1] in "[{" and out else text, names, err.split()


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, member in value.items():
        name = f"{prefix}{key}"
        found |= flat(member, f"{name}.") if isinstance(member, dict) else {name: member}
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_same_answer(images: Path, command: str) -> None:
    words = command.split()
    secret = () if "--object" in words else SECRET
    words = [words[0], *secret, *words[1:]]
    assert told(ours(*words)) == told(qemu(*words))


@pytest.mark.parametrize(
    "text",
    ["secret,id=s,file=secret", "secret,id=s,data=Z2VoZWlt,format=base64",
     'qom-type=secret,id=s,data=geheim'],
)  # fmt: skip
def test_secrets_in_all_forms(images: Path, text: str) -> None:
    assert base64.b64decode("Z2VoZWlt") == b"geheim"
    words = ("compare", "--object", text, "--image-opts", E, "driver=qcow2,file.filename=p.qcow2")
    assert ours(*words) == qemu(*words) == (0, "Images are identical.\n", "")


def test_wrong_secrets(images: Path) -> None:
    wrong = ("--object", "secret,id=s,data=falsch")
    for words in (("map", *wrong, "--image-opts", E), ("map", "--image-opts", E)):
        assert ours(*words) == qemu(*words)
        assert ours(*words)[0] == 1


def test_check_needs_no_secret(images: Path) -> None:
    assert qemu("check", "e.qcow2")[0] == 1
    assert ours("check", "e.qcow2")[0] == 0


def test_resize(images: Path, tmp_path: Path) -> None:
    sizes = []
    for run in (ours, qemu):
        path = tmp_path / run.__name__
        path.write_bytes((images / "e.qcow2").read_bytes())
        opened = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
        assert run("resize", *SECRET, "--image-opts", opened, "3M") == (0, "Image resized.\n", "")
        sizes.append(json.loads(qemu("info", "--output=json", path)[1])["virtual-size"])
    assert sizes == [3 << 20, 3 << 20]


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_what_an_encrypted_image_grows_by_reads_as_zeros(
    images: Path, tmp_path: Path, mode: str
) -> None:
    path = tmp_path / "e.qcow2"
    path.write_bytes((images / "e.qcow2").read_bytes())
    opened = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    words = ("resize", f"--preallocation={mode}", *SECRET, "--image-opts", opened, "3M")
    before = path.stat().st_size
    assert ours(*words) == (0, "Image resized.\n", "")
    assert path.stat().st_size >= before + (1 << 20), "clusters are there"
    read = ["qemu-io", *SECRET, "--image-opts", opened, "-c", "read -P 0 2M 1M"]
    done = subprocess.run(read, capture_output=True, text=True, timeout=30, check=True)
    assert "read 1048576" in done.stdout and "Pattern" not in done.stdout
    check = subprocess.run(["qemu-img", "check", *SECRET, "--image-opts", opened], timeout=30)
    assert check.returncode == 0
