"""``liveblockctl image`` beside qemu-img: same output, same JSON, same exit status, same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.imagetool import ours, qemu, qemu_io
from tests.support.qcow2_damage import make, make_damaged
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """a.qcow2 <- b.qcow2, r.raw with a hole and an odd end, and others; not to be changed."""
    path = tmp_path_factory.mktemp("images")
    before = Path.cwd()
    os.chdir(path)
    qemu("create", "-f", "qcow2", "a.qcow2", "4M")
    qemu_io(path / "a.qcow2", "write 0 128k", "write -z 1M 64k", "write -P 9 2M 128k",
            "write -z 2M 64k", "write -P 8 3M 1000")  # fmt: skip
    qemu("create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "6M")
    qemu_io(path / "b.qcow2", "write -P 3 3M 128k", "write -P 4 5M 64k", "write -z 64k 64k")
    qemu("create", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "old.qcow2", "1M")
    (path / "r.raw").write_bytes(os.urandom(1_000_000))
    os.truncate(path / "r.raw", 3_000_001)
    qemu("convert", "-c", "-O", "qcow2", "r.raw", "packed.qcow2")
    make(path / "small.qcow2")
    shutil.copy("small.qcow2", "snap.qcow2")
    qemu("snapshot", "-c", "one", "snap.qcow2")
    qemu("create", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "orphan.qcow2", "1M")
    yield path
    os.chdir(before)


COMMANDS = [
    "info a.qcow2", "info b.qcow2", "info old.qcow2", "info r.raw", "info packed.qcow2",
    "info --backing-chain b.qcow2", "info orphan.qcow2", "info -f raw a.qcow2", "info gone",
    "info -f qcow2 r.raw", "info --backing-chain orphan.qcow2",
    "check a.qcow2", "check old.qcow2", "check packed.qcow2", "check r.raw", "check gone",
    "check snap.qcow2", "check -f qcow2 small.qcow2", "check -U a.qcow2",
    "map a.qcow2", "map b.qcow2", "map r.raw", "map gone", "map small.qcow2", "map orphan.qcow2",
    "map -s 3M -l 70k b.qcow2", "map -s 60k old.qcow2",
    "compare a.qcow2 a.qcow2", "compare a.qcow2 b.qcow2", "compare -s a.qcow2 b.qcow2",
    "compare -f raw r.raw packed.qcow2", "compare a.qcow2 gone", "compare a.qcow2 r.raw",
    'map json:{"file.filename":"b.qcow2"}', 'map json:{"file":{"filename":"b.qcow2"}}',
    'info json:{"file":{"driver":"file","filename":"r.raw"}}',
    "compare -F raw a.qcow2 r.raw", "compare -q a.qcow2 b.qcow2", "compare old.qcow2 old.qcow2",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_same_words(images: Path, command: str) -> None:
    assert ours(*command.split()) == qemu(*command.split())


JSON = [
    "info a.qcow2", "info b.qcow2", "info old.qcow2", "info r.raw", "info packed.qcow2",
    "info --backing-chain b.qcow2", "info orphan.qcow2",
    "check a.qcow2", "check old.qcow2", "check packed.qcow2", "check snap.qcow2",
    "map a.qcow2", "map b.qcow2", "map r.raw", "map small.qcow2", "map packed.qcow2",
    "map old.qcow2", "map snap.qcow2", "map -s 3M -l 70k b.qcow2", "map -f raw a.qcow2",
]  # fmt: skip


@pytest.mark.parametrize("command", JSON)
def test_same_json(images: Path, command: str) -> None:
    words = [*command.split(), "--output=json"]
    found, expected = ours(*words), qemu(*words)
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert json.loads(found[1]) == json.loads(expected[1])


@pytest.mark.parametrize(
    "command",
    [
        "create -f qcow2 n.qcow2 10M", "create n.raw 12345", "create -f qcow2 n.qcow2 12345",
        "create -q -f qcow2 n.qcow2 1M", "create -f qcow2 n.qcow2", "create -f blah n 1M",
        "create -f qcow2 -o cluster_size=4k,refcount_bits=1 n.qcow2 1M",
        "create -f qcow2 -o compat=v2 n.qcow2 1M", "create -f qcow2 -o foo=1 n.qcow2 1M",
        "create -f qcow2 -o compat=v2,lazy_refcounts=on n.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts=on n.qcow2 1.5G",
        "create -f qcow2 -b base.qcow2 -F qcow2 n.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 n.qcow2 20M",
        "create -f qcow2 -b nothere -F qcow2 n.qcow2 1M",
        "create -f qcow2 -u -b nothere -F raw n.qcow2 1M",
        "create -f qcow2 n.qcow2 1X",
    ],
)  # fmt: skip
def test_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    found = []
    for run in (ours, qemu):
        directory = tmp_path / run.__name__
        directory.mkdir()
        monkeypatch.chdir(directory)
        qemu("create", "-f", "qcow2", "base.qcow2", "3M")
        answer = run(*command.split())
        words = answer[2].replace("qemu-img: ", "").split()
        left = sorted(p.name for p in directory.iterdir()) if answer[0] == 0 else []
        size = {}
        for path in directory.glob("n.*") if answer[0] == 0 else ():
            info = json.loads(qemu("info", "--output=json", path.name)[1])
            del info["actual-size"]
            size = info
            if info["format"] == "qcow2" and info.get("backing-filename") != "nothere":
                assert qemu("check", path.name)[0] == 0
        found.append((answer[0], answer[1], words, left, size))
    assert found[0] == found[1]


def test_info_lists_internal_snapshots_and_bitmaps(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "snap.qcow2"
    shutil.copy("snap.qcow2", path)
    qemu("bitmap", "--add", "-g", "4096", path, "b0")
    qemu("bitmap", "--add", "--disable", path, "b1")
    found, expected = ours("info", path)[1], qemu("info", path)[1]
    assert sorted(found.split()) == sorted(expected.split())  # columns are as wide as later QEMU's
    found, expected = (run("info", "--output=json", path)[1] for run in (ours, qemu))
    assert json.loads(found) == json.loads(expected)


def test_check_needs_no_backing_file(images: Path) -> None:
    assert qemu("check", "orphan.qcow2")[0] == 1
    assert ours("check", "orphan.qcow2")[0] == 0


def test_failed_create_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "n.qcow2"
    status, _, error = ours("create", "-f", "qcow2", "-o", "cluster_size=3k", path, "1M")
    assert status == 1 and "Cluster size" in error
    assert not path.exists()


@pytest.mark.parametrize("source", ["a.qcow2", "b.qcow2", "r.raw", "packed.qcow2", "small.qcow2"])
@pytest.mark.parametrize("form", ["raw", "qcow2", "qcow2,cluster_size=512", "qcow2,compat=0.10"])
def test_convert(images: Path, tmp_path: Path, source: str, form: str) -> None:
    form, _, option = form.partition(",")
    target = tmp_path / "target"
    options = ["-o", option] if option else []
    assert ours("convert", "-O", form, *options, source, target) == (0, "", "")
    assert qemu("compare", "-F", form, source, target)[:2] == (0, "Images are identical.\n")
    if form == "qcow2":
        assert qemu("check", "-f", "qcow2", target)[0] == 0
        check = json.loads(qemu("check", "--output=json", target)[1])
        # only where a table lies between
        assert check.get("fragmented-clusters", 0) <= check["allocated-clusters"] // 50
    beside = tmp_path / "beside"
    qemu("convert", "-O", form, *options, source, beside)
    assert os.stat(target).st_blocks <= os.stat(beside).st_blocks * 1.1 + 64


def test_convert_into_an_image_that_is_there(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.qcow2"
    qemu("create", "-f", "qcow2", target, "8M")
    qemu_io(target, "write -P 77 0 8M")
    assert ours("convert", "-n", "-O", "qcow2", "b.qcow2", target)[0] == 0
    raw = tmp_path / "raw"
    qemu("convert", "-O", "raw", target, raw)
    qemu("convert", "-O", "raw", "b.qcow2", tmp_path / "b")
    assert raw.read_bytes()[: 6 << 20] == (tmp_path / "b").read_bytes()
    assert qemu("check", target)[0] == 0
    assert ours("convert", "-n", "-O", "qcow2", "b.qcow2", images / "old.qcow2")[0] == 1


def test_convert_with_backing_file_keeps_zeros(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.qcow2"
    words = ("-O", "qcow2", "-B", images / "a.qcow2", "-F", "qcow2", "b.qcow2", target)
    assert ours("convert", *words)[0] == 0
    assert qemu("compare", "b.qcow2", target)[0] == 0


def test_convert_refuses(images: Path, tmp_path: Path) -> None:
    assert ours("convert", "-O", "blah", "a.qcow2", tmp_path / "x")[0] == 1
    assert ours("convert", "-O", "qcow2", "gone", tmp_path / "x")[0] == 1
    assert ours("convert", "-O", "raw", "a.qcow2", tmp_path / "no" / "x")[0] == 1
    assert not list(tmp_path.iterdir())


def test_progress(images: Path, tmp_path: Path) -> None:
    status, out, _ = ours("convert", "-p", "-O", "qcow2", "b.qcow2", tmp_path / "x")
    assert status == 0
    assert out.startswith("    (0.00/100%)\r") and out.endswith("    (100.00/100%)\r\n")


@pytest.mark.parametrize("size", ["8M", "+1M", "2M", "-1M"])
@pytest.mark.parametrize("shrink", [(), ("--shrink",)])
def test_resize(images: Path, tmp_path: Path, size: str, shrink: tuple[str, ...]) -> None:
    one, two = tmp_path / "one" / "i.qcow2", tmp_path / "two" / "i.qcow2"
    for path in (one, two):
        path.parent.mkdir()
        shutil.copy("a.qcow2", path)
    found = ours("resize", *shrink, one, size)
    expected = qemu("resize", *shrink, two, size)
    assert found[:2] == expected[:2]
    assert qemu("compare", "-s", one, two)[0] == 0
    assert qemu("check", one)[0] == 0


def test_repair_in_place(images: Path, tmp_path: Path) -> None:
    for name in ("refcount too high", "dirty, refcounts lost", "L2 table shared"):
        found = []
        for run in (ours, qemu):
            image = make_damaged(tmp_path / "i.qcow2", images / "small.qcow2", name)
            status, out, _ = run("check", "-r", "all", image.path)
            found.append((status, out.split("Image end offset")[0]))
            assert qemu("check", image.path)[0] == 0
        assert found[0] == found[1]


def test_locks(images: Path, tmp_path: Path) -> None:
    """Whoever writes to an image keeps everybody else away, but for -U."""
    path = tmp_path / "locked.qcow2"
    shutil.copy("a.qcow2", path)
    fd = os.open(path, os.O_RDWR)
    try:
        for byte in (101, 201):  # writes, and lets nobody else write
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        for words in (("info",), ("check",), ("map",), ("check", "-r", "all")):
            assert ours(*words, path) == qemu(*words, path)
            assert ours(*words, path)[0] == 1
        assert ours("info", "-U", path) == qemu("info", "-U", path)
        assert ours("check", "-U", path) == qemu("check", "-U", path)
        before = path.read_bytes()
        assert ours("check", "-U", "-r", "all", path)[0] == 1
        assert ours("resize", path, "9M")[0] == 1
        assert ours("create", "-f", "qcow2", path, "1M")[0] == 1
        assert ours("convert", "-O", "qcow2", "a.qcow2", path)[0] == 1
        assert path.read_bytes() == before
    finally:
        os.close(fd)


def test_backing_chain_with_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, below in (("x.qcow2", "y.qcow2"), ("y.qcow2", "x.qcow2")):
        qemu("create", "-f", "qcow2", "-u", "-b", below, "-F", "qcow2", name, "1M")
    words = ("info", "--backing-chain", "x.qcow2")
    assert ours(*words) == qemu(*words)
    assert ours("map", "x.qcow2")[0] == 1


def test_wrong_usage() -> None:
    assert ours("info")[0] == 1
    assert ours("blah")[0] == 1


@pytest.mark.parametrize(
    "written",
    ['{"file.driver":"file","file.filename":"a"}', '{"file":{"filename":"a"}}',
     '{"file.filename":"a","driver":"qcow2"}'],
)  # fmt: skip
def test_backing_files_by_json_without_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu("create", "-f", "qcow2", "a", "4M")
    qemu_io("a", "write 1M 64k")
    for stated in ("-F qcow2", ""):
        words = [*stated.split(), "b", "4M"]
        ours("create", "-q", "-u", "-f", "qcow2", "-b", f"json:{written}", *words)
        assert '"depth": 1' in ours("map", "--output=json", "b")[1]
        assert ours("map", "b") == qemu("map", "b")


@pytest.mark.parametrize("name", ["{}", '{"file":7}', '{"file":[]}', '{"driver":[]}', "[]"])
def test_json_names_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ours("create", "-q", "-u", "-f", "qcow2", "-b", f"json:{name}", "-F", "qcow2", "b", "4M")
    for words in (["map", "b"], ["info", f"json:{name}"], ["check", f"json:{name}"]):
        status, _, error = ours(*words)
        assert status == 1 and "Could not open" in error


def test_map_names_the_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qemu("create", "-f", "qcow2", "-o", "data_file=d", "a", "4M")
    qemu("create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "b")
    qemu_io("a", "write 1M 64k")
    qemu_io("b", "write 2M 64k")
    for name in ("a", "b"):
        assert ours("map", name) == qemu("map", name)


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("kept", [2, 5, 20])
def test_a_repair_leaves_the_place_of_what_was_cut_off(
    tmp_path: Path, cluster_size: int, kept: int
) -> None:
    """New refcounts where entries refer to would be overwritten by the guest."""
    path = tmp_path / "a"
    qemu("create", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, "16M")
    qemu_io(path, "write -P 1 0 1M", "write -P 2 3M 100k")
    os.truncate(path, kept * cluster_size + 100)
    with path.open("r+b") as file:  # the refcounts are gone
        file.seek(cluster_size)
        file.write(struct.pack(">Q", 1))
    assert ours("check", "-r", "all", path)[0] == 0
    assert qemu("check", path)[0] == 0
    qemu_io(path, "write -P 3 0 4M")
    assert qemu("check", path)[0] == 0


@pytest.mark.parametrize("words", ["", "-u"])
@pytest.mark.parametrize("new, backing", [("a", "a"), ("a", "link"), ("link", "a")])
def test_no_image_is_its_own_backing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, new: str, backing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    qemu("create", "-f", "qcow2", "a", "4M")
    qemu_io("a", "write 1M 64k")
    os.symlink("a", "link")
    before = Path("a").read_bytes()
    refused = ours("create", *words.split(), "-f", "qcow2", "-b", backing, "-F", "qcow2", new, "4M")
    assert refused[0] == 1 and "same filename as the backing file" in refused[2]
    assert Path("a").read_bytes() == before


def test_who_writes_to_what_was_taken_for_raw_is_warned(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_bytes(bytes(1 << 20))
    assert "WARNING" in ours("resize", path, "2M")[2]
    assert "WARNING" in qemu("resize", path, "3M")[2]
    assert ours("resize", "-f", "raw", path, "4M") == qemu("resize", "-f", "raw", path, "4M")
