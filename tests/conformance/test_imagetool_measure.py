"""``liveblockctl image measure`` and ``-o help``, beside qemu-img."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.imagetool import ours, qemu, qemu_io
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")

#: and what qemu-img 7.2 says, which measures the processor for seconds before it does
ENCRYPTED = {
    "--object secret,id=s,data=x -O luks --size 1M -o key-secret=s,iter-time=10":
    "required size: 3117056\nfully allocated size: 3117056\n",
    "--object secret,id=s,data=x -O qcow2 --size 1M -o "
    "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10":
    "required size: 2424832\nfully allocated size: 3473408\n",
}  # fmt: skip
WITHOUT_IMAGE = [
    "--size 1G", "--size 100", "-O raw --size 1M --output=json", "-O qcow2 --size 0",
    "-O qcow2 --size 100", "-O qcow2 --size 1T --output=json",
    "-O qcow2 --size 63P -o cluster_size=2M", "-O qcow2 --size 3E",
    "-O qcow2 --size 1G -o cluster_size=512",
    "-O qcow2 --size 100G -o cluster_size=512,refcount_bits=64",
    "-O qcow2 --size 100G -o cluster_size=1k,refcount_bits=1",
    "-O qcow2 --size 100G -o cluster_size=2M,extended_l2=on",
    "-O qcow2 --size 127G -o cluster_size=16k,extended_l2=on,refcount_bits=4",
    "-O qcow2 --size 1G -o preallocation=metadata", "-O qcow2 --size 1G -o preallocation=falloc",
    "-O qcow2 --size 1G -o preallocation=full", "-O qcow2 --size 1M -o cluster_size=3",
    "-O qcow2 --size 1M -o extended_l2=on,cluster_size=4k", "-O qcow2 --size 1M -o compat=foo",
    "-O qcow2 --size 1M -o backing_file=x", "-O qcow2 --size 1M -o data_file=x",
    "-O qcow2 --size 1M -o backing_file=x,backing_fmt=raw,preallocation=full",
    "-O blah --size 1M", "-O vmdk --size 1M", "-O luks --size 1M", "--size x", "",
    "--size 1M -f qcow2", "--size 1M -l x", "--size 1M --image-opts", "--size 1M x", "x y", "x",
    "-O qcow2 --size 1M -o encrypt.format=luks",
    "-O qcow2 --size 1M -o encrypt.format=luks,encrypt.key-secret=s",
    *(pytest.param(words, marks=pytest.mark.slow) for words in ENCRYPTED),
]  # fmt: skip
OF_IMAGE = [
    "-O qcow2", "-O raw", "-O qcow2 -o cluster_size=512 --output=json",
    "-O qcow2 -o cluster_size=2M", "-O qcow2 -o preallocation=metadata",
    "-O qcow2 -o preallocation=full", "-O qcow2 -o compat=0.10", "-O qcow2 -o size=10M",
    "-O qcow2 -o backing_file=x,backing_fmt=raw", "-O qcow2 -l before", "-O qcow2 -l none",
    "-O qcow2 -f raw",
]  # fmt: skip


@pytest.mark.parametrize("words", WITHOUT_IMAGE)
def test_of_a_size(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ours("measure", *words.split()) == qemu("measure", *words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ENCRYPTED)
def test_of_a_size_encrypted(words: str) -> None:
    assert ours("measure", *words.split()) == (0, ENCRYPTED[words], "")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("measured")
    with (directory / "base").open("wb") as base:
        base.truncate(1_000_001)
        base.seek(300_000)
        base.write(b"hello")
    for name, options in (("plain", ""), ("small", "cluster_size=512"), ("old", "compat=0.10")):
        words = ["-o", options] if options else []
        qemu("create", "-f", "qcow2", *words, directory / name, "100M")
        qemu_io(directory / name, "write 20M 1M")
        qemu("snapshot", "-c", "before", directory / name)
        qemu_io(
            directory / name, "write 1M 3M", "write -z 10M 1M", "write -P 0 40M 100k",
            "write 5k 1k", "write 10k 512", "write -c 50M 64k",
        )  # fmt: skip
    qemu("bitmap", "--add", directory / "plain", "b0")
    qemu("bitmap", "--add", "-g", "512", directory / "plain", "a longer name")
    words = ["-b", directory / "base", "-F", "raw"]
    qemu("create", "-f", "qcow2", *words, directory / "overlay")
    qemu_io(directory / "overlay", "write 5k 1k")
    return directory


@pytest.mark.parametrize("words", OF_IMAGE)
@pytest.mark.parametrize("name", ["plain", "small", "old", "overlay", "base"])
def test_of_an_image(images: Path, name: str, words: str) -> None:
    given = (*words.split(), images / name)
    here, there = ours("measure", *given), qemu("measure", *given)
    if name == "base" and "-l" in words:  # raw has no snapshots, whatever the words
        here, there = here[:2], there[:2]
    assert here == there


@pytest.mark.parametrize("words", ["create -f qcow2", "create -f luks", "amend -f qcow2"])
def test_all_options_are_told(words: str) -> None:
    told, known = (
        set(re.findall(r"^  ([\w.-]+=<[^>]*>) ", text, re.MULTILINE))
        for _, text, _ in (run(*words.split(), "-o", "help") for run in (ours, qemu))
    )
    more = {"nocow=<bool (on/off)>", "extent_size_hint=<size>", "preallocation=<str>"}
    assert known and told - more == known - more - {"detached-header=<bool (on/off)>"}


@pytest.mark.parametrize(
    "words",
    ["create -f qcow2 -o help x 1M", "create -f raw -o ?", "convert -O qcow2 -o size=1,help"],
)
def test_help_makes_nothing(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = ours(*words.split())
    assert (status, err) == (0, "") and "size=<size>" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["create -f blah -o help", "convert -O vmdk -o help"])
def test_no_help_where_no_image_can_be_made(words: str) -> None:
    assert ours(*words.split())[0] == 1
