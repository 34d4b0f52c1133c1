"""Copies of many small pieces by way of a pipe: taken, the same bytes, nothing left in it."""

import errno
import os
import random

import pytest

from liveblockd.runtime.halting import HaltedError
from liveblockd.storage import copy_engine, hostcalls, many_requests, segments, splices
from liveblockd.storage.gate import gate_of
from liveblockd.storage.pages import Run
from liveblockd.storage.segments import Segment, copy_segments
from liveblockd.storage.splices import splice_runs

CLUSTER = 65536
PAGE = 4096


@pytest.fixture(autouse=True)
def able():
    if many_requests.context() is None or splices._fill is None:
        pytest.skip("no Linux AIO, or no splice(2)")
    copy_engine.no_clones.clear()
    copy_engine.unsupported.clear()


@pytest.fixture
def spliced(monkeypatch):
    """(runs asked for, runs copied) of each call."""
    done, real = [], splices.splice_runs

    def counting(runs, fd, gate):
        copied = real(runs, fd, gate)
        done.append((len(runs), copied))
        return copied

    monkeypatch.setattr(segments, "splice_runs", counting)
    return done


def content(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.parametrize("seed", range(6))
def test_runs_of_any_length_come_to_their_places(memory, monkeypatch, seed):
    """Side by side or not, longer than the pipe, in any order, while guests write or not."""
    rng = random.Random(seed)
    monkeypatch.setattr(splices, "_local", splices._Local())
    contents = [rng.randbytes(400 * PAGE) for _ in range(3)]
    sources = [memory(data) for data in contents]
    model = bytearray(rng.randbytes(20 * PAGE))
    target = memory(bytes(model))
    gate = gate_of(target)
    runs, position = [], 0
    for _ in range(80):
        number, count = rng.randrange(3), rng.choice((1, 2, 16, 16, 64, 390))
        at = PAGE * rng.randrange(400 - count)
        position += PAGE * rng.choice((0, 0, 1))
        runs.append(Run(sources[number], at, position, count * PAGE))
        end = position + count * PAGE
        model.extend(bytes(max(0, end - len(model))))
        model[position:end] = contents[number][at : at + count * PAGE]
        position = end
    if seed % 2:
        rng.shuffle(runs)
    for part in range(0, len(runs), 20):
        gate.writes += seed % 3  # small pieces for guests
        assert splice_runs(runs[part : part + 20], target, gate) == 20
    assert content(target) == bytes(model)
    first = splices._local.pipe
    assert first is not None
    assert os.fstat(first._out)
    os.set_blocking(first._out, False)
    with pytest.raises(BlockingIOError):
        os.read(first._out, 1)


def test_what_is_not_there_ends_it_and_empties_the_pipe(memory):
    """The next copy must not begin with the bytes of one that failed."""
    good, short = memory(b"g" * 4 * CLUSTER), memory(b"s" * (CLUSTER // 2))
    target = memory()
    runs = [Run(good, 0, 0, CLUSTER), Run(short, 0, CLUSTER, CLUSTER), Run(good, 0, 9, CLUSTER)]
    assert splice_runs(runs[:2], target, gate_of(target)) == 1
    assert splices._local.pipe is None
    assert splice_runs(runs[2:], target, gate_of(target)) == 0, "not whole pages"
    assert splice_runs(runs[:1], target, gate_of(target)) == 1
    assert os.pread(target, CLUSTER, 0) == b"g" * CLUSTER


def test_a_target_without_room_ends_it(memory):
    source = memory(b"x" * 4 * CLUSTER)
    target = os.open("/dev/full", os.O_WRONLY)
    try:
        runs = [Run(source, n * CLUSTER, n * CLUSTER, CLUSTER) for n in range(3)]
        splice_runs(runs, memory(), gate_of(source))
        open_fds = len(os.listdir("/proc/self/fd"))
        assert splice_runs(runs, target, gate_of(source)) < 3
        assert len(os.listdir("/proc/self/fd")) <= open_fds - 2, "the pipe is closed"
    finally:
        os.close(target)


def segments_of(source, count):
    return [
        Segment(source, (count - 1 - n) * CLUSTER, n * CLUSTER, CLUSTER, False, 0)
        for n in range(count)
    ]


@pytest.mark.parametrize("way", ["spliced", "no pipe", "half"])
def test_many_segments_are_spliced_or_copied_otherwise(memory, monkeypatch, spliced, way):
    rng = random.Random(3)
    data = [rng.randbytes(CLUSTER - 1) + b"\1" for _ in range(30)]
    data[7] = bytes(CLUSTER)
    source, target = memory(b"".join(data)), memory()
    if way == "no pipe":
        monkeypatch.setattr(splices, "LEAST_CAPACITY", 1 << 40)
    elif way == "half":
        real = splices._drain
        calls = []

        def drain(*arguments):
            calls.append(arguments)
            return -1 if len(calls) == 2 else real(*arguments)

        monkeypatch.setattr(splices, "_drain", drain)
    copied = copy_segments(segments_of(source, 30), target, CLUSTER)
    assert copied.zero.nonzero()[0].tolist() == [22]
    expected = b"".join(reversed(data))
    assert content(target) == expected
    asked, done = spliced[0]
    assert asked == 29
    assert (done == asked) == (way == "spliced")


def test_long_runs_are_left_to_one_call_each(memory, spliced):
    source, target = memory(os.urandom(32 * CLUSTER)), memory()
    long = Segment(source, 0, 0, 32 * CLUSTER, False, 0)
    copy_segments([long], target, CLUSTER)
    assert content(target) == content(source)
    assert not spliced


def test_nobody_holds_the_gil_for_a_disk(memory, spliced):
    """Only what is known to be in memory is put into the pipe."""
    source, target = memory(os.urandom(8 * CLUSTER)), memory()
    for flags in (None, os.RWF_NOWAIT):
        batch = [segment._replace(read_flags=flags) for segment in segments_of(source, 8)]
        copy_segments(batch, target, CLUSTER)
    assert not spliced


def test_whether_files_can_be_cloned_is_asked_once_before_a_batch(memory, monkeypatch):
    asked = []
    real = segments.clone
    monkeypatch.setattr(segments, "clone", lambda *a: asked.append(a) or real(*a))
    alone = []
    monkeypatch.setattr(segments, "clone_or_copy", lambda *a: alone.append(a))
    source, target = memory(os.urandom(8 * CLUSTER)), memory()
    for _ in range(2):
        copy_segments(segments_of(source, 8), target, CLUSTER)
    assert len(asked) == 1
    assert not alone
    assert len(content(target)) == 8 * CLUSTER


def test_duplicates_are_not_for_child_processes(memory):
    fd = memory(b"x")
    other = hostcalls.duplicate(fd)
    try:
        assert other != fd
        assert os.pread(other, 1, 0) == b"x"
        assert not os.get_inheritable(other)
    finally:
        os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        hostcalls.duplicate(other)
    assert raised.value.errno == errno.EBADF


def test_a_halt_ends_it_between_two_writes(memory, monkeypatch):
    """The turn is given back, the pipe is not used again, and what comes next is right."""
    source, target = memory(os.urandom(40 * CLUSTER)), memory()
    asked = []

    def check():
        asked.append(None)
        if len(asked) == 2:
            raise HaltedError

    runs = [Run(source, n * CLUSTER, n * CLUSTER, CLUSTER) for n in range(40)]
    with monkeypatch.context() as patch:
        patch.setattr(splices.halting, "check", check)
        with pytest.raises(HaltedError):
            splice_runs(runs, target, gate_of(target))
    assert splices._local.pipe is None
    assert os.fstat(target).st_size < 40 * CLUSTER
    copy_segments(segments_of(source, 40), target, CLUSTER)
    expected = content(source)
    clusters = [expected[at : at + CLUSTER] for at in range(0, len(expected), CLUSTER)]
    assert content(target) == b"".join(reversed(clusters))
