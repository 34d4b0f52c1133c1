"""``liveblockctl image convert``, ``bitmap`` and ``resize`` beside qemu-img: words and bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.imagetool import Answer, ours, qemu, qemu_io
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """t.qcow2 (with snapshots) <- o.qcow2 (with bitmaps), r.raw; not to be changed."""
    path = tmp_path_factory.mktemp("images")
    before = Path.cwd()
    os.chdir(path)
    qemu("create", "-f", "qcow2", "t.qcow2", "4M")
    qemu_io("t.qcow2", "write -P 3 0 64k", "write -P 4 1M 1M", "write -P 5 3M 1k")
    qemu("snapshot", "-c", "one", "t.qcow2")
    qemu_io("t.qcow2", "write -P 9 0 2M")
    qemu("create", "-f", "qcow2", "-b", "t.qcow2", "-F", "qcow2", "o.qcow2", "5M")
    qemu_io("o.qcow2", "write -P 7 512k 64k", "write -z 1M 64k", "write -P 1 4M 3k")
    qemu("bitmap", "--add", "-g", "64k", "o.qcow2", "b0")
    qemu("bitmap", "--add", "--disable", "o.qcow2", "b1")
    qemu_io("o.qcow2", "write -P 8 640k 64k")
    (path / "r.raw").write_bytes(bytes(range(200)) * 5000)
    yield path
    os.chdir(before)


WORDS = [
    "convert -l snapshot.id=1,snapshot.name=two t.qcow2 X", "convert -l snapshot.foo=1 t.qcow2 X",
    "convert -l one o.qcow2 X", "convert -l foo t.qcow2 o.qcow2 X", "convert -c -O raw t.qcow2 X",
    "convert --bitmaps -O raw t.qcow2 X", "convert --bitmaps -O qcow2 t.qcow2 o.qcow2 X",
    "convert --bitmaps -O qcow2 -f raw r.raw X", "convert --skip-broken-bitmaps t.qcow2 X",
    "convert -B foo -O raw t.qcow2 X", "convert -B t.qcow2 -O qcow2 t.qcow2 X",
    "convert -B foo -F raw -O qcow2 t.qcow2 X", "convert -F raw -O qcow2 t.qcow2 X",
    "convert -B t.qcow2 -F qcow2 -O qcow2 t.qcow2 o.qcow2 X", "convert -m 17 t.qcow2 X",
    "convert -O qcow2 -o backing_file=t.qcow2 t.qcow2 X", "convert -O qcow2 -o foo=t t.qcow2 X",
    "convert -n -o foo=bar t.qcow2 X", "convert --target-is-zero t.qcow2 X",
    "convert -S 100 t.qcow2 X", "convert -m 0 t.qcow2 X", "convert -C -S 4k t.qcow2 X",
    "convert -n -O qcow2 t.qcow2 nope", "convert -O blah t.qcow2 X", "convert -t foo t.qcow2 X",
    "convert -T foo t.qcow2 X", "convert -O qcow2 -o preallocation=full -c t.qcow2 X",
    "convert -O qcow2 -o cluster_size=3 t.qcow2 X", "convert --target-image-opts t.qcow2 X",
    "convert -n --target-image-opts -O raw t.qcow2 driver=raw,file.filename=X",
    "convert -n --target-image-opts t.qcow2 driver=qcow2,file.filename=r.raw",
    "bitmap o.qcow2 b9", "bitmap --add -g 100 o.qcow2 b8", "bitmap --clear -g 1024 o.qcow2 b8",
    "bitmap --clear o.qcow2 b8", "bitmap --remove o.qcow2 b8", "bitmap --merge nope o.qcow2 b1",
    "bitmap --remove -b t.qcow2 o.qcow2 b1", "bitmap --remove -F qcow2 o.qcow2 b1",
    "bitmap --add nope b0", "bitmap --add o.qcow2 b0",
    "resize --preallocation=blah -f raw r.raw 5M",
    "resize --preallocation=metadata -f raw r.raw 5M",
    "resize --preallocation=full --shrink o.qcow2 2M",
]  # fmt: skip


@pytest.mark.parametrize("command", WORDS)
def test_same_refusal(images: Path, tmp_path: Path, command: str) -> None:
    before = {p.name: p.read_bytes() for p in images.iterdir()}
    words = command.replace("X", str(tmp_path / "X")).split()
    found, expected = ours(*words), qemu(*words)
    assert plain(found) == plain(expected)
    assert found[0] != 0
    if words[0] not in ("bitmap", "resize"):  # whose bitmaps are marked as in use, and anew
        assert {p.name: p.read_bytes() for p in images.iterdir()} == before


def plain(answer: Answer) -> tuple[int, str, list[str]]:
    return answer[0], answer[1], answer[2].split()


COPIES = [
    "t.qcow2 o.qcow2 r.raw X", "-c -O qcow2 o.qcow2 r.raw t.qcow2 X", "-c -O qcow2 o.qcow2 X",
    "-c -O qcow2 -o compression_type=zstd,cluster_size=128k o.qcow2 X",
    "-c -O qcow2 -o cluster_size=512 o.qcow2 X", "-c -O qcow2 -o extended_l2=on o.qcow2 X",
    "-c -S 0 -O qcow2 o.qcow2 X", "-S 0 o.qcow2 X", "-S 64k o.qcow2 X", "-l one t.qcow2 X",
    "-l 1 t.qcow2 X", "-l snapshot.name=one t.qcow2 X", "-l snapshot.id=1 -O qcow2 t.qcow2 X",
    "-B t.qcow2 -F qcow2 -O qcow2 o.qcow2 X", "-c -B t.qcow2 -F qcow2 -O qcow2 o.qcow2 X",
    "-B t.qcow2 -F qcow2 -O qcow2 -o cluster_size=2M o.qcow2 X",
    "-B t.qcow2 -F qcow2 -O qcow2 r.raw X", "-m 4 -W o.qcow2 X", "-C -O qcow2 o.qcow2 X",
    "-r 1G o.qcow2 X", "-t writeback -T none t.qcow2 X", "--bitmaps -O qcow2 o.qcow2 X",
    "-O qcow2 -o extended_l2=on,cluster_size=64k o.qcow2 X", "-O qcow2 -o size=9M t.qcow2 X",
    "-O qcow2 -o preallocation=falloc o.qcow2 X",
]  # fmt: skip


@pytest.mark.parametrize("command", COPIES)
def test_same_bytes(images: Path, tmp_path: Path, command: str) -> None:
    found = []
    for run in (ours, qemu):
        target = images / f"X.{run.__name__}"
        words = [str(target) if word == "X" else word for word in command.split()]
        assert plain(run("convert", *words)) == (0, "", [])
        image_format = "qcow2" if "qcow2" in " ".join(words[:4]) and "-O" in words else "raw"
        qemu("convert", "-f", image_format, "-O", "raw", target, tmp_path / "raw")
        digest = hashlib.sha256((tmp_path / "raw").read_bytes()).hexdigest()
        info: dict[str, Any] = json.loads(qemu("info", "--output=json", target)[1])
        data = info.get("format-specific", {}).get("data", {})
        if image_format == "qcow2":
            assert qemu("check", target)[0] == 0
            answer = json.loads(qemu("check", "--output=json", target)[1])
            data["compressed"] = answer.get("compressed-clusters", 0) > 0
            if "bitmaps" in data:
                qemu("bitmap", "--merge", "b0", "-b", target, "-F", "qcow2", target, "b1")
        space = target.stat().st_blocks
        found.append((digest, info["virtual-size"], info["format"], data, space))
        target.unlink()
    assert found[0][:-1] == found[1][:-1]
    assert found[0][-1] <= found[1][-1] * 1.1 + 256


def test_target_options_and_zero_target(images: Path, tmp_path: Path) -> None:
    for words in (
        ("-n", "--target-image-opts", "o.qcow2", f"driver=raw,file.filename={tmp_path}/X"),
        ("-n", "--target-is-zero", "-O", "raw", "o.qcow2", tmp_path / "X"),
    ):
        (tmp_path / "X").write_bytes(bytes(6 << 20) if "zero" in words[1] else b"x" * (6 << 20))
        assert ours("convert", *words)[0] == 0
        qemu("convert", "-O", "raw", "o.qcow2", tmp_path / "expected")
        assert (tmp_path / "X").read_bytes()[: 5 << 20] == (tmp_path / "expected").read_bytes()


def test_bitmap_actions(images: Path, tmp_path: Path) -> None:
    found = []
    shutil.copy("t.qcow2", tmp_path)
    for run in (ours, qemu):
        path, other = tmp_path / f"{run.__name__}.qcow2", tmp_path / f"{run.__name__}.other"
        for target in (path, other):
            shutil.copy("o.qcow2", target)
        answers = [
            run("bitmap", *words)
            for words in (
                ("--add", "-g", "4k", path, "new"), ("--disable", path, "b0"),
                ("--enable", path, "b1"), ("--clear", "--merge", "b0", path, "b1"),
                ("--add", "--disable", "--merge", "b0", "-b", other, "-F", "qcow2", path, "c"),
                ("--remove", path, "new"), ("--add", path, "last"),
            )
        ]  # fmt: skip
        assert [answer[0] for answer in answers] == [0] * 7, answers
        assert qemu("check", path)[0] == 0
        info = json.loads(qemu("info", "--output=json", path)[1])
        # The bits: each bitmap as the map of an export.
        found.append((answers, info["format-specific"]["data"]["bitmaps"], bits(path)))
    assert found[0] == found[1]


def bits(path: Path) -> dict[str, str]:
    """Digests of what is dirty."""
    import asyncio

    from liveblockd.imagetool.images import Images

    async def read() -> dict[str, str]:
        async with Images() as opened:
            node = await opened.open(str(path), "qcow2", backing=False)
            return {bitmap.name: bitmap.sha256() for bitmap in node.bitmaps}

    return asyncio.run(read())


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_resize_with_preallocation(images: Path, tmp_path: Path, mode: str) -> None:
    found = []
    for run in (ours, qemu):
        path = tmp_path / run.__name__
        shutil.copy("t.qcow2", path)
        answer = run("resize", f"--preallocation={mode}", path, "9M")
        assert answer[0] == 0, answer
        assert qemu("check", path)[0] == 0
        entries = json.loads(qemu("map", "--output=json", path)[1])
        kept = sum(e["length"] for e in entries if e.get("offset") is not None)
        found.append((answer, qemu("compare", "t.qcow2", path)[0], kept))
    assert found[0] == found[1]


def test_resize_raw(images: Path, tmp_path: Path) -> None:
    for mode in ("falloc", "full"):
        shutil.copy("r.raw", tmp_path / "r")
        words = ("resize", "-f", "raw", f"--preallocation={mode}", tmp_path / "r", "3M")
        assert ours(*words) == (0, "Image resized.\n", "")
        assert (tmp_path / "r").read_bytes() == Path("r.raw").read_bytes().ljust(3 << 20, b"\0")
        assert (tmp_path / "r").stat().st_blocks * 512 >= 3 << 20
