"""``liveblockctl image rebase`` beside qemu-img: words, bytes, and what it costs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from liveblockd.imagetool.rebase import differences
from tests.support.imagetool import ours, qemu, qemu_io
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")


def content(path: Path) -> bytes:
    raw = path.with_name("raw")
    assert qemu("convert", "-O", "raw", path, raw)[0] == 0
    return raw.read_bytes()


def scribble(path: Path, rng: random.Random, size: int, count: int) -> None:
    commands = []
    for _ in range(count):
        length = rng.choice((512, 4096, 65536, 200704))
        offset = rng.randrange(0, size - length, 512)
        value = rng.randrange(1, 4)  # few values: old and new are often the same
        zero = rng.random() < 0.2
        commands.append(f"write {'-z' if zero else f'-P {value}'} {offset} {length}")
    qemu_io(path, *commands)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on", "compat=0.10"])
def test_the_disk_stays_as_it_is(tmp_path: Path, seed: int, options: str) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice((1, 2, 3)) << 20 for _ in range(3)]
    for name, size in zip(("a", "b"), sizes[:2], strict=True):
        qemu("create", "-f", "qcow2", tmp_path / name, str(size))
        scribble(tmp_path / name, rng, size, 12)
    below = ("-b", "a", "-F", "qcow2") if seed else ()
    qemu("create", "-f", "qcow2", "-o", options, *below, tmp_path / "o", str(sizes[2]))
    scribble(tmp_path / "o", rng, sizes[2], 6)
    before = content(tmp_path / "o")
    shutil.copy(tmp_path / "o", tmp_path / "p")
    for new in (("-b", "b", "-F", "qcow2"), ("-b", "")):
        maps = []
        for run, name in ((ours, "o"), (qemu, "p")):
            assert run("rebase", *new, tmp_path / name) == (0, "", "")
            if run is ours or seed or "0.10" not in options:
                # qemu-img 7.2 lets the new backing file shine through zeros of such images
                assert content(tmp_path / name) == before, run
            assert qemu("check", tmp_path / name)[0] == 0
            entries = json.loads(qemu("map", "--output=json", tmp_path / name)[1])
            maps.append(sum(e["length"] for e in entries if e["depth"] == 0 and e["data"]))
            info = json.loads(qemu("info", "--output=json", tmp_path / name)[1])
            assert info.get("backing-filename", "") == new[1]
        if seed:  # zeros instead of a backing file are written here
            assert maps[0] <= maps[1] * 1.1 + 65536


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    qemu("create", "-f", "qcow2", "a", "2M")
    qemu_io(tmp_path / "a", "write -P 3 0 1M")
    qemu("create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "o")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    ["-b nope -F raw o", "-u -b nope o", "-b a -F qcow2 nope", "-b nope o"],
)  # fmt: skip
def test_same_refusal(images: Path, words: str) -> None:
    before = (images / "o").read_bytes()
    found, expected = ours("rebase", *words.split()), qemu("rebase", *words.split())
    assert found == expected
    assert found[0] == 1
    assert (images / "o").read_bytes() == before


def test_unsafe_changes_the_name_alone(images: Path) -> None:
    (images / "a").unlink()
    assert ours("rebase", "-u", "-b", "gone", "-F", "raw", "o") == (0, "", "")
    info = json.loads(qemu("info", "--output=json", "o")[1])
    assert (info["backing-filename"], info["backing-filename-format"]) == ("gone", "raw")
    assert ours("rebase", "-u", "-b", "", "o") == (0, "", "")
    assert "backing-filename" not in json.loads(qemu("info", "--output=json", "o")[1])


def test_a_write_that_fails_leaves_the_old_backing_file(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from liveblockd.formats.qcow2.image import Qcow2

    async def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = content(images / "o")
    monkeypatch.setattr(Qcow2, "write", fail)
    status, _, error = ours("rebase", "-b", "", "o")
    assert (status, error) == (1, "error while rebasing: No space left on device\n")
    monkeypatch.undo()
    info = json.loads(qemu("info", "--output=json", images / "o")[1])
    assert info["backing-filename"] == "a"
    assert content(images / "o") == before


def test_differences_are_whole_units() -> None:
    old = bytes(10_000)
    new = np.zeros(10_000, np.uint8)
    assert differences(old, new, 4096) == []
    new[[4095, 9999]] = 1
    assert differences(old, bytes(new), 4096) == [(0, 4096), (8192, 10_000)]
    new[5000] = 1
    assert differences(old, bytes(new), 4096) == [(0, 10_000)]
