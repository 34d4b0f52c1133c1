"""First words of clusters by one system call, on real files; None wherever that cannot be."""

import os
import random
import threading

import numpy as np
import pytest

from liveblockd.storage import many_requests as module
from liveblockd.storage.first_words import first_words
from liveblockd.storage.many_requests import MOST

STEP = 4096


def available():
    return module._NUMBERS is not None and module.context() is not None


@pytest.fixture(params=["directory", "memory"])
def fd(request, tmp_path):
    if not available():
        pytest.skip("no Linux AIO here")
    if request.param == "memory":
        found = os.memfd_create("words")
    else:
        found = os.open(tmp_path / "words", os.O_RDWR | os.O_CREAT)
    yield found
    os.close(found)


def given(fd, offset, count):
    """As plain reads say it; asked for first, so that it is in the page cache."""
    return [
        int.from_bytes(os.pread(fd, 8, offset + n * STEP).ljust(8, b"\0"), "little")
        for n in range(count)
    ]


def test_words(fd):
    rng = random.Random(1)
    for number in range(3 * MOST):
        os.pwrite(fd, rng.choice((bytes(8), rng.randbytes(8))), number * STEP)
    for offset, count in ((0, 1), (0, MOST), (8, MOST + 1), (5 * STEP, 2 * MOST + 7)):
        want = given(fd, offset, count)
        found = first_words(fd, offset, count, STEP)
        if found is None:
            pytest.skip("this file system has no RWF_NOWAIT")
        assert found.tolist() == want
    kept = first_words(fd, 0, 4, STEP)
    first_words(fd, STEP, 4, STEP)
    assert kept.tolist() == given(fd, 0, 4)  # what was given is not overwritten


def test_past_the_end_they_are_zero(fd):
    os.pwrite(fd, b"\xff" * (STEP + 3), 0)
    given(fd, 0, 4)
    found = first_words(fd, 0, 4, STEP)
    if found is None:
        pytest.skip("this file system has no RWF_NOWAIT")
    assert found.tolist() == [2**64 - 1, 2**24 - 1, 0, 0]


def test_an_error_is_no_words_and_no_harm(fd):
    os.pwrite(fd, b"\xff" * STEP * 4, 0)
    given(fd, 0, 4)
    for flags in (os.O_WRONLY,):
        other = os.open(f"/proc/self/fd/{fd}", flags)
        assert first_words(other, 0, 4, STEP) is None
        os.close(other)
    assert first_words(other, 0, 4, STEP) is None  # closed
    assert first_words(fd, -STEP, 4, STEP) is None  # one bad offset spoils them all
    found = first_words(fd, 0, 4, STEP)
    assert found is None or found.tolist() == given(fd, 0, 4)


def test_what_the_page_cache_has_not_is_not_waited_for(tmp_path):
    fd = os.open(tmp_path / "cold", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, os.urandom(1 << 20), 0)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(fd, [bytearray(8)], 1 << 19, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            pytest.skip("this file system has no RWF_NOWAIT")
        else:
            pytest.skip("the page cache keeps what it was told to drop")
        assert first_words(fd, 0, 256, STEP) is None
    finally:
        os.close(fd)


def test_each_thread_has_its_own(fd):
    rng = random.Random(2)
    os.pwrite(fd, rng.randbytes(64 * STEP), 0)
    want = given(fd, 0, 64)
    wrong = []

    def ask(first):
        for _ in range(200):
            found = first_words(fd, first * STEP, 32, STEP)
            if found is not None and found.tolist() != want[first : first + 32]:
                wrong.append(found)

    threads = [threading.Thread(target=ask, args=(n * 8,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_aio_there_are_none(monkeypatch):
    def ask(fd, found):
        found.append(first_words(fd, 0, 1, STEP))

    for numbers in (None, (-1, -1, -1, -1)):  # another machine; a sandbox that refuses
        monkeypatch.setattr(module, "_NUMBERS", numbers)
        found = []
        fd = os.memfd_create("words")
        thread = threading.Thread(target=ask, args=(fd, found))
        thread.start()
        thread.join()
        os.close(fd)
        assert found == [None]


def test_reads_whose_end_is_unknown_are_never_trusted_again(monkeypatch):
    if not available():
        pytest.skip("no Linux AIO here")
    reader = module.Context(module._NUMBERS)
    fd = os.memfd_create("words")
    os.pwrite(fd, b"\xff" * 8, 0)
    place, word = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    address = np.array([module.address_of(word)], np.uint64)
    assert reader.read(fd, place, address, 8, 0).tolist() == [8]
    assert word.tolist() == [2**64 - 1]
    reader._get_events = -1  # ENOSYS
    assert reader.read(fd, place, address, 8, 0) is None
    reader._get_events = module._NUMBERS[3]
    assert reader.read(fd, place, address, 8, 0) is None
    assert not reader._context.value
    os.close(fd)


def test_each_read_has_its_own_answer():
    """Short at the end of a file; in the order of the questions; too many are no answer."""
    if not available():
        pytest.skip("no Linux AIO here")
    rng = random.Random(3)
    files = [os.memfd_create(f"file{n}") for n in range(3)]
    contents = [rng.randbytes(20000 + n) for n in range(3)]
    for fd, content in zip(files, contents, strict=True):
        os.pwrite(fd, content, 0)
    space = np.zeros(MOST * 100, np.uint8)
    chosen = [rng.randrange(3) for _ in range(MOST)]
    offsets = np.array([rng.randrange(20500) for _ in range(MOST)])
    lengths = np.array([rng.randrange(1, 100) for _ in range(MOST)])
    addresses = (module.address_of(space) + 100 * np.arange(MOST)).astype(np.uint64)
    found = module.context().read([files[n] for n in chosen], offsets, addresses, lengths, 0)
    for number in range(MOST):
        start = int(offsets[number])
        want = contents[chosen[number]][start : start + int(lengths[number])]
        assert found[number] == len(want)
        assert space[number * 100 : number * 100 + len(want)].tobytes() == want
    for fd in files:
        os.close(fd)
