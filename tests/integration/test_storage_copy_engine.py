"""Copies by descriptor between real files, with every means the host may lack."""

import errno
import fcntl
import os
import random
import shutil
import tempfile
import threading

import numpy as np
import pytest

from liveblockd.storage import copy_engine
from liveblockd.storage import gate as gate_module
from liveblockd.storage import segments as segments_module
from liveblockd.storage.copy_engine import (
    CopyMethod,
    copy_extent,
    copy_nonzero,
    is_zero,
)
from liveblockd.storage.gate import LARGE_PIECE, PIECE, gate_of
from liveblockd.storage.segments import Segment, copy_segments

CLUSTER = 65536


@pytest.fixture(autouse=True)
def forget():
    copy_engine.unsupported.clear()
    copy_engine.no_clones.clear()
    yield
    copy_engine.unsupported.clear()
    copy_engine.no_clones.clear()


@pytest.fixture
def make(tmp_path):
    fds, shm = [], []

    def one(content=b"", *, tmpfs=False, flags=0):
        directory = str(tmp_path)
        if tmpfs:
            if not os.access("/dev/shm", os.W_OK):
                pytest.skip("no /dev/shm")
            directory = tempfile.mkdtemp(dir="/dev/shm")
            shm.append(directory)
        path = os.path.join(directory, f"file{len(fds)}")
        with open(path, "wb") as file:
            file.write(content)
        fds.append(os.open(path, os.O_RDWR | flags))
        return fds[-1]

    yield one
    for fd in fds:
        os.close(fd)
    for directory in shm:
        shutil.rmtree(directory)


def content(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0)


def without(monkeypatch, *methods, number=errno.EOPNOTSUPP):
    def unsupported(*_, **__):
        raise OSError(number, "no")

    if "clone" in methods:
        monkeypatch.setattr(fcntl, "ioctl", unsupported)
    if "range" in methods:
        monkeypatch.setattr(os, "copy_file_range", unsupported)


@pytest.mark.parametrize("missing", [(), ("clone",), ("clone", "range")])
@pytest.mark.parametrize("tmpfs", [False, True])
@pytest.mark.parametrize(
    ("source_at", "target_at", "length"),
    [(0, 0, 1 << 20), (4096, 65536, 3 << 20), (5, 777, 100001), (0, 0, 0), (1 << 20, 0, 4096)],
)
def test_copies(make, monkeypatch, missing, tmpfs, source_at, target_at, length):
    without(monkeypatch, *missing)
    data = random.Random(3).randbytes(4 << 20)
    source, target = make(data), make(b"T" * 100, tmpfs=tmpfs)
    method = copy_extent(source, source_at, target, target_at, length)
    if len(missing) == 2:
        assert method is CopyMethod.READ_WRITE
    want = bytearray(b"T" * 100)
    if length:
        want += bytes(max(target_at + length - 100, 0))
        want[target_at : target_at + length] = data[source_at : source_at + length]
    assert content(target) == bytes(want)


@pytest.mark.parametrize("missing", [(), ("clone", "range")])
def test_past_the_end_of_the_source_there_are_zeros(make, monkeypatch, missing):
    without(monkeypatch, *missing)
    source, target = make(b"S" * 5000), make(b"T" * 16384)
    copy_extent(source, 0, target, 0, 12288)
    assert content(target) == b"S" * 5000 + bytes(7288) + b"T" * 4096


def test_holes_are_copied_as_zeros(make):
    source, target = make(), make(b"T" * (1 << 20))
    os.ftruncate(source, 1 << 20)
    os.pwrite(source, b"S" * 4096, 8192)
    copy_extent(source, 0, target, 0, 1 << 20)
    assert content(target) == bytes(8192) + b"S" * 4096 + bytes((1 << 20) - 12288)


def test_within_one_file(make):
    fd = make(b"S" * 65536)
    copy_extent(fd, 0, fd, 65536, 65536)
    assert content(fd) == b"S" * 131072


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.EIO])
def test_what_goes_no_further_is_taken_over(make, monkeypatch, number):
    """copy_file_range does one and a half blocks, then fails."""
    real = os.copy_file_range
    calls = []

    def short(source, target, count, at, to):
        calls.append(count)
        if len(calls) > 1:
            raise OSError(number, "no")
        return real(source, target, 6000, at, to)

    without(monkeypatch, "clone")
    monkeypatch.setattr(os, "copy_file_range", short)
    data = os.urandom(300000)
    source, target = make(data), make()
    assert copy_extent(source, 0, target, 0, len(data)) is CopyMethod.READ_WRITE
    assert content(target) == data


