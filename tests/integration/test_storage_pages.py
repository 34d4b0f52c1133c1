"""Copies straight into the pages of a file in memory: taken beside a write, and the same bytes."""

import errno
import os
import random
import subprocess
import tempfile
import threading

import pytest

from liveblockd.storage import copy_engine, hostcalls, many_requests, pages
from liveblockd.storage.copy_engine import copy_nonzero
from liveblockd.storage.gate import gate_of
from liveblockd.storage.pages import Run, read_into_pages, takes_pages
from liveblockd.storage.segments import Segment, copy_segments

CLUSTER = 65536


@pytest.fixture(autouse=True)
def forget():
    if many_requests.context() is None:
        pytest.skip("no Linux AIO here")
    copy_engine.no_clones.clear()
    copy_engine.unsupported.clear()
    yield
    copy_engine.no_clones.clear()
    copy_engine.unsupported.clear()
    assert pages.places.acquire(blocking=False), "a place was not given back"
    pages.places.release()


def content(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.fixture
def read(monkeypatch):
    """Bytes that came to their pages like this."""
    done, real = [], pages._read_window

    def counting(runs, fd):
        found = real(runs, fd)
        done.append(sum(run.length for run in runs) if found else 0)
        return found

    monkeypatch.setattr(pages, "_read_window", counting)
    return done


@pytest.mark.parametrize("seed", range(4))
def test_runs_of_any_size_come_to_their_places(memory, monkeypatch, seed):
    """More than one call takes, longer than a window, in any order, over what is there."""
    rng = random.Random(seed)
    monkeypatch.setattr(pages, "WINDOW", rng.choice((CLUSTER, 5 * CLUSTER, 8 << 20)))
    contents = [rng.randbytes(30 * CLUSTER) for _ in range(3)]
    sources = [memory(data) for data in contents]
    model = bytearray(rng.randbytes(20 * CLUSTER))
    target = memory(bytes(model))
    model.extend(bytes(700 * CLUSTER))
    runs, position = [], 0
    for _ in range(300 if seed else 2):
        number, count = rng.randrange(3), rng.choice((1, 1, 2, 7))
        at = rng.randrange(30 * CLUSTER - count * CLUSTER)
        position += CLUSTER * rng.choice((0, 0, 1))
        if position + count * CLUSTER > len(model):
            break
        runs.append(Run(sources[number], at, position, count * CLUSTER))
        model[position : position + count * CLUSTER] = contents[number][at : at + count * CLUSTER]
        position += count * CLUSTER
    size = max(position, 20 * CLUSTER)
    rng.shuffle(runs)
    assert takes_pages(target) and read_into_pages(runs, target)
    assert content(target) == model[:size]


def test_what_is_no_file_in_memory_takes_no_pages(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    reader, writer = os.pipe()
    try:
        assert takes_pages(fd) == hostcalls.is_in_memory(fd)
        assert not takes_pages(writer)
    finally:
        for each in (fd, reader, writer):
            os.close(each)


def test_who_finds_a_writer_at_work_goes_beside_it(memory, read):
    """With the turn of the file taken a copy ends all the same; the bytes are those of a write."""
    data = b"".join(
        bytes(CLUSTER) if n % 5 == 2 else bytes(8) * (n % 3 == 0) + os.urandom(CLUSTER - 8)
        for n in range(40)
    ).ljust(40 * CLUSTER, b"x")
    source, target, twin = memory(data), memory(), memory()
    with gate_of(target).turn:
        full = memory(random.Random(1).randbytes(16 * CLUSTER))
        assert not copy_nonzero(full, 0, target, 0, 16 * CLUSTER, CLUSTER).any()
        assert sum(read) == 16 * CLUSTER and content(target) == content(full)
        found = copy_nonzero(source, 0, target, 0, len(data), CLUSTER)
    assert sum(read) > 20 * CLUSTER
    before = sum(read)
    assert found.tolist() == copy_nonzero(source, 0, twin, 0, len(data), CLUSTER).tolist()
    assert sum(read) == before, "nobody was in the way"
    for number, zero in enumerate(found):
        part = slice(number * CLUSTER, (number + 1) * CLUSTER)
        assert zero or content(target)[part] == content(twin)[part] == data[part]


def test_segments_go_beside_a_writer_too(memory, read):
    rng = random.Random(2)
    contents = [
        b"".join(rng.randbytes(CLUSTER) if rng.random() < 0.8 else bytes(CLUSTER) for _ in range(9))
        for _ in range(20)
    ]
    sources = [memory(data) for data in contents]
    target, twin = memory(), memory()
    batch, position = [], 0
    for _ in range(100):
        count = rng.choice((1, 2, 3))
        at = rng.randrange(9 - count) * CLUSTER
        batch.append(Segment(rng.choice(sources), at, position, count * CLUSTER, False, 0))
        position += count * CLUSTER
    copy_segments(batch[:1], twin, CLUSTER)  # learns that nothing can be cloned
    with gate_of(target).turn:
        got = copy_segments(batch, target, CLUSTER)
    assert sum(read) > 30 * CLUSTER
    assert got.zero.tolist() == copy_segments(batch, twin, CLUSTER).zero.tolist()
    assert content(target) == content(twin)


def test_no_more_than_there_are_processors_for(memory, read):
    """The others wait for their turn, and the bytes are there."""
    data = random.Random(3).randbytes(8 * CLUSTER)
    source, target = memory(data), memory()
    taken = 0
    while pages.places.acquire(blocking=False):
        taken += 1
    turn = gate_of(target).turn
    turn.acquire()
    copy = threading.Thread(target=copy_nonzero, args=(source, 0, target, 0, len(data), CLUSTER))
    copy.start()
    copy.join(0.1)
    assert copy.is_alive() and not read
    turn.release()
    copy.join(30)
    for _ in range(taken):
        pages.places.release()
    assert not copy.is_alive() and taken and not read and content(target) == data


@pytest.mark.parametrize("missing", ["source", "aio", "grow", "mmap"])
def test_what_fails_is_copied_as_ever(memory, monkeypatch, missing):
    data = random.Random(4).randbytes(8 * CLUSTER)
    source, target = memory(data), memory()
    if missing == "source":  # it is shorter than was asked for
        assert not read_into_pages([Run(source, 0, 0, 9 * CLUSTER)], target)
        return
    if missing == "aio":
        monkeypatch.setattr(pages, "context", lambda: None)
    elif missing == "grow":

        def no_space(*_):
            raise OSError(errno.ENOSPC, "no")

        monkeypatch.setattr(hostcalls, "grow", no_space)
    else:
        monkeypatch.setattr(pages, "_mmap", lambda *_: pages._FAILED)
    turn = gate_of(target).turn
    turn.acquire()
    copy = threading.Thread(target=copy_nonzero, args=(source, 0, target, 0, len(data), CLUSTER))
    copy.start()
    copy.join(0.05)
    turn.release()
    copy.join(30)
    assert not copy.is_alive() and content(target) == data


def test_a_full_file_system_is_an_error_and_no_signal():
    """Pages that are not to be had when the kernel stores into them: told as ENOSPC by a write."""
    if os.geteuid() != 0:
        pytest.skip("a file system of its own wants root")
    with tempfile.TemporaryDirectory() as directory:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory],
            capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        if mounted.returncode:
            pytest.skip("no mount of a tmpfs")
        source = os.memfd_create("source")
        target = os.open(os.path.join(directory, "target"), os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(source, os.urandom(4 << 20), 0)
            assert takes_pages(target)
            assert not read_into_pages([Run(source, 0, 0, 4 << 20)], target)
            assert content(target)[: 8 * CLUSTER] == os.pread(source, 8 * CLUSTER, 0)
            with pytest.raises(OSError, match="No space left"):
                copy_nonzero(source, 0, target, 0, 4 << 20, CLUSTER)
            # What is cut off while it is mapped is an error of the read as well.
            os.ftruncate(target, 0)
            real = many_requests.Context.read

            def cut(self, *arguments):
                os.ftruncate(target, CLUSTER)
                return real(self, *arguments)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(many_requests.Context, "read", cut)
                assert not read_into_pages([Run(source, 0, 0, 8 * CLUSTER)], target)
        finally:
            os.close(source)
            os.close(target)
            subprocess.run(["umount", directory], capture_output=True, timeout=30, check=False)
