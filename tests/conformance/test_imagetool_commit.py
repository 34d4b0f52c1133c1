"""``liveblockctl image commit`` beside qemu-img: words, bytes, what stays of the image."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph.backend import Backend
from tests.conformance.test_imagetool_rebase import content, scribble
from tests.support.imagetool import ours, qemu, qemu_io
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")


def held(path: Path) -> int:
    """Bytes that the image itself holds."""
    entries = json.loads(qemu("map", "--output=json", path)[1])
    return sum(e["length"] for e in entries if e["depth"] == 0)


def chain(directory: Path, rng: random.Random, options: str) -> None:
    """[a] <- [b] <- [c], of sizes of their own."""
    below: tuple[str, ...] = ()
    for name in "abc":
        size = rng.choice((1, 2, 3)) << 20
        extra = ("-o", options) if name == "c" else ()
        qemu("create", "-f", "qcow2", *below, *extra, directory / name, str(size))
        scribble(directory / name, rng, size, 8)
        below = ("-b", name, "-F", "qcow2")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options", ["cluster_size=4k", "extended_l2=on", "compat=0.10", "data_file={}/data"]
)
@pytest.mark.parametrize("words", ["", "-d", "-b a"])
def test_the_disk_is_in_the_base(tmp_path: Path, seed: int, options: str, words: str) -> None:
    for run in (ours, qemu):
        directory = tmp_path / run.__name__
        directory.mkdir()
        chain(directory, random.Random(seed), options.format(directory))
    found = []
    for run in (ours, qemu):
        directory = tmp_path / run.__name__
        image, base = directory / "c", directory / ("a" if "-b" in words else "b")
        before = content(image)
        if "-b" in words:
            words = f"-b {base}"
        answer = run("commit", *words.split(), image)
        assert answer == (0, "Image committed.\n", "")
        assert content(base)[: len(before)] == before, run
        assert content(image) == before, run
        assert bool(held(image)) is bool(words), run
        for name in "abc":
            assert qemu("check", directory / name)[0] == 0, (run, name)
        found.append((content(base), [held(directory / name) for name in "abc"]))
    assert found[0][0] == found[1][0]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    qemu("create", "-f", "qcow2", "a", "2M")
    qemu_io(tmp_path / "a", "write -P 3 0 1M")
    qemu("create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "o")
    qemu_io(tmp_path / "o", "write -P 4 512k 1M")
    return tmp_path


@pytest.mark.parametrize("words", ["a", "-b nope o", "nope", "-t wild o", "-b o a", "-f raw o"])
def test_same_refusal(images: Path, words: str) -> None:
    before = [(images / name).read_bytes() for name in "ao"]
    found, expected = ours("commit", *words.split()), qemu("commit", *words.split())
    assert found == expected
    assert found[0] == 1
    assert [(images / name).read_bytes() for name in "ao"] == before


def test_quietly_and_with_snapshots_and_bitmaps(images: Path) -> None:
    qemu("snapshot", "-c", "s", "o")
    qemu("bitmap", "--add", "o", "b")
    qemu_io(images / "o", "write -P 5 1M 64k")
    before = content(images / "o")
    assert ours("commit", "-q", "-p", "o")[0] == 0
    assert content(images / "o") == before
    assert held(images / "o") == 0
    assert qemu("check", "o")[0] == 0
    assert "s" in qemu("snapshot", "-l", "o")[1].split()
    info = json.loads(qemu("info", "--output=json", "o")[1])
    assert [b["name"] for b in info["format-specific"]["data"]["bitmaps"]] == ["b"]


def test_a_base_that_cannot_be_written_keeps_the_image_as_it_is(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = content(images / "o")
    shutil.copy(images / "o", images / "copy")
    monkeypatch.setattr(Backend, "flush", fail)
    answer = ours("commit", "o")
    assert answer == (1, "", "Block job failed: No space left on device\n")
    monkeypatch.undo()
    assert content(images / "o") == before
    assert held(images / "o") == held(images / "copy")


def test_the_image_is_emptied_after_the_base_is_durable(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    flush, empty = Backend.flush, Qcow2.make_empty

    async def flushed(self: Backend) -> None:
        await flush(self)
        order.append(self.node.filename)

    async def emptied(self: Qcow2) -> None:
        order.append("empty")
        await empty(self)

    monkeypatch.setattr(Backend, "flush", flushed)
    monkeypatch.setattr(Qcow2, "make_empty", emptied)
    assert ours("commit", "o")[0] == 0
    assert order[:2] == ["a", "empty"]