def test_a_means_that_is_never_there_is_tried_once(make, monkeypatch):
    calls = []

    def refusing(*_):
        calls.append(1)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(fcntl, "ioctl", refusing)
    source, target = make(b"S" * 8192), make()
    for _ in range(3):
        copy_extent(source, 0, target, 0, 8192)
    assert len(calls) == 1


def test_short_transfers_are_continued(make, monkeypatch):
    without(monkeypatch, "clone", "range")
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:4097], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:5001]], at))
    data = os.urandom(100000)
    source, target = make(data), make()
    copy_extent(source, 0, target, 0, 100000)
    monkeypatch.undo()
    assert content(target) == data


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_errors_surface(make, monkeypatch, number):
    def failing(*_):
        raise OSError(number, "injected")

    without(monkeypatch, "clone", "range", number=number)
    monkeypatch.setattr(os, "pwrite", failing)
    source, target = make(b"S" * 8192), make()
    for call in (
        lambda: copy_extent(source, 0, target, 0, 8192),
        lambda: copy_nonzero(source, 0, target, 0, 8192, 4096),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == number


@pytest.mark.parametrize("cluster", [512, 4096, CLUSTER, 2 << 20, 4 << 20])
@pytest.mark.parametrize("tail", [0, 5, 700])
def test_copy_nonzero(make, cluster, tail):
    seed = cluster + tail
    choose = random.Random(seed)
    clusters = max((6 << 20) // cluster // (1 if cluster > 4096 else 4), 3)
    data = bytearray(clusters * cluster + tail)
    want = []
    for i in range(-(-len(data) // cluster)):
        size = min(cluster, len(data) - i * cluster)
        filled = choose.random() < 0.5
        if filled:  # one byte anywhere decides
            data[i * cluster + choose.choice([0, size - 1, choose.randrange(size)])] = 1
        want.append(not filled)
    source, target = make(b"#" * 4096 + data), make(b"T" * (8192 + len(data)))
    got = copy_nonzero(source, 4096, target, 8192, len(data), cluster)
    assert got.dtype == np.bool_ and got.tolist() == want, seed
    expected = bytearray(b"T" * (8192 + len(data)))
    for i, zero in enumerate(want):
        if not zero:
            part = data[i * cluster : (i + 1) * cluster]
            expected[8192 + i * cluster : 8192 + i * cluster + len(part)] = part
    assert content(target) == expected, seed


def test_copy_nonzero_past_the_end_and_of_nothing(make):
    source, target = make(b"S" * 100), make()
    assert copy_nonzero(source, 0, target, 0, 3 * 4096, 4096).tolist() == [False, True, True]
    assert content(target) == b"S" * 100 + bytes(3996)
    assert copy_nonzero(source, 0, target, 0, 0, 4096).tolist() == []


def test_direct_descriptors(make):
    try:
        data = bytes(CLUSTER) + os.urandom(CLUSTER) + bytes(CLUSTER)
        source, target = make(data, flags=os.O_DIRECT), make(flags=os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT here")
    assert copy_nonzero(source, 0, target, 0, len(data), CLUSTER).tolist() == [True, False, True]
    copy_engine._read_write(source, CLUSTER, target, 0, CLUSTER)
    buffer = copy_engine.hostcalls.aligned_buffer(CLUSTER)
    os.preadv(target, [buffer], 0)
    assert buffer == data[CLUSTER : 2 * CLUSTER]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4096, 65536, 65543])
def test_is_zero(length):
    data = bytearray(length)
    assert is_zero(data) and is_zero(bytes(data)) and is_zero(memoryview(data))
    for at in {0, length // 2, length - 1} if length else ():
        data[at] = 0x80
        assert not is_zero(data)
        data[at] = 0


def emulate_clone(monkeypatch):
    """FICLONERANGE as XFS does it: whole blocks, nothing past the end of the source."""
    cloned = []

    def ioctl(fd, request, argument):
        assert request == copy_engine.FICLONERANGE
        source, source_offset, length, offset = copy_engine._CLONE_RANGE.unpack(argument)
        if source_offset + length > os.fstat(source).st_size:
            raise OSError(errno.EINVAL, "past the end")
        os.pwrite(fd, os.pread(source, length, source_offset), offset)
        cloned.append(length)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return cloned


def test_a_source_that_ends_early_is_cloned_as_far_as_it_goes(make, monkeypatch):
    cloned = emulate_clone(monkeypatch)
    data = random.Random(5).randbytes(5 * CLUSTER + 4096)
    source, target = make(data), make()
    transfer = copy_engine.Transfer(source, 0, target, CLUSTER, 8 * CLUSTER, CLUSTER)
    got = copy_engine.clone_or_copy(transfer)
    assert cloned == [5 * CLUSTER] and got.cloned == 5 * CLUSTER
    assert got.zero.tolist() == [False] * 6 + [True] * 2
    assert content(target)[CLUSTER:].rstrip(b"\0") == data.rstrip(b"\0")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL])
def test_a_clone_that_cannot_be_is_tried_again_only_if_it_may_succeed(make, monkeypatch, number):
    calls = []

    def ioctl(*_):
        calls.append(1)
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    data = random.Random(6).randbytes(4 * CLUSTER)
    source, target = make(data), make()
    for _ in range(3):
        transfer = copy_engine.Transfer(source, 0, target, 0, len(data), CLUSTER)
        assert copy_engine.clone_or_copy(transfer).cloned == 0
    assert len(calls) == (1 if number == errno.EXDEV else 3)
    assert content(target) == data


def test_the_disk_is_told_to_begin_with_every_byte_that_was_written(make, monkeypatch):
    told = []
    monkeypatch.setattr(
        copy_engine.hostcalls, "start_writeback", lambda *arguments: told.append(arguments)
    )
    monkeypatch.setattr(copy_engine, "WRITEBACK_PIECE", 2 << 20)
    source, target = make(random.Random(8).randbytes(5 << 20)), make()
    copy_nonzero(source, 0, target, 4096, 5 << 20, CLUSTER)
    assert [(offset, length) for _, offset, length in told] == [
        (4096, 2 << 20), (4096 + (2 << 20), 2 << 20), (4096 + (4 << 20), 1 << 20),
    ]  # fmt: skip


def test_write_back_of_what_has_none_is_no_error(make):
    reader, writer = os.pipe()
    copy_engine.hostcalls.start_writeback(writer, 0, 4096)
    copy_engine.hostcalls.start_writeback(make(b"x" * 4096), 0, 1 << 20)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("seed", range(4))
def test_copy_segments(make, seed):
    """Small and large ones, in one batch, give the same as each by itself."""
    rng = random.Random(seed)
    clusters = 80
    data = b"".join(
        bytes(CLUSTER) if rng.random() < 0.3 else rng.randbytes(CLUSTER) for _ in range(clusters)
    )
    source = make(data)
    sizes = [rng.choice((1, 1, 2, 5, 20)) for _ in range(30)]
    target, twin = make(), make()
    segments, expected, position = [], [], 0
    for count in sizes:
        at = rng.randrange(clusters - count + 1) * CLUSTER
        position += CLUSTER * rng.choice((0, 0, 0, 1))  # mostly side by side
        segments.append(Segment(source, at, position, count * CLUSTER))
        expected += copy_nonzero(source, at, twin, position, count * CLUSTER, CLUSTER).tolist()
        position += count * CLUSTER
    got = copy_segments(segments, target, CLUSTER)
    assert got.zero.tolist() == expected and not got.cloned
    assert os.pread(target, position, 0) == os.pread(twin, position, 0)


def patterned(seed, clusters):
    """Clusters that are zeros, begin with zeros, end with them, are full; which are zeros."""
    rng = random.Random(seed)
    parts = []
    for _ in range(clusters):
        full = rng.randbytes(CLUSTER - 1) + b"x"
        late = bytearray(CLUSTER)
        late[rng.randrange(8, CLUSTER)] = 1
        parts.append(rng.choice((bytes(CLUSTER), bytes(late), full, full, full)))
    return b"".join(parts), [not any(part) for part in parts]


def in_kernel(monkeypatch):
    """What copy_file_range(2) is asked for: (source offset, bytes)."""
    asked = []
    real = os.copy_file_range

    def copy(source, target, count, at, to):
        asked.append((at, count))
        return real(source, target, count, at, to)

    monkeypatch.setattr(os, "copy_file_range", copy)
    return asked


@pytest.mark.parametrize("tmpfs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_copies_what_does_not_begin_with_zeros(make, monkeypatch, tmpfs, seed):
    """And the bytes are those of the copy through memory."""
    data, zero = patterned(seed, 40)
    at, to = 3 * CLUSTER, 7 * CLUSTER
    length = 30 * CLUSTER + 5000  # the last one is short
    source, target, twin = make(data, tmpfs=tmpfs), make(tmpfs=tmpfs), make(tmpfs=tmpfs)
    if copy_engine.first_words(source, 0, 1, CLUSTER) is None:
        pytest.skip("no first words here")
    monkeypatch.setattr(copy_engine, "WRITEBACK_PIECE", 8 * CLUSTER)  # several looks
    asked = in_kernel(monkeypatch)
    found = copy_nonzero(source, at, target, to, length, CLUSTER)
    begins = [any(data[n : n + 8]) for n in range(at, at + length, CLUSTER)]
    expected = [n * CLUSTER + at for n in range(len(begins)) if begins[n]]
    taken = [place for start, size in asked for place in range(start, start + size, CLUSTER)]
    assert taken == expected and expected
    without(monkeypatch, "range")
    assert found.tolist() == copy_nonzero(source, at, twin, to, length, CLUSTER).tolist()
    assert found.tolist()[:30] == zero[3:33]
    assert content(target) == content(twin)
    assert content(target)[to : to + 30 * CLUSTER] == data[at : at + 30 * CLUSTER]


@pytest.mark.parametrize("missing", ["words", "range"])
def test_where_the_kernel_cannot_the_bytes_go_through_memory(make, monkeypatch, missing):
    asked = in_kernel(monkeypatch)
    if missing == "words":
        monkeypatch.setattr(copy_engine, "first_words", lambda *_: None)
    else:
        without(monkeypatch, "range", number=errno.EXDEV)
    data, zero = patterned(7, 20)
    source, target = make(data), make()
    assert copy_nonzero(source, 0, target, 0, len(data), CLUSTER).tolist() == zero
    assert content(target) == data.rstrip(b"\0").ljust(len(content(target)), b"\0")
    assert not asked


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINTR])
def test_a_kernel_that_gives_up_half_way_is_taken_over(make, monkeypatch, number):
    data, zero = patterned(8, 20)
    source, target = make(data), make()
    real, calls = os.copy_file_range, []

    def short(source, target, count, at, to):
        calls.append(count)
        if len(calls) > 3:
            raise OSError(number, "no")
        return real(source, target, min(count, 70000), at, to)

    monkeypatch.setattr(os, "copy_file_range", short)
    if copy_engine.first_words(source, 0, 1, CLUSTER) is None:
        pytest.skip("no first words here")
    assert copy_nonzero(source, 0, target, 0, len(data), CLUSTER).tolist() == zero
    assert len(calls) == 4
    assert content(target) == data.rstrip(b"\0").ljust(len(content(target)), b"\0")


def test_past_the_end_of_the_source_are_zero_clusters(make):
    data = random.Random(9).randbytes(CLUSTER + 100)
    source, target = make(data), make()
    found = copy_nonzero(source, 0, target, 0, 4 * CLUSTER, CLUSTER)
    assert found.tolist() == [False, False, True, True]
    assert content(target) == data.ljust(2 * CLUSTER, b"\0")


def test_workers_take_turns_with_one_file(make):
    """None of them is left waiting, and all is copied."""
    data = random.Random(10).randbytes(64 * CLUSTER)
    source, target = make(data), make()

    def copy(first):
        for number in range(first, 64, 4):
            copy_nonzero(source, number * CLUSTER, target, number * CLUSTER, CLUSTER, CLUSTER)

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert content(target) == data
    assert not gate_of(target).turn.locked()


def test_copies_are_made_in_small_pieces_while_a_guest_writes(make, monkeypatch):
    """To the file that they fill, and only there; they come to the same bytes."""
    clusters = 2 * LARGE_PIECE // CLUSTER + 3
    data = random.Random(11).randbytes(clusters * CLUSTER)
    source, target = make(data), make()
    if copy_engine.first_words(source, 0, 1, CLUSTER) is None:
        pytest.skip("no first words here")
    calls, gate, real = [], gate_of(target), os.copy_file_range

    def noted(source, target, count, at, to):
        calls.append(count)
        return real(source, target, count, at, to)

    monkeypatch.setattr(os, "copy_file_range", noted)
    monkeypatch.setattr(gate_module, "WINDOW", 3600)
    gate._quiet_from, gate._seen = 0, gate.writes
    copy_nonzero(source, 0, target, 0, len(data), CLUSTER)
    if len(calls) < 3:
        pytest.skip("no copies in the kernel here")
    assert calls == [LARGE_PIECE, LARGE_PIECE, 3 * CLUSTER]
    calls.clear()
    os.ftruncate(target, 0)
    gate.writes += 1
    try:
        copy_nonzero(source, 0, target, 0, len(data), CLUSTER)
        assert calls == [PIECE] * (2 * LARGE_PIECE // PIECE) + [3 * CLUSTER]
        calls.clear()
        copy_segments([Segment(source, 0, 0, LARGE_PIECE)], target, CLUSTER)
        assert calls == [PIECE] * (LARGE_PIECE // PIECE)
    finally:
        gate._quiet_from = 0
    assert content(target) == data


def segments_of(rng, sources, total, pieces):
    """Pieces of ``sources`` for places side by side, or not."""
    found, position = [], 0
    for _ in range(pieces):
        count = rng.choice((1, 1, 2, 4))
        at = rng.randrange(total - count + 1) * CLUSTER
        position += CLUSTER * rng.choice((0, 0, 1))
        found.append(Segment(rng.choice(sources), at, position, count * CLUSTER))
        position += count * CLUSTER
    return found, position


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tmpfs", [False, True])
def test_the_kernel_copies_segments_without_zeros_in_front(make, monkeypatch, tmpfs, seed):
    """Of many files at a time; the others are looked at as ever, and the bytes are the same."""
    rng = random.Random(seed)
    contents = [patterned(seed * 10 + n, 12)[0] for n in range(5)]
    sources = [make(data, tmpfs=tmpfs) for data in contents]
    target, twin = make(tmpfs=tmpfs), make(tmpfs=tmpfs)
    if copy_engine.first_words(sources[0], 0, 1, CLUSTER) is None:
        pytest.skip("no first words here")
    segments, end = segments_of(rng, sources, 12, 150)
    without(monkeypatch, "clone")
    copy_segments(segments[:1], twin, CLUSTER)  # learns that nothing can be cloned
    asked = in_kernel(monkeypatch)
    told = []
    monkeypatch.setattr(
        copy_engine.hostcalls, "start_writeback", lambda *arguments: told.append(arguments)
    )
    got = copy_segments(segments, target, CLUSTER)
    expected = [
        (segment.source_offset, segment.length)
        for segment in segments
        if all(
            any(contents[sources.index(segment.source_fd)][at : at + 8])
            for at in range(segment.source_offset, segment.source_offset + segment.length, CLUSTER)
        )
    ]
    assert asked[: len(expected)] == expected and 20 < len(expected) < 130
    assert all(length < 4 * CLUSTER for _, length in asked[len(expected) :])  # parts of large ones
    begun = set()
    for _, offset, length in told:
        begun.update(range(offset, offset + length, CLUSTER))
    number = 0
    for segment in segments:
        for place in range(segment.offset, segment.offset + segment.length, CLUSTER):
            assert got.zero[number] or place in begun
            number += 1
    without(monkeypatch, "range")
    monkeypatch.setattr(segments_module, "first_words_of", lambda *_: None)
    assert got.zero.tolist() == copy_segments(segments, twin, CLUSTER).zero.tolist()
    assert os.pread(target, end, 0) == os.pread(twin, end, 0)


def test_segments_that_the_kernel_gives_up_are_taken_over(make, monkeypatch):
    real, calls = os.copy_file_range, []

    def short(source, target, count, at, to):
        calls.append(count)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "no")
        return real(source, target, min(count, 70000), at, to)

    data = random.Random(12).randbytes(16 * CLUSTER)
    source, target = make(data), make()
    if copy_engine.first_words(source, 0, 1, CLUSTER) is None:
        pytest.skip("no first words here")
    monkeypatch.setattr(os, "copy_file_range", short)
    without(monkeypatch, "clone")
    copy_extent(source, 0, make(), 0, CLUSTER)
    calls.clear()
    whole = [Segment(source, n * CLUSTER, (15 - n) * CLUSTER, CLUSTER) for n in range(16)]
    assert not copy_segments(whole, target, CLUSTER).zero.any()
    parts = [data[n * CLUSTER : (n + 1) * CLUSTER] for n in range(16)]
    assert content(target) == b"".join(reversed(parts)) and len(calls) >= 3
