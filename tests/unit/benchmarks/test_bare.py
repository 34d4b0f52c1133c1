"""Copies without a daemon, to which streams are compared, copy all of it."""

import os
import random
from pathlib import Path

import pytest

from benchmarks import bare
from benchmarks.bare import WAYS, Copier, Piece, Work
from benchmarks.registry import CannotRun

SIZE = 3 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def work_of(source: Path) -> Work:
    """Pieces out of order, the last one short of a whole number of clusters."""
    half = SIZE // 2
    pieces = [Piece(source, half, half, 0), Piece(source, 0, half - 4096, half)]
    return Work(pieces, bare.rest_of(source, pieces), 3)


def all_ways():
    return [(place, name) for place, ways in WAYS.items() for name in ways]


@pytest.mark.parametrize(("place", "way"), all_ways())
def test_each_way_copies_all(source: Path, tmp_path: Path, monkeypatch, place: str, way: str):
    found = []

    def kept(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            found.append(path.read_bytes())
            os.unlink(path)

    monkeypatch.setattr(Path, "unlink", kept)
    copier = Copier(place, durable=place != "tmpfs")
    try:
        assert copier.seconds(work_of(source), tmp_path / "target", way) > 0
    except CannotRun:
        pytest.skip("not on this file system")
    data = source.read_bytes()
    copied = data[SIZE // 2 :] + data[: SIZE // 2 - 4096]
    assert found == [copied + bytes(3 * 4096)]
    assert copier.way == way


def test_what_is_read_besides_is_the_rest(source: Path):
    work = work_of(source)
    assert work.read == [Piece(source, SIZE // 2 - 4096, 4096, 0)]
    assert bare.rest_of(source, [Piece(source, 4096, 10, 0)]) == [Piece(source, 0, 4096, 0)]


def test_a_way_that_is_not_there_is_left_out(source: Path, tmp_path: Path, monkeypatch):
    def missing(*_: object) -> None:
        raise OSError("no such call")

    monkeypatch.setattr(bare.os, "copy_file_range", missing)
    copier = Copier("disk", durable=True)
    assert copier.seconds(work_of(source), tmp_path / "target") > 0
    assert copier.way.startswith("pread")
    monkeypatch.setattr(bare.os, "pwritev", missing)
    with pytest.raises(CannotRun):
        copier.seconds(work_of(source), tmp_path / "target")
    assert not (tmp_path / "target").exists()
